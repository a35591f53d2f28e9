"""The adapter for Lightning: one callback.

    Trainer(callbacks=[Distill("kd.toml")])

During the training, the LightningModule has the Distiller as its child `kdhooks`. The optimizer
trains the Distiller's parameters too. The callback saves the Distiller's state; the module's own
part of a checkpoint is that of a run without kdhooks.
"""

from kdhooks_integrations.lightning.callback import Distill

__all__ = ["Distill"]
