_base_ = 'without_head.py'
model = dict(
    _delete_=True, type='kdhooks.Distill', student={{_base_.model}},
    teacher={{_base_.sface_and_rows}},
    methods=[dict(name='adadistill', scale=32.0, m=0.3)])
