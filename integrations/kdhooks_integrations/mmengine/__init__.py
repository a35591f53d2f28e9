"""MMEngine: one line around the model, or one hook in the config.

    model = dict(type='kdhooks.Distill', student=…, teacher=…, methods=['fcd'])
    custom_hooks = [dict(type='kdhooks.DistillHook', teacher=…, methods=['fcd'])]

Either way the student stays the runner's model and keeps its parameter names and its type. The
methods' parameters are its child `kdhooks`, which is optimised, synchronised and saved with it. The
teacher is not.
"""

from kdhooks_integrations.mmengine.registered import (
    Distill,
    DistillHook,
    ResumeHook,
    allow_resume,
)

__all__ = ["Distill", "DistillHook", "ResumeHook", "allow_resume"]
