"""The step with torchdistill: by its hooks alone, and by its DistillationBox."""

# Nothing but this measurement needs the package.
# pyright: reportMissingImports=false

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchdistill.core.distillation import DistillationBox
from torchdistill.core.forward_hook import ForwardHookManager
from torchdistill.losses.mid_level import SimpleLossWrapper

from benchmarks.overhead.ways import TAPPED, Pair, Step, cosine_gap, map_gap


def by_hooks(pair: Pair) -> Step:
    """Uses its hooks to record outputs; the user runs the teacher and computes the losses."""
    managers = [ForwardHookManager(next(pair.head.parameters()).device) for _ in range(2)]
    for manager, model in zip(managers, (pair.student, pair.teacher), strict=True):
        for name in (*TAPPED, "embedding"):
            manager.add_hook(model, name, requires_input=False)

    def step(images: Tensor, labels: Tensor) -> None:
        embedding = pair.student(images)
        with torch.no_grad():
            pair.teacher(images)
        loss = pair.task_loss(embedding, labels)
        ours, theirs = (manager.pop_io_dict() for manager in managers)
        maps = [[side[name]["output"] for name in TAPPED] for side in (ours, theirs)]
        loss = loss + map_gap(*maps)
        loss = loss + cosine_gap(ours["embedding"]["output"], theirs["embedding"]["output"])
        loss.backward()

    return step


class _Cosine(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(b d), (b d) -> ()."""
        return cosine_gap(student, teacher)


def by_box(pair: Pair) -> Step:
    """Uses its whole loop body, `forward_process`.

    The head is a part of the student, as its YAML requires.
    """
    student = nn.Sequential(OrderedDict(network=pair.student, head=pair.head))
    paths = [f"network.{name}" for name in (*TAPPED, "embedding")]
    losses = [*(nn.MSELoss() for _ in TAPPED), _Cosine()]
    terms = {"labels": _term(nn.CrossEntropyLoss(), ".", None)}
    for path, loss in zip(paths, losses, strict=True):
        terms[path] = _term(loss, path, path.removeprefix("network."))
    box = DistillationBox(
        pair.teacher,
        student,
        {},
        {
            "num_epochs": 1,
            "teacher": {
                "forward_hook": {"output": [*TAPPED, "embedding"]},
                "forward_proc": "forward_batch_only",
                "requires_grad": False,
            },
            "student": {"forward_hook": {"output": paths}, "forward_proc": "forward_batch_only"},
            "criterion": {
                "key": "WeightedSumLoss",
                "kwargs": {"sub_terms": terms},
                "func2extract_model_loss": "extract_model_loss_dict",
            },
        },
        next(pair.head.parameters()).device,
        None,
        False,
        1,
    )

    def step(images: Tensor, labels: Tensor) -> None:
        box.forward_process(images, labels).backward()

    return step


def _term(loss: nn.Module, student: str, teacher: str | None) -> dict[str, object]:
    """Return a term as a YAML file describes it; without a teacher's path it gets the labels."""
    target: dict[str, object] = {"uses_label": True}
    if teacher is not None:
        target = {"is_from_teacher": True, "module_path": teacher, "io": "output"}
    source = {"is_from_teacher": False, "module_path": student, "io": "output"}
    return {"criterion": SimpleLossWrapper(loss, input=source, target=target), "weight": 1.0}
