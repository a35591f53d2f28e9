_base_ = 'labels_alone.py'
model = dict(
    _delete_=True, type='kdhooks.Distill', student={{_base_.model}},
    teacher={{_base_.sface}},
    taps=dict(
        student=dict(stages=['backbone.stage1', 'backbone.stage2', 'backbone.stage4']),
        teacher=dict(stages=['conv_6_relu', 'conv_12_relu', 'conv_14_relu'])),
    methods=['fskd'])
