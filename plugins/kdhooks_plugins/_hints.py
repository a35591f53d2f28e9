"""The comparison of one pair of outputs: how each becomes a map, the connector, the distance."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import KDHooksError, Scheduled, Stage, Varying
from kdhooks_plugins._maps import Grid, to_smaller
from kdhooks_plugins._running_mean import RunningMean

Distance: TypeAlias = Literal["l2", "l1", "cosine", "kl"]
Connector: TypeAlias = Literal["none", "linear", "1x1", "mlp"]
_LEAST = 1e-12  # added to a mean square, so that nothing is divided by 0


@dataclass(frozen=True)
class Features:
    """The conversion of a module's output to a map. A vector is a map of one pixel."""

    name: str
    channels: int
    size: tuple[int, int]  # (h w) as probed
    grid: Grid | None  # None for a vector

    @staticmethod
    def of(stage: Stage, owner: str) -> "Features":
        if len(stage.shape) == 1:
            name = f"{owner} output '{stage.path}'"
            return Features(name, stage.shape[0], (1, 1), None)
        grid = Grid.of(stage, owner)
        return Features(grid.name, grid.channels, grid.size, grid)

    def __call__(self, x: Tensor) -> Tensor:
        """(b k h w), (b h w k), tokens (b n k) or a vector (b k) -> (b k h w)."""
        return x[:, :, None, None] if self.grid is None else self.grid(x)


class Hint(nn.Module):
    """The distance of one pair of outputs, after the student's connector."""

    def __init__(
        self,
        ours: Features,
        theirs: Features,
        connector: nn.Module,
        distance: Distance = "l2",
        *,
        temperature: Scheduled = 1.0,
        normalise: bool = False,
        center: bool = False,
    ) -> None:
        super().__init__()
        self.ours, self.theirs = ours, theirs
        self.connector = connector
        self.normed = any(isinstance(part, nn.BatchNorm2d) for part in connector.modules())
        self.distance = distance
        self.temperature = Varying(temperature)
        self.normalise = normalise
        self.mean = centred(theirs.channels, ours.size, theirs.size) if center else nn.Identity()

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The outputs of the two modules -> ()."""
        ours, theirs = to_smaller(self.ours(student), self.theirs(teacher.detach()))
        if self.normed and self.training and len(ours) * ours.shape[2:].numel() == 1:
            raise KDHooksError(
                f"{self.ours.name}: the batch norm of connector '1x1' needs several numbers of "
                "each channel; found a batch of one image with one pixel; set connector = "
                "'linear', or drop a last batch of one image (drop_last of a DataLoader)"
            )
        s: Tensor = self.connector(ours)
        t: Tensor = self.mean(theirs)
        if self.distance == "cosine":
            return cosine_distance(s, t)
        if self.distance == "kl":
            by = self.temperature.now
            log_s, log_t = (F.log_softmax(x / by, dim=1) for x in (s, t))
            return by * by * (log_t.exp() * (log_t - log_s)).sum(dim=1).mean()
        if self.normalise:
            s, t = root_mean_square_one(s), root_mean_square_one(t)
        return (s - t).square().mean() if self.distance == "l2" else (s - t).abs().mean()


def centred(channels: int, *sizes: tuple[int, int]) -> RunningMean:
    """Create the running mean of the teacher's maps, pooled to the smaller of the sizes."""
    (h, w), (other_h, other_w) = sizes
    return RunningMean(channels, min(h, other_h), min(w, other_w))


def cosine_distance(ours: Tensor, theirs: Tensor) -> Tensor:
    """(b k h w), (b k h w) -> (): the batch mean of 1 - cos of a sample's flattened features."""
    return 1 - (root_mean_square_one(ours) * root_mean_square_one(theirs)).mean()


def root_mean_square_one(x: Tensor) -> Tensor:
    """(b k h w) -> (b n), of length √n: a sum over unit vectors is a mean over these."""
    flat = x.flatten(1)
    return F.rms_norm(flat, flat.shape[1:], eps=_LEAST)


def connect(kind: Connector, inside: int, outside: int, hidden: int | None) -> nn.Module:
    """Create the map from the student's channels to the teacher's, the same at each pixel."""
    if kind == "linear":
        return nn.Conv2d(inside, outside, 1)
    if kind == "1x1":
        return nn.Sequential(nn.Conv2d(inside, outside, 1, bias=False), nn.BatchNorm2d(outside))
    if kind == "mlp":
        hidden = hidden or max(inside, outside)
        return nn.Sequential(nn.Conv2d(inside, hidden, 1), nn.ReLU(), nn.Conv2d(hidden, outside, 1))
    return nn.Identity()
