_base_ = 'labels_alone.py'
model = dict(
    _delete_=True, type='kdhooks.Distill', student={{_base_.model}},
    teacher={{_base_.sface}},
    methods=['aird'])
