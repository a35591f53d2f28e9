"""The adapter for MMEngine: wrap the config's model, or add one hook to the config.

    model = dict(type='kdhooks.Distill', student=…, teacher=…, methods=['fcd'])
    custom_hooks = [dict(type='kdhooks.DistillHook', teacher=…, methods=['fcd'])]

In both cases the runner's model is the student, with its own type and parameter names. Its child
module `kdhooks`, which is optimised, synchronised and saved with it, has the methods' parameters.
The teacher is not saved.
"""

from kdhooks_integrations.mmengine.registered import (
    Distill,
    DistillHook,
    ResumeHook,
    allow_resume,
)

__all__ = ["Distill", "DistillHook", "ResumeHook", "allow_resume"]
