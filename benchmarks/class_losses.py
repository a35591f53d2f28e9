"""What losses over all classes cost by chunks, and what they cost written down as in a paper.

    python -m benchmarks.class_losses --threads 1 --out bench-out

The two take turns. Writes class_losses.json and class_losses.png: seconds of forward and backward,
and the most memory that they held, with the gradients that are their result.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.command import command, start, write
from benchmarks.measuring import in_turns, judged_by, peak_bytes, summaries
from kdhooks import ClassShard, Model
from kdhooks_plugins.gkd import GKD
from kdhooks_plugins.kd import KD
from kdhooks_plugins.proxylesskd import ProxylessKD
from kdhooks_plugins.thkd import THKD

T, SCALE, MARGIN, GROUP = 4.0, 64.0, 0.5, 10_000
COMPARE = ("kd", "gkd")  # where the student's own rows are trained
Loss: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""student (b d), teacher (b d), labels (b), teacher's rows (c d), student's own rows (c d) -> ()"""


def cosines(x: Tensor, rows: Tensor) -> Tensor:
    return F.normalize(x) @ F.normalize(rows).T


def plain_kd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    log_s = F.log_softmax(SCALE / T * cosines(s, ours), dim=1)
    p_t = F.softmax(SCALE / T * cosines(t, theirs), dim=1)
    return T**2 * F.kl_div(log_s, p_t, reduction="batchmean")


def plain_thkd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    return plain_kd(s, t, labels, theirs, theirs)


def plain_arcface(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    scores = cosines(s, theirs)
    own = scores.gather(1, labels[:, None]).clamp(-1 + 1e-7, 1 - 1e-7)
    scores = scores.scatter(1, labels[:, None], torch.cos(torch.acos(own) + MARGIN))
    return F.cross_entropy(SCALE * scores, labels)


def plain_gkd(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
    z_s, z_t = SCALE * cosines(s, ours), SCALE * cosines(t, theirs)
    first = z_s.detach().scatter(1, labels[:, None], torch.inf)
    chosen = first.topk(min(GROUP, len(ours)), dim=1).indices
    log_s, log_t = F.log_softmax(z_s / T, dim=1), F.log_softmax(z_t / T, dim=1)
    in_s, in_t = log_s.gather(1, chosen), log_t.gather(1, chosen)
    share_s, share_t = in_s.logsumexp(dim=1), in_t.logsumexp(dim=1)
    log_p, log_q = in_t - share_t[:, None], in_s - share_s[:, None]
    primary = (log_p.exp() * (log_p - log_q)).sum(dim=1)
    rest_s, rest_t = torch.log(-torch.expm1(share_s)), torch.log(-torch.expm1(share_t))
    binary = share_t.exp() * (share_t - share_s) + rest_t.exp() * (rest_t - rest_s)
    return T**2 * (8 * primary + binary).mean()


def ours_of(name: str) -> Loss:
    """The method's loss, called like the plain forms."""
    compare: dict[str, Any] = {"kd": KD(), "gkd": GKD(tau=1.0, largest=GROUP, margin=0.0)}
    if name in COMPARE:
        loss = compare[name].classifier_share().loss
    else:
        method = THKD() if name == "thkd" else ProxylessKD(head="own")
        loss = method.classifier_share(Model(None, 1), Model(None, 1)).loss

    def run(s: Tensor, t: Tensor, labels: Tensor, theirs: Tensor, ours: Tensor) -> Tensor:
        heads = [ClassShard(rows, 0, len(rows)) for rows in (theirs, ours)]
        value: Tensor = loss(s, t, labels, *heads[: 2 if name in COMPARE else 1])[0]
        return value

    return run


STYLES = {"plain": "--", "kdhooks": "-"}
PLAIN: dict[str, Loss] = {
    "kd": plain_kd,
    "gkd": plain_gkd,
    "thkd": plain_thkd,
    "proxylesskd": plain_arcface,
}


def measure(options: argparse.Namespace, name: str, classes: int) -> dict[str, Any]:
    device = options.device
    generator = torch.Generator(device).manual_seed(0)
    normal = partial(torch.randn, generator=generator, device=device)
    theirs = normal(classes, options.dim)
    ours = normal(classes, options.dim) if name in COMPARE else theirs
    labels = torch.randint(classes, (options.batch_size,), generator=generator, device=device)
    teacher = theirs[labels] + normal(options.batch_size, options.dim)
    student = ours[labels] + normal(options.batch_size, options.dim)
    trained = (student, ours) if name in COMPARE else (student,)
    for tensor in trained:
        tensor.requires_grad_()

    def step(loss: Loss) -> tuple[Tensor, ...]:
        value = loss(student, teacher, labels, theirs, ours)
        return value.detach(), *torch.autograd.grad(value, trained)

    forms = {"plain": PLAIN[name], "kdhooks": ours_of(name)}
    works = {form: partial(step, forms[form]) for form in options.forms}
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
    """The largest difference, of the largest number, in the value and each gradient."""
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
    """To which seconds grow with classes; 1 is linear."""
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
    add("--methods", nargs="+", default=list(PLAIN), choices=list(PLAIN))
    add("--classes", type=int, nargs="+", default=[20_000, 50_000, 100_000, 200_000])
    add("--forms", nargs="+", default=list(STYLES), choices=list(STYLES))
    add("--batch-size", type=int, default=128)
    add("--dim", type=int, default=512)
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
