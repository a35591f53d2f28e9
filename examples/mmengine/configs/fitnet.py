_base_ = 'labels_alone.py'
model = dict(
    _delete_=True, type='kdhooks.Distill', student={{_base_.model}},
    teacher={{_base_.sface}},
    taps=dict(
        student=dict(stages=['backbone.stage4']),
        teacher=dict(stages=['conv_14_relu'])),
    methods=['fitnet'])
