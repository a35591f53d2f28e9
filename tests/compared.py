"""Runs of a method that compares the student's classifier with the teacher's: in one process, and
with the classes split over ranks.
"""

import torch
from torch import Tensor, nn

from kdhooks import ClassifierShare, ClassShard
from kdhooks.declarations import Step
from tests.maps import normal
from tests.ranks import Results, group, here, mean_gradients, mine


def whole(rows: Tensor) -> ClassShard:
    return ClassShard(rows, 0, len(rows))


def scenario(tap: ClassifierShare, split: tuple[int, ...], labels: Tensor) -> Results:
    """Return results of one step. DDP averages the student's gradient, but not that of a shard."""
    classes, b = sum(split), len(labels)
    student = nn.Linear(5, 4).double()
    with torch.no_grad():
        student.weight.copy_(normal(20, 4, 5))
        student.bias.copy_(normal(21, 4))
    head = _shard(normal(22, classes, 4), split)
    step = Step(
        student=student(mine(normal(23, b, 5))),
        student_features={},
        teacher=mine(normal(24, b, 6)),
        teacher_features={},
        labels=mine(labels),
        parameters={},
        classifier=_shard(normal(25, classes, 6), split),
        head=head,
    )
    loss, notes = tap.loss(*tap.arguments(step))
    loss.backward()
    assert head.weight.grad is not None
    same = {"loss": loss.detach(), "notes": notes, "gradients": mean_gradients(student)}
    return {"same": same, "head": head.weight.grad}


def _shard(rows: Tensor, split: tuple[int, ...]) -> ClassShard:
    rank, size = here()
    parts = split if size == len(split) else (sum(split),)
    part = rows.split(parts)[rank].clone().requires_grad_()
    return ClassShard(part, sum(parts[:rank]), sum(split), group())
