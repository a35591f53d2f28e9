"""Small models with the structure of mmpretrain's, and with the same outputs of each part."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseDataPreprocessor, BaseModel, BaseModule
from mmengine.registry import MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from kdhooks.testing import tiny_batch
from tests.transformers import Attention, WindowAttention

IMAGENET: dict[str, Any] = {
    "mean": [123.675, 116.28, 103.53],
    "std": [58.395, 57.12, 57.375],
    "to_rgb": True,
}


class Mixup:
    """Averages each image with the next one, and their scores too."""

    def mix(self, inputs: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return (inputs + inputs.roll(1, 0)) / 2, (scores + scores.roll(1, 0)) / 2


class Augments:
    def __init__(self, augments: Sequence[str]) -> None:
        self.augments = [Mixup() for _ in augments]


@MODELS.register_module()
class ShapedPreprocessor(BaseDataPreprocessor):  # type: ignore[misc]  # mmengine has no types
    """`to_rgb` reverses the channels; batch_augments mix the images of a training step."""

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        to_rgb: bool = False,
        batch_augments: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.to_rgb, self._enable_normalize = to_rgb, mean is not None
        if mean is not None and std is not None:
            self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), False)
            self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), False)
        self.batch_augments = Augments(**batch_augments) if batch_augments else None

    def forward(self, data: Any, training: bool = False) -> Any:
        inputs = torch.stack(list(data["inputs"])).float()
        inputs = inputs.flip(1) if self.to_rgb else inputs
        if self._enable_normalize:
            inputs = (inputs - self.mean) / self.std
        samples = data["data_samples"]
        if training and self.batch_augments is not None:
            scores = F.one_hot(torch.cat([one.gt_label for one in samples]), 6).float()
            inputs, scores = self.batch_augments.augments[0].mix(inputs, scores)
            for one, score in zip(samples, scores, strict=True):
                one.gt_score = score
        return {"inputs": inputs, "data_samples": samples}


def conv(k: int, out: int, stride: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(k, out, 3, stride=stride, padding=1), nn.BatchNorm2d(out), nn.ReLU()
    )


class InTurn(BaseModule):  # type: ignore[misc]
    """Returns a tuple of the outputs of those layers whose numbers are in `out`."""

    def __init__(self, out: Sequence[int] = (-1,)) -> None:
        super().__init__()
        self.out = out

    def parts(self) -> list[nn.Module]:
        raise NotImplementedError

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for part in self.parts():
            x = part(x)
            outputs.append(x)
        return tuple(outputs[number] for number in self.out)


@MODELS.register_module()
class ShapedMobileNet(InTurn):
    """layer0 to layer6; layers 0, 2, 4 and 5 halve the map."""

    def __init__(self, out: Sequence[int] = (-1,)) -> None:
        super().__init__(out)
        widths, strides = (3, 4, 4, 8, 8, 12, 12, 16), (2, 1, 2, 1, 2, 2, 1)
        for number, stride in enumerate(strides):
            self.add_module(f"layer{number}", conv(widths[number], widths[number + 1], stride))

    def parts(self) -> list[nn.Module]:
        return [self.get_submodule(f"layer{number}") for number in range(7)]


@MODELS.register_module()
class ShapedConvNeXt(InTurn):
    """The layers that halve the map are outside of the stages."""

    def __init__(self, out: Sequence[int] = (-1,)) -> None:
        super().__init__(out)
        widths = (3, 4, 8, 12, 16)
        self.downsample_layers = nn.ModuleList(
            nn.Conv2d(k, out, 2, stride=2) for k, out in itertools.pairwise(widths)
        )
        self.stages = nn.ModuleList(conv(k, k, 1) for k in widths[1:])

    def parts(self) -> list[nn.Module]:
        pairs = zip(self.downsample_layers, self.stages, strict=True)
        return [nn.Sequential(*pair) for pair in pairs]


class FFN(nn.Module):
    """As in mmcv, the residual connection is inside."""

    add_identity = True

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor, identity: Tensor | None = None) -> Tensor:
        out: Tensor = (x if identity is None else identity) + self.layers(x)
        return out


class EncoderLayer(nn.Module):
    """Has the submodules ln1, attn, ln2 and ffn."""

    def __init__(self, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.ln1, self.attn = nn.LayerNorm(width), Attention(width, heads)
        self.ln2, self.ffn = nn.LayerNorm(width), FFN(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        out: Tensor = self.ffn(self.ln2(x), identity=x)
        return out


@MODELS.register_module()
class VisionTransformer(BaseModule):  # type: ignore[misc]
    """mmpretrain's, with a class token in front. timm's class of this name has `blocks`."""

    def __init__(self, registers: int = 0, depth: int = 4, says: bool = True) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, stride=8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        if registers:
            self.reg_token = nn.Parameter(torch.randn(1, registers, 8))
        if says:
            self.num_extra_tokens = 1 + registers
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 16, 8))
        self.layers = nn.ModuleList(EncoderLayer() for _ in range(depth))
        self.norm = nn.LayerNorm(8)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed
        own = [getattr(self, name) for name in ("cls_token", "reg_token") if hasattr(self, name)]
        x = torch.cat([*(one.expand(len(x), -1, -1) for one in own), x], dim=1)
        for layer in self.layers:
            x = layer(x)
        return (self.norm(x)[:, 0],)


class ShiftWindowMSA(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.w_msa = WindowAttention(width, 2, 2)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (b, _, k), (h, w) = x.shape, size
        windows = x.view(b, h // 2, 2, w // 2, 2, k).transpose(2, 3).reshape(-1, 4, k)
        x = self.w_msa(windows, mask=None).view(b, h // 2, w // 2, 2, 2, k)
        out: Tensor = x.transpose(2, 3).reshape(b, h * w, k)
        return out


class ShapedSwinBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), ShiftWindowMSA(width)
        self.norm2, self.ffn = nn.LayerNorm(width), FFN(width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), size)
        out: Tensor = self.ffn(self.norm2(x), identity=x)
        return out


class SwinStage(nn.Module):
    """Runs its blocks, then may halve the map; returns (tokens, (h, w))."""

    def __init__(self, width: int, halves: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ShapedSwinBlock(width) for _ in range(2))
        self.downsample = nn.Linear(4 * width, 2 * width) if halves else None

    def forward(self, x: Tensor, size: tuple[int, int]) -> tuple[Tensor, tuple[int, int]]:
        for block in self.blocks:
            x = block(x, size)
        if self.downsample is None:
            return x, size
        (b, _, k), (h, w) = x.shape, size
        x = x.view(b, h // 2, 2, w // 2, 2, k).transpose(2, 3).reshape(b, h * w // 4, 4 * k)
        return self.downsample(x), (h // 2, w // 2)


@MODELS.register_module()
class ShapedSwin(BaseModule):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 4, 4, stride=4)
        self.stages = nn.ModuleList(SwinStage(k, halves) for k, halves in ((4, True), (8, False)))

    def forward(self, images: Tensor) -> tuple[Tensor]:
        x: Tensor
        x, size = self.patch_embed(images).flatten(2).mT, (8, 8)
        for stage in self.stages:
            x, size = stage(x, size)
        out: Tensor = x.mT.unflatten(2, size)
        return (out,)


@MODELS.register_module()
class Pool(nn.Module):
    def forward(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(x.mean(dim=(2, 3)) for x in inputs)


class NormProduct(nn.Linear):
    """Scores each class by the largest cosine with its k rows."""

    def __init__(self, d: int, classes: int, k: int) -> None:
        super().__init__(d, classes * k, bias=False)
        self.k = k

    def forward(self, input: Tensor) -> Tensor:
        cosines = F.linear(F.normalize(input), F.normalize(self.weight))
        nearest: Tensor = cosines.unflatten(1, (-1, self.k)).amax(dim=2)
        return nearest


@MODELS.register_module()
class ShapedArcFace(nn.Module):
    def __init__(self, d: int, k: int = 1) -> None:
        super().__init__()
        self.norm_product = NormProduct(d, 6, k)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm_product(x)
        return out


@MODELS.register_module()
class ShapedLinear(nn.Module):
    def __init__(self, d: int, bias: bool = True) -> None:
        super().__init__()
        self.fc = nn.Linear(d, 6, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x)
        return out


@MODELS.register_module()
class ShapedClassifier(BaseModel):  # type: ignore[misc]
    """Builds backbone, neck and head from configs; its data_preprocessor is ShapedPreprocessor."""

    def __init__(
        self,
        backbone: Any,
        head: Any,
        neck: Any = None,
        data_preprocessor: Any = None,
    ) -> None:
        super().__init__({"type": "ShapedPreprocessor", **(data_preprocessor or {})})
        self.backbone, self.head = MODELS.build(backbone), MODELS.build(head)
        self.neck = MODELS.build(neck) if neck else None

    def forward(
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor"
    ) -> Any:
        features = self.backbone(inputs)
        features = features if self.neck is None else self.neck(features)
        if mode != "loss":
            return features
        if not hasattr(data_samples[0], "gt_label"):  # type: ignore[index]
            return {"loss": features[-1].square().mean()}
        labels = torch.cat([one.gt_label for one in data_samples])  # type: ignore[union-attr]
        return {"loss": F.cross_entropy(16 * self.head(features[-1]), labels)}


WIDTHS = {
    "ShapedMobileNet": 16, "ShapedConvNeXt": 16, "VisionTransformer": 8, "ShapedSwin": 8,
}  # fmt: skip


def shaped(kind: str, head: str = "ShapedArcFace", **changes: Any) -> dict[str, Any]:
    """Return the config of a classifier; `backbone={…}` adds keys to the backbone's config."""
    backbone = {"type": kind, **changes.pop("backbone", {})}
    neck = None if kind == "VisionTransformer" else {"type": "Pool"}
    rows = {"type": head, "d": WIDTHS[kind], **changes.pop("head_options", {})}
    return {"type": "ShapedClassifier", "backbone": backbone, "neck": neck, "head": rows, **changes}


def batch(labels: bool = True) -> dict[str, Any]:
    """Return pixels as a loader does."""
    images, classes = tiny_batch(copies=2)
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round()
    samples = [BaseDataElement(gt_label=one.reshape(1)) for one in classes]
    return {
        "inputs": list(pixels),
        "data_samples": samples if labels else [BaseDataElement() for _ in classes],
    }


def losses(model: Any, data: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the losses of one training step, computed as train_step does."""
    given = model.train().data_preprocessor(batch() if data is None else data, True)
    found: dict[str, Any] = model(**given, mode="loss")
    return found
