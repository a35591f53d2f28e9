"""URFM: l local features with one receptive field, from pixel features of any grid and width."""

from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from kdhooks_plugins._maps import Grid

# Queries and keys have a root mean square of 1, so attention stays bounded at any learning rate.
# This factor multiplies their product. With a small factor every centre attends to all pixels
# equally, and all local features of a face are its average pixel, which hardly differs by person.
_SHARPNESS = 3.0
_POSITIONS = 1.0  # the initial standard deviation of the positions
_LEAST = 1e-6  # added to a mean square
_EPS = 1e-5  # added to a variance


def pixels(x: Tensor, grid: Grid) -> Tensor:
    """A stage's output -> its pixel features (b n k), row by row."""
    return rearrange(grid(_keep_layout(x)), "b k h w -> b (h w) k")


def _keep_layout(x: Tensor) -> Tensor:
    """Return x such that its gradient has x's own memory format, not one with the pixels first.

    Otherwise the student's whole backward pass would run in the other format.
    """
    if x.ndim == 4 and x.requires_grad:
        last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x = x.view_as(x)
        x.register_hook(partial(torch.Tensor.contiguous, memory_format=layout))
    return x


def of_unit_size(x: Tensor) -> Tensor:
    """(… d) -> (… d): scaled to a root mean square of 1."""
    return F.rms_norm(x, x.shape[-1:], eps=_LEAST)


def standardised(x: Tensor) -> Tensor:
    """(b n d) -> (b n d): mean 0 and variance 1 over the batch, each number of each token."""
    centred = x - x.mean(dim=0)
    return centred * (centred.square().mean(dim=0) + _EPS).rsqrt()


class PixelFeatures(nn.Module):
    """One side's pixels at the common width, with the bucket of each pixel's position.

    The mean over the faces of the batch is subtracted from each pixel. Otherwise this common part
    grows, mostly in prompts, until the matched features no longer depend on whose face it is.
    """

    buckets: Tensor

    def __init__(self, grid: Grid, buckets: Tensor, width: int, prompts: int = 0) -> None:
        """prompts: the number of tokens before the pixels, which have their own positions."""
        super().__init__()
        self.grid = grid
        self.prompts = prompts
        self.project = nn.Linear(grid.channels, width, bias=False)
        self.register_buffer("buckets", buckets, persistent=False)
        self.prompt_positions = (
            nn.Parameter(_POSITIONS * torch.randn(prompts, width)) if prompts else None
        )

    def no_weight_decay(self) -> set[str]:
        return {"prompt_positions"} & set(dict(self.named_parameters()))

    def forward(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's output, (m d) -> f (b n d), its positions (n d)."""
        positions = table[self.buckets]
        if self.prompt_positions is None:
            x = pixels(x, self.grid)
        else:
            # The network's own prefix tokens are between the prompts and the patches.
            own = self.prompts + self.grid.prefix
            x = torch.cat([x[:, : self.prompts], x[:, own:]], dim=1)
            positions = torch.cat([self.prompt_positions, positions])
        return standardised(self.project(x)), positions


class LocalCentres(nn.Module):
    """l learnable centres gather the pixels: softmax(C W_q (f W_k + b)ᵀ / √d) f W_v W_o."""

    def __init__(self, centres: int, width: int, heads: int, rows: int) -> None:
        super().__init__()
        self.heads = heads
        self.centres = nn.Parameter(torch.randn(centres, width))
        self.table = nn.Parameter(_POSITIONS * torch.randn(rows, width))
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)  # keeps h from vanishing

    def no_weight_decay(self) -> set[str]:
        return {"centres", "table"} & set(dict(self.named_parameters()))

    def forward(self, f: Tensor, positions: Tensor) -> Tensor:
        """(b n d), (n d) -> h (b l d)."""
        query = repeat(self.query(self.centres), "l (h d) -> b h l d", b=len(f), h=self.heads)
        key = rearrange(self.key(f) + positions, "b n (h d) -> b h n d", h=self.heads)
        value = rearrange(self.value(f), "b n (h d) -> b h n d", h=self.heads)
        gathered = F.scaled_dot_product_attention(
            _SHARPNESS * of_unit_size(query), of_unit_size(key), value
        )
        h: Tensor = self.norm(self.out(rearrange(gathered, "b h l d -> b l (h d)")))
        return h

    @torch.no_grad()
    def similarity(self) -> Tensor:
        """() -> (): the mean |cos| of two different centres."""
        centres = F.normalize(self.centres)
        n = len(centres)
        return ((centres @ centres.T).abs().sum() - n) / (n * (n - 1))


class SelfAttention(nn.Module):
    """Multi-head self-attention of the local features, which also returns its map; h is added.

    The attention starts close to uniform. Without h, every local feature would become their mean.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h (b l d) -> h + MSA(h) (b l d), log of the map (b heads l l)."""
        query, key, value = rearrange(
            self.qkv(h), "b l (three h d) -> three b h l d", three=3, h=self.heads
        )
        log_map = (of_unit_size(query) @ of_unit_size(key).mT / query.shape[-1] ** 0.5).log_softmax(
            dim=-1
        )
        mixed = rearrange(log_map.exp() @ value, "b h l d -> b l (h d)")
        return h + self.out(mixed), log_map
