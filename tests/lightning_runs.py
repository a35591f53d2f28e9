"""LightningModules of several styles, and short fits of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from kdhooks_integrations.lightning import Distill
from tests.ranks import mine

PROJECTED = {"name": "fcd", "projector": True}  # trains parameters of its own
SILENT: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "use_distributed_sampler": False,
}


def recipe(*methods: Any, **keys: Any) -> dict[str, Any]:
    return {
        "teacher": tiny_teacher().module,
        "methods": list(methods or [PROJECTED]),
        "input_shape": (3, 32, 32),
        **keys,
    }


class Faces(LightningModule):  # type: ignore[misc]  # lightning may not be installed
    """A backbone and a head, a pair a batch, one loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = TinyFaceNet()
        self.head = nn.Linear(12, 6, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        images, labels = batch
        return F.cross_entropy(self.head(self.model(images)), labels)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            [*self.model.parameters(), *self.head.parameters()],
            lr=0.05,
            momentum=0.9,
            weight_decay=1e-3,
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("accuracy", (self.head(self.model(images)).argmax(1) == labels).float().mean())


def loader(batches: int = 2, wrap: Callable[[Any], Any] = lambda pair: pair) -> Any:
    """Batches of 12 faces; on several ranks, each rank's part of them."""
    data = TensorDataset(*tiny_batch(copies=2 * batches))
    parts = DataLoader(data, batch_size=12)

    class Batches:
        def __len__(self) -> int:
            return len(parts)

        def __iter__(self) -> Iterator[Any]:
            for pair in parts:
                yield wrap([mine(part) for part in pair])

    return Batches()


def fit(
    module: LightningModule,
    *callbacks: Any,
    data: Any = None,
    epochs: int = 2,
    ckpt: Path | None = None,
    **options: Any,
) -> Trainer:
    torch.manual_seed(3)
    trainer = Trainer(max_epochs=epochs, callbacks=list(callbacks), **{**SILENT, **options})
    trainer.fit(module, loader() if data is None else data, ckpt_path=ckpt)
    return trainer


def distil(*methods: Any, **keys: Any) -> Distill:
    return Distill(recipe(*methods, **keys))


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
