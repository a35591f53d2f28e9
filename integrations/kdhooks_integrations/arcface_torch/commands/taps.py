"""`kdhooks taps`: the submodules of a network that a recipe can tap, and what they put out.

    kdhooks taps r50 --trainer insightface/recognition/arcface_torch
    kdhooks taps vit_b --depth 3
    kdhooks taps my_package.networks:small

The network is made with random weights and runs once in evaluation and once in training. Shapes are
without the batch. What can't be tapped in training says why.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdhooks.arguments import at_least
from kdhooks.errors import KDHooksError
from kdhooks.taps import evaluating
from kdhooks_integrations.arcface_torch import Backbones
from kdhooks_integrations.arcface_torch.commands.networks import add_options, enter_trainer, make
from kdhooks_integrations.arcface_torch.commands.parsing import make_parser


def main(argv: Sequence[str]) -> int:
    parser = make_parser("taps", __doc__)
    add_options(parser, "network")
    parser.add_argument(
        "--depth", type=at_least(0), default=1, help="of submodules; stages show anyhow"
    )
    parser.add_argument("--input-shape", type=at_least(1), nargs=3, default=[3, 112, 112])
    options = parser.parse_args(argv)
    enter_trainer(options.trainer)
    network = make(options.network, options.embedding_size)
    rows = [("path", "shape", ""), *listing(network, options.depth, tuple(options.input_shape))]
    width, shapes = (max(len(row[column]) for row in rows) for column in (0, 1))
    for path, shape, note in rows:
        print(f"{path:{width}}  {shape:{shapes}}  {note}".rstrip())
    return 0


@dataclass
class Seen:
    """What a module put out in one forward of the network: the first time, where it runs twice."""

    output: Tensor
    version: int
    runs: int = 1

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.output.shape[1:])


def listing(
    network: nn.Module, depth: int, input_shape: tuple[int, ...]
) -> list[tuple[str, str, str]]:
    """Path, shape and note of each point, in the order in which they run."""
    stages = Backbones().model_stages(network) or []
    paths = [
        name
        for name, _ in network.named_modules()
        if name in stages or name.count(".") < depth  # "" is the embedding
    ]
    images = torch.rand(2, *input_shape) * 2 - 1
    with evaluating(network), torch.no_grad():
        evaluated = observe(network, paths, images)
    network.train()
    trained = observe(network, paths, images)
    return [
        (path or "(output)", str(seen.shape), _note(path, seen, trained.get(path), stages))
        for path, seen in evaluated.items()
    ]


def _note(path: str, seen: Seen, trained: Seen | None, stages: Sequence[str]) -> str:
    notes = []
    if path == "":
        notes.append("embedding")
    if path in stages:
        notes.append(f"stage {stages.index(path) + 1}")
    if trained is None:
        return "; ".join([*notes, "does not run in training"])
    if trained.shape != seen.shape:
        notes.append(f"{trained.shape} in training")
    if trained.runs > 1:
        notes.append(f"runs {trained.runs} times, the last one counts")
    if not trained.output.requires_grad:
        notes.append("no gradient: inside a checkpointed block, or frozen")
    if trained.output._version != trained.version:
        notes.append("overwritten in place by what follows")
    return "; ".join(notes)


def observe(network: nn.Module, paths: Sequence[str], images: Tensor) -> dict[str, Seen]:
    """The tensors that the modules at these paths put out, in their order."""
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
