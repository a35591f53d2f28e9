# The same as fcd.py, by a hook: the model's line stays as it is.
_base_ = 'labels_alone.py'
custom_hooks = [dict(type='kdhooks.DistillHook', teacher={{_base_.sface}}, methods=['fcd'])]
