"""`kdhooks taps` lists the submodules of a network that a recipe can tap, with their shapes.

    kdhooks taps r50 --trainer insightface/recognition/arcface_torch
    kdhooks taps vit_b --depth 3
    kdhooks taps my_package.networks:small --json

It creates the network with random weights, and runs it once in eval mode and once in training mode.
Shapes are without the batch. If a submodule cannot be tapped in training, a note gives the reason.

Instead of a path, a recipe may use a name from the last column, such as stage3 or embedding.
path:in is the input of a submodule. A pattern such as layer[1-4] or blocks.* names all submodules
that match.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdhooks.arguments import at_least
from kdhooks.backbones import known_stages
from kdhooks.errors import KDHooksError
from kdhooks.modes import evaluating
from kdhooks.points import Points
from kdhooks_integrations.arcface_torch.commands.networks import (
    add_network,
    add_trainer,
    enter_trainer,
    make,
)
from kdhooks_integrations.arcface_torch.commands.parsing import (
    add_json,
    make_parser,
    print_json,
    quiet_stdout,
)


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    enter_trainer(options.trainer)
    with quiet_stdout(options.json):
        network = make(options.network, options.embedding_size)
        points = listing(network, options.depth, tuple(options.input_shape))
    if options.json:
        found = [{**asdict(point), "shape": list(point.shape)} for point in points]
        shape = list(options.input_shape)
        print_json({"network": options.network, "input_shape": shape, "points": found})
        return 0
    rows = [("path", "shape", "")]
    rows += [(p.path or "(output)", str(p.shape), p.described()) for p in points]
    width, shapes = (max(len(row[column]) for row in rows) for column in (0, 1))
    for path, where, note in rows:
        print(f"{path:{width}}  {where:{shapes}}  {note}".rstrip())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("taps", __doc__)
    add_network(parser, "network", ("required", "512; a factory's own"))
    parser.add_argument(
        "--depth",
        type=at_least(1),
        default=1,
        metavar="N",
        help="number of levels of submodules to list; stages are listed at any depth (default: 1)",
    )
    parser.add_argument(
        "--input-shape",
        type=at_least(1),
        nargs=3,
        default=[3, 112, 112],
        metavar=("C", "H", "W"),
        help="channels, height and width of an image, the last two in pixels (default: 3 112 112)",
    )
    add_trainer(parser)
    add_json(parser)
    return parser


@dataclass
class Seen:
    """The output of a module in one forward of the network; if it runs twice, the first output."""

    output: Tensor
    version: int
    runs: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.output.shape[1:])


@dataclass(frozen=True)
class Point:
    """A submodule that a recipe can name."""

    path: str  # "" is the network's output
    shape: tuple[int, ...]  # without the batch
    stage: int | None  # counted from 1
    names: list[str]  # names that a recipe may use in place of the path
    notes: list[str]  # differences in training

    def described(self) -> str:
        return "; ".join([*self.names, *self.notes])


def listing(network: nn.Module, depth: int, input_shape: tuple[int, ...]) -> list[Point]:
    """Return all points in the order in which they run."""
    known = Points.of(network, known_stages(network), "")
    stages = known.stages
    paths = [
        name
        for name, _ in network.named_modules()
        if name in stages or name.count(".") < depth  # the embedding is ""
    ]
    try:
        images = torch.rand(2, *input_shape) * 2 - 1
        with evaluating(network), torch.no_grad():
            evaluated = observe(network, paths, images)
        network.train()
        trained = observe(network, paths, images)
    except Exception as error:  # raised by the network, mostly because of shapes
        raise KDHooksError(
            f"taps: the network must run on images of the shape {input_shape}; found "
            f"{type(error).__name__}: {error}; set --input-shape to that of the training images"
        ) from error
    return [
        Point(
            path,
            seen.shape,
            stages.index(path) + 1 if path in stages else None,
            known.names_of(path),
            _notes(seen, trained.get(path)),
        )
        for path, seen in evaluated.items()
    ]


def _notes(seen: Seen, trained: Seen | None) -> list[str]:
    if trained is None:
        return ["does not run in training"]
    notes = []
    if trained.shape != seen.shape:
        notes.append(f"{trained.shape} in training")
    if trained.runs > 1:
        notes.append(f"runs {trained.runs} times; name one call, such as path@{trained.runs}")
    if not trained.output.requires_grad:
        notes.append("no gradient: inside a checkpointed block, or frozen")
    if trained.output._version != trained.version:
        notes.append("overwritten in place by a later module")
    return notes


def observe(network: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Seen]:
    """Return the outputs that are tensors of the modules at these paths, in their order."""
    found: dict[str, Seen] = {}

    def watch(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: object) -> None:
            if path in found:
                found[path].runs += 1
            elif isinstance(output, Tensor):
                found[path] = Seen(output, output._version)

        return hook

    handles = [network.get_submodule(p).register_forward_hook(watch(p)) for p in paths]
    try:
        network(images)
    except Exception as error:
        raise KDHooksError(
            f"taps: the network must run on images of the shape {tuple(images.shape[1:])}; it "
            f"raises {type(error).__name__}: {error}; set --input-shape to that of its images"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return found
