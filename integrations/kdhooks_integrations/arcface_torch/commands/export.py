"""`kdhooks export`: the trained student alone, as the trainer's model.pt and as ONNX.

    kdhooks export work_dirs/x/model.pt --network r50 --out student
    kdhooks export work_dirs/x/checkpoint_gpu_0.pt --network mbf --embedding-size 256 --out student

Every weight of the file must be one of the network's, and the other way round, so that nothing of
the distillation is left. The ONNX file must give the embeddings that torch gives, and be what
insightface takes for a recognition model; it can lie in a pack of insightface's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, listed
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.graphs import dims, image_inputs, read_graph
from kdhooks.teacher.checkpoints import load_checkpoint, load_strictly, sha256
from kdhooks_integrations.arcface_torch.commands.networks import add_options, enter_trainer, make
from kdhooks_integrations.arcface_torch.commands.parsing import make_parser


def main(argv: Sequence[str]) -> int:
    parser = make_parser("export", __doc__)
    parser.add_argument("checkpoint", help="model.pt or checkpoint_gpu_0.pt of the trainer")
    add_options(parser, "--network")
    parser.add_argument("--out", default="export", help="folder for model.pt and model.onnx")
    options = parser.parse_args(argv)
    enter_trainer(options.trainer)
    out = Path(options.out).expanduser()
    student = load_student(options.checkpoint, options.network, options.embedding_size)
    weights, graph = out / "model.pt", out / "model.onnx"
    if weights.exists() and weights.samefile(options.checkpoint):
        raise KDHooksError(f"export: '{weights}' is the file to be read; name another --out")
    out.mkdir(parents=True, exist_ok=True)
    state = student.state_dict()
    torch.save(state, weights)
    print(f"{weights}  sha256 {sha256(weights)}")
    print(f"  {len(state)} keys, each of them {options.network}'s: nothing of the distillation")
    difference = export_onnx(student, graph)
    check_for_insightface(graph)
    print(f"{graph}  sha256 {sha256(graph)}")
    print(f"  differs from torch by {difference:.1e} at most; insightface's for recognition")
    return 0


def load_student(checkpoint: str, network: str, width: int | None = None) -> nn.Module:
    """The network with the weights of the file, all of them, on the CPU."""
    state = load_checkpoint(checkpoint, "student")
    if width is None and ":" not in network:
        width = _width(state)
    student = make(network, width)
    foreign = sorted(state.keys() - student.state_dict().keys())
    if foreign:
        raise KDHooksError(
            f"student checkpoint: '{checkpoint}' must hold the weights of {network} and nothing "
            f"else; found besides {len(foreign)} keys like {listed(foreign[:4])}; name the network "
            "that was trained"
        )
    return load_strictly(student, state, checkpoint, "student").eval()


def _width(state: Mapping[str, Tensor]) -> int | None:
    """Of the embedding: all of the trainer's networks end in a BatchNorm1d of it."""
    widths = [len(tensor) for tensor in state.values() if tensor.ndim == 1]
    return widths[-1] if widths else None


def check_for_insightface(path: Path) -> None:
    """What its model zoo goes by: the shapes, and the names of the first eight nodes.

    A graph that begins with a subtraction and a multiplication counts as one that scales its
    pixels itself; all others get (pixel - 127.5) / 127.5, as the trainer's images are.
    """
    graph = read_graph(path).graph
    takes, gives = [dims(v) for v in image_inputs(graph)], [dims(v) for v in graph.output]
    square = len(takes) == 1 and len(takes[0]) == 4 and takes[0][2] == takes[0][3]
    side = (takes[0][2] or 0) if square else 0
    if side < 112 or side % 16 or side == 192 or len(gives) != 1 or len(gives[0]) != 2:
        raise KDHooksError(
            "insightface takes a file for a recognition model that maps one square image of 112 "
            f"pixels or more, a multiple of 16, to one embedding; found {takes} -> {gives}"
        )
    names = [node.name for node in graph.node[:8]]
    scales = any(n.startswith(("Sub", "_minus")) for n in names)
    if scales and any(n.startswith(("Mul", "_mul")) for n in names):
        raise KDHooksError(
            "insightface would take this network for one that scales its pixels itself, by the "
            f"names of its first nodes: {listed(names)}; take the scaling out of the network"
        )
