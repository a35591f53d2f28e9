"""Measure how much time and memory a distillation library adds to a training step.

    python -m benchmarks.overhead --threads 1 --out bench-out

The same step is written by hand, with kdhooks, and with torchdistill and modelopt if they are
installed. All run in one process and take turns, so that other work on the machine slows all of
them alike; a ratio compares times of the same turn. Writes overhead.json and overhead.png. With
--profile it measures the parts of kdhooks' step instead, and writes overhead_profile.json and a
trace for each size.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.command import command, start, write
from benchmarks.measuring import in_turns, peak_bytes, timed
from benchmarks.overhead.measures import calls, tensor_bytes
from benchmarks.overhead.parts import parts_of_a_step
from benchmarks.overhead.report import picture, summary, table
from benchmarks.overhead.ways import CLASSES, Pair, Step, alone, by_hand, distilled, material
from benchmarks.overhead.ways import telling as without_hooks
from kdhooks.arguments import at_least

PEERS = {
    "torchdistill, hooks": ("torchdistill", "by_hooks"),
    "torchdistill, box": ("torchdistill", "by_box"),
    "modelopt": ("modelopt", "converted"),
}
COMMANDS = {
    "torchdistill": "pip install torchdistill==1.1.5, and the torchvision that fits this torch",
    "modelopt": "pip install nvidia-modelopt==0.47.0 requests scipy omegaconf huggingface_hub",
}
TURN = 0.1  # seconds that the student alone should take in a turn: several steps, if they are short


class Size(NamedTuple):
    width: int  # of the first stage, on both sides
    blocks: int  # of a stage of the student; the teacher has twice as many
    pixels: int
    batch: int


SIZES = [Size(4, 1, 32, 8), Size(32, 2, 112, 16)]


def ways(size: Size) -> tuple[dict[str, Callable[[Pair], Step]], dict[str, str]]:
    """Return the ways that can run here, and for each other way the reason why it can't."""
    found: dict[str, Callable[[Pair], Step]] = {
        "student alone": alone,
        "without hooks": without_hooks,
        "by hand": by_hand,
        "kdhooks": lambda pair: distilled(pair, size.pixels)[0],
    }
    left_out: dict[str, str] = {}
    for name, (peer, function) in PEERS.items():
        try:
            found[name] = getattr(import_module(f"benchmarks.overhead.with_{peer}"), function)
        except Exception as error:  # a torchvision of another build raises what it likes
            left_out[peer] = f"{error}; {COMMANDS[peer]}"
    return found, left_out


def batch_of(size: Size, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images = torch.rand(size.batch, 3, size.pixels, size.pixels, generator=generator) * 2 - 1
    return images.to(device), torch.randint(CLASSES, (size.batch,), generator=generator).to(device)


def measure(size: Size, turns: int, device: torch.device) -> dict[str, Any]:
    """Return each way's counts, bytes and seconds."""
    models = material(size.width, size.blocks, size.pixels)
    images, labels = batch_of(size, device)
    found, left_out = ways(size)
    pairs = {name: Pair(*models, device) for name in found}
    work = {name: partial(way(pairs[name]), images, labels) for name, way in found.items()}
    for name, step in work.items():
        step()
        if name != "student alone":
            check_gradient(name, pairs[name], pairs["without hooks"])
    counted = {name: costs(step, pairs[name], images) for name, step in work.items()}
    steps = math.ceil(TURN / max(timed(work["student alone"], device)[0], 1e-6))
    works = {name: partial(repeat, step, steps) for name, step in work.items()}
    seconds = {name: spent / steps for name, spent in in_turns(works, turns, device).items()}
    zero = counted["without hooks"]
    rows = {
        name: {
            **counted[name],
            "extra_python_calls": counted[name]["python_calls"] - zero["python_calls"],
            "extra_c_calls": counted[name]["c_calls"] - zero["c_calls"],
            **summary(seconds, name),
        }
        for name in work
    }
    return {"size": size._asdict(), "steps_a_turn": steps, "rows": rows, "left_out": left_out}


def repeat(step: Callable[[], None], times: int) -> None:
    for _ in range(times):
        step()


def check_gradient(name: str, found: Pair, wanted: Pair) -> None:
    """Check that the gradients of two ways have the same direction.

    Their lengths differ with the weights of the losses, since those of modelopt must sum to 1.
    """
    directions = []
    for pair in (found, wanted):
        gradients = [p.grad.flatten() for p in pair.trained if p.grad is not None]
        directions.append(torch.nn.functional.normalize(torch.cat(gradients), dim=0))
    gap = float((directions[0] - directions[1]).norm())
    assert gap < 1e-3, f"{name} computes another gradient; its direction differs by {gap}"


def costs(step: Callable[[], None], pair: Pair, images: Tensor) -> dict[str, int]:
    """Return the counts and bytes of a step in its steady state, and of an evaluation after it."""

    def evaluate() -> None:
        pair.student.eval()
        with torch.no_grad():
            pair.student(images)

    repeat(step, 2)
    counted = calls(step)
    tensors = tensor_bytes(step)
    found = {
        "python_calls": counted.python,
        "c_calls": counted.c,
        "peak_bytes": tensors.peak,
        "held_bytes": tensors.held,
        "held_bytes_after_evaluation": tensor_bytes(evaluate).held,
    }
    pair.student.train()
    step()  # what the evaluation left is overwritten
    if images.is_cuda:
        found["allocator_peak_bytes"] = peak_bytes(step, images.device)
    return found


def main() -> None:
    parser = command("overhead", __doc__, turns=40)
    add = parser.add_argument
    names = ("WIDTH", "BLOCKS", "PIXELS", "BATCH")
    add("--size", type=at_least(1), nargs=4, metavar=names, action="append", help="may be repeated")
    add("--profile", action="store_true", help="where the time of kdhooks' step goes, instead")
    options = start(parser)
    device = options.device
    sizes = [Size(*size) for size in options.size] if options.size else SIZES
    peers = versions({"torchdistill": "torchdistill", "modelopt": "nvidia-modelopt"})
    if options.profile:
        parts = [
            parts_of_a_step(
                Pair(*material(size.width, size.blocks, size.pixels), device),
                *batch_of(size, device),
                options.out / f"overhead_trace{number}.json",
            )
            for number, size in enumerate(sizes)
        ]
        write(options, "overhead_profile", {"peers": peers, "sizes": parts})
        return
    measured = [measure(size, options.turns, device) for size in sizes]
    print("\n\n".join(table(size) for size in measured))
    write(options, "overhead", {"peers": peers, "sizes": measured}, picture(measured))


def versions(packages: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, package in packages.items():
        try:
            found[name] = version(package)
        except ImportError:
            continue
    return found


if __name__ == "__main__":
    main()
