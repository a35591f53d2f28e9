# The same distillation as fcd.py, but with a hook, so `model` remains unchanged.
_base_ = 'labels_alone.py'
custom_hooks = [dict(type='kdhooks.DistillHook', teacher={{_base_.sface}}, methods=['fcd'])]
