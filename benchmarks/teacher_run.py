"""What a live teacher costs: run as people write it by hand, and as a recipe can have it run.

    python -m benchmarks.teacher_run --arcface-torch insightface/recognition/arcface_torch

The student alone, the teacher alone, and steps of both take turns on the same images. Without a
checkout of arcface_torch two networks of 3x3 convolutions stand in. Prints JSON: seconds, ratios
to the loop by hand, and how far the embeddings are from those in float32.
"""

import argparse
import copy
import importlib
import json
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Work, in_turns, setting
from benchmarks.networks import network, settle
from kdhooks import Distiller, Teacher

RUNS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"dtype": torch.bfloat16},
    "bfloat16, channels last": {"dtype": torch.bfloat16, "channels_last": True},
    "bfloat16, channels last, compiled": {
        "dtype": torch.bfloat16,
        "channels_last": True,
        "compile": True,
    },
}


def networks(options: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Student and teacher."""
    if not options.arcface_torch:
        return network(24, 2), network(64, 3)
    sys.path.insert(0, options.arcface_torch)
    get_model = importlib.import_module("backbones").get_model
    sizes = {"fp16": False, "num_features": 512}
    return get_model(options.student, **sizes), get_model(options.teacher, **sizes)


class ByHand:
    """The loop that people write: the teacher in float32 under no_grad, one cosine loss."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self.student, self.teacher = student, teacher
        self.optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)

    def step(self, images: Tensor) -> None:
        embedding = self.student(images)
        with torch.no_grad():
            target = self.teacher(images)
        self._update((1 - F.cosine_similarity(embedding, target)).mean())

    def in_bfloat16(self, images: Tensor) -> None:
        """As by hand, with one line about the teacher's precision."""
        embedding = self.student(images)
        with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16):
            target = self.teacher(images).float()
        self._update((1 - F.cosine_similarity(embedding, target)).mean())

    def alone(self, images: Tensor) -> None:
        self._update(self.student(images).pow(2).mean())

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


class ByRecipe(ByHand):
    def __init__(self, student: nn.Module, teacher: nn.Module, options: dict[str, Any]) -> None:
        super().__init__(student, teacher)
        self.run = Teacher(teacher, **options)
        self.kd = Distiller(student, self.run, ["fcd"])

    def step(self, images: Tensor) -> None:
        self.student(images)
        labels = images.new_zeros(len(images), dtype=torch.long)
        self._update(self.kd(images, labels)["fcd"])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(options.device)
    torch.manual_seed(0)
    student, teacher = (net.to(device) for net in networks(options))
    images = torch.rand(options.batch_size, 3, 112, 112, device=device) * 2 - 1
    settle(teacher, images)
    teacher.eval().requires_grad_(False)
    student.train()
    hand = ByHand(copy.deepcopy(student), teacher)
    works: dict[str, Work] = {"by hand": partial(hand.step, images)}
    works["by hand, bfloat16"] = partial(hand.in_bfloat16, images)
    works["student alone"] = partial(hand.alone, images)
    found: dict[str, Any] = {}
    with torch.no_grad():
        exact = teacher(images)
    for name in options.runs:
        recipe = ByRecipe(copy.deepcopy(student), copy.deepcopy(teacher), RUNS[name])
        works[f"kdhooks, {name}"] = partial(recipe.step, images)
        works[f"teacher alone, {name}"] = partial(recipe.run, images)
        near = F.cosine_similarity(recipe.run(images).embedding, exact)
        found[name] = {"least_cosine": near.min().item(), "mean_cosine": near.mean().item()}
    for work in works.values():
        work()
    return {"agreement": found, "times": in_turns(works, options.turns, device)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teacher_run", description=__doc__)
    add = parser.add_argument
    add("--arcface-torch", help="a checkout's folder recognition/arcface_torch")
    add("--student", default="mbf", help="a backbone of the checkout")
    add("--teacher", default="r50", help="likewise")
    add("--runs", nargs="+", default=list(RUNS)[:-1], choices=list(RUNS))
    add("--batch-size", type=int, default=16)
    add("--turns", type=int, default=7)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(json.dumps({"setting": setting(vars(options)), **measure(options)}, indent=1))


if __name__ == "__main__":
    main()
