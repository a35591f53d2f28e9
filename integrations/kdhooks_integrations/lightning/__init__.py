"""Lightning: one callback.

    Trainer(callbacks=[Distill("kd.toml")])

While the LightningModule trains, its child `kdhooks` is the Distiller, whose parameters the
optimizer trains besides the student's. Its state is saved with the callback. The module's own part
of a checkpoint is that of a run without kdhooks.
"""

from kdhooks_integrations.lightning.callback import Distill

__all__ = ["Distill"]
