"""Train a face network by distillation with Lightning, from a folder of faces.

python examples/lightning/train.py --recipe kd.toml --data FOLDER [--pairs FILE]
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from faces import open_faces, person_of, tested_faces, training_faces
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from kdhooks.evaluation.pair_sets import PairSet
from kdhooks.factories import factory_named, made_by
from kdhooks.recipe import Recipe
from kdhooks.verification import pair_scores, verify
from kdhooks_demo.network import ArcFaceHead
from kdhooks_integrations.lightning import Distill


class FaceRecogniser(LightningModule):  # type: ignore[misc]  # lightning may not be installed
    """An ordinary LightningModule, without any code for a teacher."""

    def __init__(self, backbone: nn.Module, classes: int, lr: float) -> None:
        """backbone: (b 3 112 112) -> (b d). classes: number of people; 0 if there are no labels."""
        super().__init__()
        self.backbone, self.lr = backbone, lr
        with torch.no_grad():
            dim = backbone.eval()(torch.zeros(1, 3, 112, 112)).shape[1]
        backbone.train()  # Lightning does not change the mode of a module before the training
        self.head = ArcFaceHead(dim, classes, margin=0.3, scale=32.0) if classes else None

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        embedding: Tensor = self.backbone(images)
        if self.head is None:
            return 0 * embedding.sum()  # Distill adds the terms
        loss: Tensor = self.head(embedding, labels)
        self.log("loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """(b d): the sum of the embeddings of each image and of its mirror image."""
        images, _ = batch
        embedding: Tensor = self.backbone(images) + self.backbone(images.flip(-1))
        return embedding

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(
            self.parameters(), lr=self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


class Verification(Callback):  # type: ignore[misc]
    """Computes verification figures on pairs of the embedded validation faces, in per cent."""

    def __init__(self, pairs: PairSet) -> None:
        """pairs: pairs of the faces of the validation data, in the order of that data."""
        self.pairs = pairs
        self._embeddings: list[Tensor] = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._embeddings.append(outputs.float())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        embeddings = torch.cat(self._embeddings)
        self._embeddings = []
        if trainer.sanity_checking:
            return
        # DistributedSampler alternates between ranks: of two ranks, rank 0 has rows 0, 2, 4, ...
        gathered: Any = pl_module.all_gather(embeddings)
        if trainer.world_size > 1:
            gathered = gathered.transpose(0, 1).flatten(0, 1)
        table = gathered.cpu().numpy()
        if len(table) < len(self.pairs.images):  # for example with limit_val_batches
            return
        found = verify(pair_scores(table, self.pairs.rows), self.pairs.same, self.pairs.folds)
        shares = {"accuracy": found.accuracy, "eer": found.eer}
        shares |= {f"tar@far={far:g}": tar for far, tar in found.tar.items()}
        for name, share in shares.items():
            if not math.isnan(share):  # NaN: there are too few pairs for this FAR
                pl_module.log(
                    f"verification/{name}",
                    100 * share,
                    prog_bar=name == "accuracy",
                    sync_dist=True,  # the value is the same on all ranks
                )


def main(argv: Sequence[str] | None = None) -> Trainer:
    options = parser().parse_args(argv)
    seed_everything(options.seed, workers=True, verbose=False)
    recipe = Recipe.read(options.recipe)
    files = open_faces(options.data)
    callbacks: list[Callback] = [
        Distill(recipe, student="backbone", classifier="head.weight" if recipe.labels else None),
        ModelCheckpoint(options.out, filename="last", enable_version_counter=False),
        LearningRateMonitor(),
    ]
    test, tested = None, set[str]()
    if options.pairs:
        faces, pairs = tested_faces(
            open_faces(options.test) if options.test else files, options.pairs
        )
        test = DataLoader(faces, options.batch_size, num_workers=options.workers)
        tested = {person_of(name) for name in faces.names}
        callbacks.append(Verification(pairs))
    train = training_faces(files, recipe.labels, tested)
    backbone = made_by(factory_named(options.student, "student"), options.student, "student")
    module = FaceRecogniser(backbone, train.classes, options.lr)
    trainer = Trainer(
        max_epochs=options.epochs,
        precision=options.precision,
        accelerator=options.accelerator,
        devices=options.devices,
        callbacks=callbacks,
        logger=CSVLogger(options.out, name="log"),
        log_every_n_steps=10,
        num_sanity_val_steps=0,
    )
    batches = DataLoader(
        train, options.batch_size, shuffle=True, drop_last=True, num_workers=options.workers
    )
    last = Path(options.out) / "last.ckpt"
    trainer.fit(module, batches, test, ckpt_path=str(last) if options.resume else None)
    if trainer.is_global_zero:
        torch.save(backbone.state_dict(), Path(options.out) / "student.pt")
        for name, value in trainer.callback_metrics.items():
            print(f"{name} {float(value):.4f}")
    return trainer


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add = made.add_argument
    add("--recipe", required=True, help="recipe: a TOML file with the teacher and the methods")
    add("--data", required=True, help="folder or zip of aligned 112x112 faces to train on")
    add(
        "--pairs",
        help="pairs to test on, in the format of LFW's pairs.txt; the people in them are left out "
        "of the training (default: none)",
    )
    add("--test", help="folder or zip with the faces of the pairs (default: --data)")
    add(
        "--student",
        default="kdhooks_demo.network:SmallFaceNet",
        help="package.module:factory that creates the student (default: %(default)s)",
    )
    add("--epochs", type=int, default=20, help="passes over the faces (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="per-device batch size (default: %(default)s)")
    add("--lr", type=float, default=0.1, help="highest learning rate (default: %(default)s)")
    add("--workers", type=int, default=2, help="data loading processes (default: %(default)s)")
    add(
        "--precision",
        default="32-true",
        help="a precision of Lightning, such as bf16-mixed (default: %(default)s)",
    )
    add("--accelerator", default="auto", help="cpu, gpu or auto (default: %(default)s)")
    add("--devices", default="auto", help="number of devices (default: %(default)s)")
    add("--out", default="runs/student", help="output folder (default: %(default)s)")
    add("--resume", action="store_true", help="resume from last.ckpt in --out (default: off)")
    add(
        "--seed",
        type=int,
        default=0,
        help="seed of the initial weights and of the order of the faces (default: %(default)s)",
    )
    return made


if __name__ == "__main__":
    main()
