"""Finds the class weights of a PartialFC head of any version, and the classes that it holds."""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from kdhooks.classes.ranks import world
from kdhooks.classes.shards import ClassShard
from kdhooks.errors import KDHooksError


def weight_of(head: nn.Module) -> Tensor:
    """Return the head's rows; without sampling, heads before 2023 call them weight_activated."""
    weight = getattr(head, "weight", getattr(head, "weight_activated", None))
    if not isinstance(weight, Tensor):
        raise KDHooksError(
            "arcface_torch: the head must hold its class weights as 'weight'; found none in "
            f"{type(head).__name__}"
        )
    return weight


def shard_of(head: nn.Module) -> ClassShard:
    weight = weight_of(head)
    counts: list[Any] = [len(weight)]
    if world() is not None:
        counts = [None] * dist.get_world_size()
        dist.all_gather_object(counts, len(weight))
    return ClassShard(weight, getattr(head, "class_start", 0), sum(counts), world())


def refuse_other_split(head: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    """Refuse a checkpoint with another number of classes for this rank.

    The number of classes of a rank depends on the number of ranks in the run that saved it.
    """
    own, saved = weight_of(head), state.get(f"{prefix}weight")
    if saved is not None and len(saved) != len(own):
        raise KDHooksError(
            f"arcface_torch: the checkpoint holds {len(saved)} classes for this rank, but this run "
            f"has {len(own)}: the checkpoint was saved with another number of ranks or of classes; "
            "resume with the same number of ranks, or start a new run"
        )
