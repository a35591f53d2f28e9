"""The networks of the settings: students and teachers that are small enough for a CPU."""

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from kdhooks_demo.network import Bottleneck, SmallFaceNet, convolution

CHAIN_STAGES = ("stage2", "stage3", "stage4")  # the ends of 28x28, 14x14 and 7x7


class ChainNet(nn.Module):
    """(b 3 112 112) in [-1, 1] -> (b d): the layout of SFace, MobileNet-v1 at 112 pixels.

    After Howard et al., 2017, arXiv:1704.04861. SFace has 32 channels in its first layer.
    """

    def __init__(self, embedding_dim: int = 128, width: int = 4) -> None:
        """width: the number of channels of the first layer."""
        super().__init__()
        k = width
        self.stem = nn.Sequential(convolution(3, k, kernel=3), _separable(k, 2 * k))
        self.stage1 = nn.Sequential(_separable(2 * k, 4 * k, stride=2), _separable(4 * k, 4 * k))
        self.stage2 = nn.Sequential(_separable(4 * k, 8 * k, stride=2), _separable(8 * k, 8 * k))
        self.stage3 = nn.Sequential(
            _separable(8 * k, 16 * k, stride=2), *(_separable(16 * k, 16 * k) for _ in range(5))
        )
        self.stage4 = nn.Sequential(
            _separable(16 * k, 32 * k, stride=2), _separable(32 * k, 32 * k)
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * k * 49, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 112 112) -> (b d)."""
        x = self.stage4(self.stage3(self.stage2(self.stage1(self.stem(images)))))
        embedding: Tensor = self.head(x)
        return embedding


def _separable(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        convolution(channels, channels, kernel=3, stride=stride, groups=channels),
        convolution(channels, out_channels, kernel=1),
    )


class ChannelGate(nn.Module):
    """(b k h w) -> (b k 1 1): logits of CBAM's channel attention."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Conv2d(channels, channels // 4, 1), nn.ReLU(), nn.Conv2d(channels // 4, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b k h w) -> (b k 1 1)."""
        logits: Tensor = self.mlp(x.mean((2, 3), keepdim=True)) + self.mlp(x.amax((2, 3), True))
        return logits


class SpatialGate(nn.Module):
    """(b k h w) -> (b 1 h w): logits of CBAM's spatial attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(b k h w) -> (b 1 h w)."""
        both = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], dim=1)
        logits: Tensor = self.conv(both)
        return logits


class Gated(nn.Module):
    """A bottleneck of equal shapes with CBAM, Woo et al., ECCV 2018, arXiv:1807.06521."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = Bottleneck(channels, channels, residual=False)
        self.channel, self.spatial = ChannelGate(channels), SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        """(b k h w) -> (b k h w)."""
        out: Tensor = self.body(x)
        out = out * self.channel(out).sigmoid()
        out = out * self.spatial(out).sigmoid()
        return x + out


class GatedFaceNet(SmallFaceNet):
    """The small face network with CBAM in the last block of 28x28, 14x14 and 7x7."""

    def __init__(self, embedding_dim: int = 128, width: int = 24) -> None:
        super().__init__(embedding_dim, width)
        for stage, channels in ((self.stage1, width), (self.stage2, 2 * width)):
            stage[-1] = Gated(channels)
        self.stage4[-1] = Gated(4 * width)


class SmallViT(nn.Module):
    """(b 3 112 112) in [-1, 1] -> (b e): a transformer on 49 tokens, behind a stem of convolutions.

    After Dosovitskiy et al., ICLR 2021, arXiv:2010.11929, with the stem of Xiao et al., NeurIPS
    2021, arXiv:2106.14881, without which so small a set of images is not enough to train it. The
    embedding is a linear map of all tokens, as in arcface_torch's ViT.
    """

    def __init__(self, embedding_dim: int = 128, width: int = 160, depth: int = 6) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            convolution(3, 24, kernel=3, stride=2),
            convolution(24, 48, kernel=3, stride=2),
            convolution(48, 96, kernel=3, stride=2),
            nn.Conv2d(96, width, 2, 2),
        )
        self.positions = nn.Parameter(0.02 * torch.randn(1, 49, width))
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(
            nn.Linear(49 * width, embedding_dim, bias=False), nn.BatchNorm1d(embedding_dim)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 112 112) -> (b e)."""
        x = rearrange(self.stem(images), "b k h w -> b (h w) k") + self.positions
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.head(self.norm(x).flatten(1))
        return embedding


class Block(nn.Module):
    """(b n k) -> (b n k): attention and a perceptron, each behind a normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(b n k) -> (b n k)."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class Attention(nn.Module):
    """(b n k) -> (b n k): each token attends to all tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b n k) -> (b n k)."""
        q, k, v = rearrange(self.qkv(x), "b n (s h k) -> s b h n k", s=3, h=self.heads)
        mixed = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.proj(rearrange(mixed, "b h n k -> b n (h k)"))
        return out


narrow_gated = partial(GatedFaceNet, width=16)
wide_gated = partial(GatedFaceNet, width=48)
larger = partial(SmallFaceNet, width=48)
