"""A small face network in the style of MobileFaceNet, and the head that trains it on labels.

MobileFaceNet: Chen et al., CCBR 2018, arXiv:1804.07573.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ("stage1", "stage2", "stage4")  # the ends of 28x28, 14x14 and 7x7


class SmallFaceNet(nn.Module):
    """(b 3 112 112) in [-1, 1] -> (b d), the embedding before normalisation.

    Average pooling reduces its images to 56x56. It has ReLU in place of PReLU, whose gradient would
    take a third of the time on a processor. Its stages end at 28x28, 14x14, 7x7 and 7x7.
    """

    def __init__(self, embedding_dim: int = 128, width: int = 24) -> None:
        """width: the number of channels at 28x28."""
        super().__init__()
        k = width
        self.shrink = nn.AvgPool2d(2)
        self.stem = convolution(3, k, kernel=3, stride=2)
        self.stage1 = nn.Sequential(Bottleneck(k, k), Bottleneck(k, k))
        self.stage2 = nn.Sequential(Bottleneck(k, 2 * k, stride=2), Bottleneck(2 * k, 2 * k))
        self.stage3 = nn.Sequential(Bottleneck(2 * k, 4 * k, stride=2), Bottleneck(4 * k, 4 * k))
        self.stage4 = nn.Sequential(Bottleneck(4 * k, 4 * k), Bottleneck(4 * k, 4 * k))
        self.head = nn.Sequential(
            convolution(4 * k, 256, kernel=1),
            convolution(256, 256, kernel=7, padding=0, groups=256, activate=False),
            nn.Flatten(),
            nn.Linear(256, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 112 112) -> (b d)."""
        x = self.stem(self.shrink(images))
        x = self.stage4(self.stage3(self.stage2(self.stage1(x))))
        embedding: Tensor = self.head(x)
        return embedding


class Bottleneck(nn.Module):
    """Expand, convolve depthwise, project; add the input if the shapes agree."""

    def __init__(
        self, channels: int, out_channels: int, stride: int = 1, residual: bool = True
    ) -> None:
        super().__init__()
        wide = 2 * channels
        self.body = nn.Sequential(
            convolution(channels, wide, kernel=1),
            convolution(wide, wide, kernel=3, stride=stride, groups=wide),
            convolution(wide, out_channels, kernel=1, activate=False),
        )
        self.residual = residual and stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(b k h w) -> (b k' h' w')."""
        out: Tensor = self.body(x)
        return x + out if self.residual else out


def convolution(
    channels: int,
    out_channels: int,
    kernel: int,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    activate: bool = True,
) -> nn.Sequential:
    """A convolution without bias, its normalisation, and ReLU unless `activate` is false."""
    padding = kernel // 2 if padding is None else padding
    layers: list[nn.Module] = [
        nn.Conv2d(channels, out_channels, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if activate else nn.Sequential(*layers)


class ArcFaceHead(nn.Module):
    """ArcFace, Deng et al., CVPR 2019, arXiv:1801.07698: the student's own classifier."""

    def __init__(self, dim: int, classes: int, margin: float, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.01 * torch.randn(classes, dim))
        self.margin, self.scale = margin, scale

    def forward(self, embedding: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b) -> (), in the precision of the weight.

        Autocast is off: half precision rounds small angles to 0, and CUDA's autocast would return
        arccosines in another precision than the cosines.
        """
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = embedding.to(self.weight.dtype)
            cosine = F.normalize(embedding) @ F.normalize(self.weight).T
            own = cosine.gather(1, labels[:, None]).clamp(-1 + 1e-6, 1 - 1e-6)
            turned = torch.cos(torch.acos(own) + self.margin)
            line = own - self.margin * math.sin(math.pi - self.margin)
            own = torch.where(own > math.cos(math.pi - self.margin), turned, line)
            return F.cross_entropy(self.scale * cosine.scatter(1, labels[:, None], own), labels)
