"""Outputs of stages as maps (b k h w), in pairs of student and teacher."""

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kdhooks import KDHooksError, Model, Stage

_MANY = 3  # times as many channels as rows; a Swin of 112 pixels starts with (28, 28, 96)


@dataclass(frozen=True)
class Grid:
    """The conversion of a stage's output to a map; tokens are arranged row by row on a square.

    A map (h w k), as timm's Swin returns it, is recognised by its first two sizes, which are equal,
    and its many channels last.
    """

    name: str
    channels: int
    size: tuple[int, int]  # (h w) as probed
    layout: Literal["k h w", "h w k", "n k"] = "k h w"
    prefix: int = 0  # number of tokens before those of the pixels

    @staticmethod
    def of(stage: Stage, owner: str) -> "Grid":
        name = f"{owner} stage '{stage.path}'"
        if len(stage.shape) == 3:
            first, second, last = stage.shape
            if first == second and last >= _MANY * first:
                return Grid(name, last, (first, second), "h w k")
            return Grid(name, first, (second, last))
        if len(stage.shape) != 2:
            raise KDHooksError(
                f"{name} must return a map (k h w) or tokens (n k); found {stage.shape}; name the "
                "end of a stage, before pooling and flattening"
            )
        n, k = stage.shape
        side = math.isqrt(n - stage.prefix)
        if side**2 != n - stage.prefix:
            raise KDHooksError(
                f"{name}: tokens must fill a square grid; found {n} of them"
                f"{f', {stage.prefix} of which are not patches' if stage.prefix else ''}; name a "
                "submodule that returns all patches and no class token, or set num_prefix_tokens "
                "of the network to the number of tokens before the patches"
            )
        return Grid(name, k, (side, side), "n k", stage.prefix)

    def __call__(self, x: Tensor) -> Tensor:
        """(b k h w), (b h w k), or tokens (b n k) -> (b k h w)."""
        if self.layout == "k h w":
            return x
        h, w = self.size
        if x.ndim == 3 and x.shape[1] > self.prefix + h * w:
            raise KDHooksError(
                f"{self.name} returns {x.shape[1]} tokens in training and {self.prefix + h * w} "
                "when probed; if cakd's prompts are among them, set prompts = { in_features = "
                "false } in cakd, or name another stage; if not, probe with images of the "
                "training's size"
            )
        if self.layout == "h w k":
            return rearrange(x, "b h w k -> b k h w")
        x = x[:, self.prefix :]
        if x.shape[1] != h * w:
            raise KDHooksError(
                f"{self.name} returns {x.shape[1]} tokens in training and {h * w} when probed: "
                "if tokens are dropped, the others have no known place on the grid; train without "
                "masking (in arcface_torch: vit_t_dp005_mask0, or backbone.mask_ratio = 0), or "
                "name a later submodule whose output has all tokens"
            )
        return rearrange(x, "b (h w) k -> b k h w", h=h)


def paired_grids(
    method: str, student: Model, teacher: Model, at_least: int = 1
) -> tuple[list[Grid], list[Grid]]:
    """Return both sides' stages, shallow to deep, with the same number on each side."""
    ours, theirs = (
        _grids(method, side, model, at_least)
        for side, model in (("student", student), ("teacher", teacher))
    )
    if len(ours) != len(theirs):
        raise KDHooksError(
            f"{method} compares stage by stage: both sides must have the same number; found "
            f"{len(ours)} of the student and {len(theirs)} of the teacher; name as many as "
            "taps.student.stages and taps.teacher.stages, or student_stages= and teacher_stages="
        )
    return ours, theirs


def _grids(method: str, side: str, model: Model, at_least: int) -> list[Grid]:
    if len(model.stages) < at_least:
        way_out = (
            f"name them, shallow to deep, as taps.{side}.stages in the recipe, or {side}_stages="
        )
        if side == "teacher" and model.module is None:
            way_out = "it is no torch module; kdhooks.onnx.to_torch turns an ONNX file into one"
        raise KDHooksError(
            f"{method} needs at least {at_least} of the {side}'s stages; found "
            f"{len(model.stages)}; {way_out}"
        )
    grids = [Grid.of(stage, f"{method}: {side}") for stage in model.stages]
    for before, after in itertools.pairwise(grids):
        if math.prod(after.size) > math.prod(before.size):
            raise KDHooksError(
                f"{method}: stages must be named from shallow to deep, so that maps do not grow; "
                f"found {after.size} of {after.name} after {before.size} of {before.name}"
            )
    return grids


def to_smaller(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(b k h w), (b l h' w'), each average-pooled to the smaller height and width of the two."""
    size = smaller((ours.shape[2], ours.shape[3]), (theirs.shape[2], theirs.shape[3]))
    return pool(ours, size), pool(theirs, size)


def smaller(ours: tuple[int, int], theirs: tuple[int, int]) -> tuple[int, int]:
    """(h w), (h' w') -> the smaller height and the smaller width."""
    return min(ours[0], theirs[0]), min(ours[1], theirs[1])


def pool(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(b k h w) -> (b k *size): the averages of F.adaptive_avg_pool2d.

    On CUDA the gradient of that operator is not deterministic; those of the operators used here
    are. A tensor that already has this size is returned unchanged.
    """
    (h, w), (rows, columns) = x.shape[-2:], size
    if (h, w) == (rows, columns):
        return x
    if h % rows == 0 and w % columns == 0:
        return F.avg_pool2d(x, (h // rows, w // columns))
    return _windows(h, rows, x) @ (x @ _windows(w, columns, x).mT)


def _windows(n: int, count: int, like: Tensor) -> Tensor:
    """-> (count n): row i averages the numbers from floor(i n / count) to ceil((i+1) n / count).

    These are the numbers that overlap the i-th of `count` equal parts of a line of length n.
    """
    part = torch.arange(count, device=like.device)[:, None]
    number = torch.arange(n, device=like.device)
    inside = ((number + 1) * count > part * n) & (number * count < (part + 1) * n)
    weights = inside.to(like.dtype)
    return weights / weights.sum(dim=1, keepdim=True)
