"""A ViT and a Swin of a few hundred weights, whose parts have the usual names."""

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from kdhooks import Teacher
from kdhooks.testing import tiny_batch


class Attention(nn.Module):
    """Attention of all tokens (b n k) to all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixed(x, torch.zeros(()))

    def mixed(self, x: Tensor, bias: Tensor) -> Tensor:
        b, n, k = x.shape
        query, key, value = self.qkv(x).view(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT * self.scale + bias).softmax(dim=-1)
        out: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(b, n, k))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int, attn: nn.Module | None = None) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = attn or Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class TinyViT(nn.Module):
    """A ViT like arcface_torch's: patches, blocks (b n k), and an embedding of all tokens."""

    def __init__(self, dim: int = 12, width: int = 8, depth: int = 3) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 8, stride=8)
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 16, width))
        self.blocks = nn.ModuleList(Block(width, 2) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(nn.Linear(16 * width, dim), nn.BatchNorm1d(dim))

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 32 32) -> (b e)."""
        x = rearrange(self.patch_embed(images), "b k h w -> b (h w) k") + self.pos_embed
        for block in self.blocks:
            x = block(x)
        embedding: Tensor = self.feature(self.norm(x).flatten(1))
        return embedding


class WindowAttention(Attention):
    """Attention in each window ((b w) n k), with a bias by offset, and a mask (w n n)."""

    relative_position_index: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__(width, heads)
        self.relative_position_bias_table = nn.Parameter(torch.randn((2 * side - 1) ** 2, heads))
        places = torch.cartesian_prod(torch.arange(side), torch.arange(side))
        offsets = places[:, None] - places + side - 1
        index = offsets[..., 0] * (2 * side - 1) + offsets[..., 1]
        self.register_buffer("relative_position_index", index)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1)
        if mask is not None:
            bias = bias + mask[:, None].repeat(len(x) // len(mask), 1, 1, 1)
        return self.mixed(x, bias)


class SwinBlock(Block):
    """Takes maps (b h w k) like timm's block, or tokens (b n k) like Microsoft's."""

    attn_mask: Tensor | None

    def __init__(
        self, width: int, heads: int, size: int, side: int, shift: int, flat: bool
    ) -> None:
        super().__init__(width, heads, WindowAttention(width, heads, side))
        self.size, self.side, self.shift, self.flat = size, side, shift, flat
        self.register_buffer("attn_mask", self.mask() if shift else None)

    def mask(self) -> Tensor:
        """(w n n): -100 between pixels that are neighbours only by the shift."""
        region = torch.zeros(self.size)
        region[-self.side :] = 1
        region[-self.shift :] = 2
        regions = (3 * region[:, None] + region)[None, :, :, None]
        ids = self.windows(regions)[..., 0]
        return (ids[:, :, None] != ids[:, None]) * -100.0

    def windows(self, x: Tensor) -> Tensor:
        return rearrange(x, "b (h p) (w q) k -> (b h w) (p q) k", p=self.side, q=self.side)

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.reshape(len(x), self.size, self.size, -1)
        moved = self.norm1(x).roll((-self.shift, -self.shift), (1, 2))
        mixed = self.attn(self.windows(moved), self.attn_mask)
        count = self.size // self.side
        back = rearrange(mixed, "(b h w) (p q) k -> b (h p) (w q) k", h=count, w=count, p=self.side)
        x = x + back.roll((self.shift, self.shift), (1, 2))
        x = x + self.mlp(self.norm2(x))
        return x.reshape(shape)


class Merging(nn.Module):
    """Merges 2 x 2 pixels into one of twice the width."""

    def __init__(self, width: int, flat: bool) -> None:
        super().__init__()
        self.flat = flat
        self.reduction = nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.flat:
            x = rearrange(x, "b (h w) k -> b h w k", h=int(x.shape[1] ** 0.5))
        x = self.reduction(rearrange(x, "b (h p) (w q) k -> b h w (p q k)", p=2, q=2))
        return x.flatten(1, 2) if self.flat else x


class TinySwin(nn.Module):
    """Has two stages of two blocks, the second one shifted, on 8 x 8 and 4 x 4 pixels."""

    def __init__(self, dim: int = 12, width: int = 8, flat: bool = False) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, width, 4, stride=4)
        self.flat = flat
        block = partial(SwinBlock, flat=flat)
        self.layers = nn.Sequential(
            nn.Sequential(block(width, 2, 8, 4, 0), block(width, 2, 8, 4, 2)),
            Merging(width, flat),
            nn.Sequential(block(2 * width, 4, 4, 2, 0), block(2 * width, 4, 4, 2, 1)),
        )
        self.feature = nn.Sequential(nn.Linear(32 * width, dim), nn.BatchNorm1d(dim))

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 32 32) -> (b e)."""
        x = rearrange(self.patch_embed(images), "b k h w -> b h w k")
        x = self.layers(x.flatten(1, 2) if self.flat else x)
        embedding: Tensor = self.feature(x.flatten(1))
        return embedding


def trained(make: Callable[[], nn.Module], seed: int = 3) -> nn.Module:
    """Return a network in eval mode that has BatchNorm statistics of data."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = make()
    images, _ = tiny_batch(copies=4)
    with torch.no_grad():
        for _ in range(20):
            network(images)
    return network.eval()


def teacher_of(make: Callable[[], nn.Module]) -> Teacher:
    """Return a teacher with class rows that fit `tiny_batch`."""
    network = trained(make)
    images, labels = tiny_batch(copies=4)
    with torch.no_grad():
        embedding = nn.functional.normalize(network(images))
    rows = [embedding[labels == label].mean(dim=0) for label in labels.unique()]
    return Teacher(network, classifier=torch.stack(rows))
