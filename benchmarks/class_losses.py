"""Measures losses over all classes, computed in chunks and as papers write them.

    python -m benchmarks.class_losses --threads 1 --out bench-out

The two forms take turns. Writes class_losses.json and class_losses.png: seconds of forward and
backward, and peak memory, including the resulting gradients.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.command import command, start, write
from benchmarks.measuring import in_turns, judged_by, peak_bytes, summaries
from benchmarks.plain_losses import GROUP, Loss, plain_of
from kdhooks import ClassShard, Model
from kdhooks.arguments import at_least
from kdhooks_plugins.adadistill import AdaDistill
from kdhooks_plugins.gkd import GKD
from kdhooks_plugins.kd import KD
from kdhooks_plugins.margindistillation import MarginDistillation
from kdhooks_plugins.proxylesskd import ProxylessKD
from kdhooks_plugins.thkd import THKD

METHODS: dict[str, Any] = {
    "kd": KD(standardize=False),
    "gkd": GKD(tau=1.0, largest=GROUP, margin=0.0, standardize=False),
    "thkd": THKD(),
    "proxylesskd": ProxylessKD(head="own"),
    "margindistillation": MarginDistillation(),
    "adadistill": AdaDistill(),
}
COMPARE = ("kd", "gkd")  # methods that train the student's own class rows


def ours_of(name: str) -> Loss:
    """Return the method's loss as a function with the arguments of the plain forms."""
    compares = name in COMPARE
    models = () if compares else (Model(None, 1), Model(None, 1))
    loss = METHODS[name].classifier_share(*models).loss

    def run(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
        heads = [ClassShard(rows, 0, len(rows)) for rows in (theirs, ours)]
        value: Tensor = loss(s, t, labels, *heads[: 2 if compares else 1])[0]
        return value

    return run


STYLES = {"plain": "--", "kdhooks": "-"}


def measure(options: argparse.Namespace, name: str, classes: int) -> dict[str, Any]:
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    theirs = normal(classes, options.dim)
    ours = normal(classes, options.dim) if name in COMPARE else theirs
    labels = torch.randperm(classes, generator=generator, device=device)[: options.batch_size]
    teacher = theirs[labels] + normal(options.batch_size, options.dim)
    student = ours[labels] + normal(options.batch_size, options.dim)
    trained = (student, ours) if name in COMPARE else (student,)
    for tensor in trained:
        tensor.requires_grad_()

    def step(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(student, teacher, labels, theirs, ours)
        return value.detach(), *torch.autograd.grad(value, trained)

    forms = {"plain": plain_of(name), "kdhooks": ours_of(name)}
    works = {form: partial(step, forms[form]) for form in options.forms}
    for work in works.values():
        work()
    found: dict[str, Any] = {
        "classes": classes,
        "bytes": {form: peak_bytes(work, device) for form, work in works.items()},
        "gradient_bytes": sum(tensor.nbytes for tensor in trained),
        "times": summaries(in_turns(works, options.turns, device)),
    }
    if len(works) == 2:
        found["difference"] = _difference(*(work() for work in works.values()))
    return found


def _difference(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference in the value and gradients, relative to the largest number."""
    gaps = [
        ((a - b).abs().max() / a.abs().max()).item() for a, b in zip(expected, found, strict=True)
    ]
    return max(gaps)


def seconds_of(one: dict[str, Any], form: str, kind: str) -> float:
    found: float = one["times"][form][f"{kind}_seconds"]["median"]
    return found


def picture(measured: dict[str, list[dict[str, Any]]], kind: str) -> Figure:
    figure = Figure(figsize=(10, 4), layout="constrained")
    times, memory = figure.subplots(1, 2)
    for number, (name, found) in enumerate(measured.items()):
        classes = [one["classes"] for one in found]
        for form in found[0]["times"]:
            style = {"color": f"C{number}", "marker": ".", "linestyle": STYLES[form]}
            seconds = [seconds_of(one, form, kind) for one in found]
            times.plot(classes, seconds, label=f"{name}, {form}", **style)
            memory.plot(classes, [one["bytes"][form] / 1e9 for one in found], **style)
    for axis, what in ((times, f"{kind} seconds"), (memory, "memory at its peak, GB")):
        axis.set(xlabel="classes", ylabel=what, xscale="log", yscale="log")
    times.legend(fontsize=7)
    return figure


def exponent(found: Sequence[dict[str, Any]], form: str, kind: str) -> float:
    """Return the exponent with which seconds grow with classes; 1 is linear."""
    classes = np.log([one["classes"] for one in found])
    seconds = np.log([seconds_of(one, form, kind) for one in found])
    return float(np.polyfit(classes, seconds, 1)[0])


def _line(one: dict[str, Any], kind: str) -> str:
    held = one["bytes"]
    cells = [
        f"{form} {seconds_of(one, form, kind):.3f} s, {held[form] / 1e9:.3f} GB"
        for form in one["times"]
    ]
    return f"{one['classes']}: {'; '.join(cells)}"


def main() -> None:
    parser = command("class_losses", __doc__, turns=7)
    add = parser.add_argument
    add("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    add("--classes", type=at_least(1), nargs="+", default=[20_000, 50_000, 100_000, 200_000])
    add("--forms", nargs="+", default=list(STYLES), choices=list(STYLES))
    add("--batch-size", type=at_least(1), default=128)
    add("--dim", type=at_least(1), default=512)
    options = start(parser)
    kind = judged_by(options.device)
    measured: dict[str, Any] = {}
    for name in options.methods:
        measured[name] = [measure(options, name, classes) for classes in options.classes]
        for one in measured[name]:
            print(name, _line(one, kind))
    last = options.forms[-1]
    exponents = {
        name: exponent(found, last, kind) for name, found in measured.items() if len(found) > 1
    }
    record = {"exponents": exponents, "measured": measured}
    write(options, "class_losses", record, picture(measured, kind))


if __name__ == "__main__":
    main()
