"""InsightFace's recognition/arcface_torch: one line in the config file, or in train_v2.py.

    from kdhooks_integrations import arcface_torch
    arcface_torch.install("kd.toml")

The trainer's head (PartialFC) returns its loss plus the distillation terms. The losses' own
parameters join the trainer's optimizer and its learning rate schedule. Their state is saved in the
trainer's checkpoints, from which a run without kdhooks can resume too. `model.pt` holds only the
student.
"""

from kdhooks_integrations.arcface_torch.attachment import Attachment, attach
from kdhooks_integrations.arcface_torch.installation import Installation, install
from kdhooks_integrations.arcface_torch.networks import Backbones

__all__ = ["Attachment", "Backbones", "Installation", "attach", "install"]
