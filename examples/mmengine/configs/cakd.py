# SFace is a CNN, so it gets no prompts. For a transformer as the teacher, leave `prompts` out:
# teacher=dict(network=dict(type='YourViT', …), checkpoint='…').
_base_ = 'labels_alone.py'
model = dict(
    _delete_=True, type='kdhooks.Distill', student={{_base_.model}},
    teacher={{_base_.sface}},
    taps=dict(
        student=dict(stages=['backbone.stage4']), teacher=dict(stages=['conv_14_relu'])),
    methods=[dict(name='cakd', urfm=dict(width=128, heads=4), prompts=dict(number=0))])
optim_wrapper = dict(
    paramwise_cfg=dict(
        custom_keys={
            'urfm.centres': dict(decay_mult=0.0), 'urfm.table': dict(decay_mult=0.0),
            'target.centres': dict(decay_mult=0.0), 'target.table': dict(decay_mult=0.0)}))
