"""LightningModules in several styles, and short fits of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

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
    """A backbone and a head, trained with one loss; each batch is a pair."""

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


class Manual(Faces):
    """The same with manual optimization."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        rate: Any = self.lr_schedulers()
        loss = super().training_step(batch, batch_idx)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        rate.step()


class Whole(LightningModule):  # type: ignore[misc]  # lightning may not be installed
    """The module itself is the network, as in many tutorials. It has no BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 4, stride=4)
        self.fc = nn.Linear(256, 12)

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.fc(F.relu(self.stem(images)).flatten(1))
        return embedding

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Batches:
    """A loader with a length; Lightning would treat a list as several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


def loader(wrap: Callable[[Any], Any] = lambda pair: pair) -> Batches:
    """Return two batches of 12 faces; with several ranks, this rank's part of each."""
    images, labels = tiny_batch(copies=4)
    pairs = zip(images.split(12), labels.split(12), strict=True)
    return Batches([wrap([mine(part) for part in pair]) for pair in pairs])


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
