"""`kdhooks export` writes the trained student as the trainer's model.pt and as an ONNX file.

    kdhooks export work_dirs/x/model.pt --network r50 --out student
    kdhooks export work_dirs/x/checkpoint_gpu_0.pt --network mbf --embedding-size 256 --out student

The weights in the checkpoint must be exactly those of the network, so nothing of the distillation
is left. The ONNX file must return the same embeddings as torch, and must be one that insightface
recognises as a recognition model, so it can be part of an insightface pack.

    kdhooks export model.pt --network r50 --int8 --calibrate faces.zip --pairs pairs.txt
    kdhooks export model.pt --network r50 --float16 --data faces.zip

These commands also write smaller files for phones, model_int8.onnx and model_float16.onnx. Their
embeddings are compared with those of model.onnx, on faces that were not used for calibration. If
they differ too much, or if anything else fails, nothing is written.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch import nn

from kdhooks.drafts import drafts
from kdhooks.errors import KDHooksError, listed
from kdhooks.factories import is_factory_name
from kdhooks.onnx.export import export_onnx
from kdhooks.onnx.graphs import dims, image_inputs, read_graph
from kdhooks.teacher.checkpoints import (
    load_checkpoint,
    load_strictly,
    refuse_untrained,
    sha256,
)
from kdhooks.tensor_files import user_path, write_tensors
from kdhooks_integrations.arcface_torch.commands.checked_faces import choose_faces
from kdhooks_integrations.arcface_torch.commands.networks import (
    add_network,
    add_trainer,
    add_weights,
    enter_trainer,
    make,
)
from kdhooks_integrations.arcface_torch.commands.parsing import make_parser, path
from kdhooks_integrations.arcface_torch.commands.precision import (
    add_precision,
    check_precision,
    write_forms,
)
from kdhooks_integrations.arcface_torch.networks import embedding_width

FORMS = ("model_int8.onnx", "model_float16.onnx")


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    enter_trainer(options.trainer)
    out: Path = options.out
    weights, graph = out / "model.pt", out / "model.onnx"
    check_out(out, user_path(options.checkpoint, "export"))
    check_precision(options)
    chosen = choose_faces(options) if options.int8 or options.float16 else None
    network, width = options.network, options.embedding_size
    student = load_student(options.checkpoint, network, width, options.weights)
    with made_folder(out), drafts(out) as draft:
        state = student.state_dict()
        write_tensors(state, draft / weights.name, "export")
        difference = export_onnx(student, draft / graph.name)
        check_for_insightface(draft / graph.name)
        kept = [] if chosen is None else write_forms(options, chosen, draft)
        for form in kept:
            check_for_insightface(draft / form.name)
    print(f"{weights}  sha256 {sha256(weights)}")
    print(f"  {len(state)} keys, exactly those of {network}: nothing of the distillation")
    print(f"{graph}  sha256 {sha256(graph)}")
    print(
        f"  differs from torch by at most {difference:.1e}; insightface accepts it for recognition"
    )
    for form in kept:
        print(f"{out / form.name}  sha256 {sha256(out / form.name)}")
        for line in form.lines:
            print(f"  {line}")
    for name in FORMS:
        if name not in [form.name for form in kept] and (out / name).exists():
            print(f"{out / name}  is from an earlier export, and was not written again")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("export", __doc__)
    parser.add_argument(
        "checkpoint", help="model.pt or checkpoint_gpu_0.pt of the trainer (required)"
    )
    add_network(
        parser, "--network", ("required", "the checkpoint's; a factory's own"), required=True
    )
    add_weights(parser)
    parser.add_argument(
        "--out",
        type=path,
        default=Path("export"),
        metavar="FOLDER",
        help="output folder for model.pt, model.onnx and the smaller files (default: export)",
    )
    add_precision(parser)
    add_trainer(parser)
    return parser


def check_out(out: Path, checkpoint: Path) -> None:
    """Refuse an unusable output folder before the network is loaded."""
    if out.suffix in (".pt", ".pth", ".onnx") or out.is_file():
        raise KDHooksError(
            f"export: --out must be a folder, where model.pt and model.onnx are written; found "
            f"'{out}'; name its folder"
        )
    for file in (out / name for name in ("model.pt", "model.onnx", *FORMS)):
        if file.is_dir():
            raise KDHooksError(f"export: '{file}' is a folder; remove it, or name another --out")
        if file.exists() and checkpoint.exists() and file.samefile(checkpoint):
            raise KDHooksError(f"export: '{file}' is the checkpoint itself; name another --out")


@contextmanager
def made_folder(path: Path) -> Iterator[None]:
    """Create a folder with its parents; after an error, remove those of them that are empty."""
    try:
        made = [folder for folder in (path, *path.parents) if not folder.exists()]
        path.mkdir(parents=True, exist_ok=True)
        try:
            yield
        except BaseException:
            with suppress(OSError):
                for folder in made:
                    folder.rmdir()
            raise
    except OSError as error:
        raise KDHooksError(
            f"export: --out '{path}' can't be written ({error.strerror}); name another folder"
        ) from error


def load_student(
    checkpoint: str,
    network: str,
    width: int | None = None,
    weights: str = "",
    fp16: bool | None = None,
) -> nn.Module:
    """Return the network with all weights of the checkpoint, on the CPU."""
    content = load_checkpoint(checkpoint, "student")
    if width is None and not is_factory_name(network):
        width = embedding_width(content.largest())
    student = load_strictly(make(network, width, fp16), content, weights).eval()
    refuse_untrained(student, "student")
    return student


def check_for_insightface(path: Path) -> None:
    """Check what insightface's model zoo checks: shapes, and the names of the first eight nodes.

    insightface assumes that a graph that starts with a subtraction and a multiplication scales its
    pixels itself. All others get (pixel - 127.5) / 127.5, like the trainer's images.
    """
    graph = read_graph(path).graph
    takes, gives = [dims(v) for v in image_inputs(graph)], [dims(v) for v in graph.output]
    square = len(takes) == 1 and len(takes[0]) == 4 and takes[0][2] == takes[0][3]
    side = (takes[0][2] or 0) if square else 0
    if side < 112 or side % 16 or side == 192 or len(gives) != 1 or len(gives[0]) != 2:
        raise KDHooksError(
            "insightface accepts a recognition model that maps one square image, whose side is a "
            f"multiple of 16 and at least 112 pixels, to one embedding; found {takes} -> {gives}"
        )
    names = [node.name for node in graph.node[:8]]
    scales = any(n.startswith(("Sub", "_minus")) for n in names)
    if scales and any(n.startswith(("Mul", "_mul")) for n in names):
        raise KDHooksError(
            "insightface would assume that this network scales its pixels itself, because of the "
            f"names of its first nodes: {listed(names)}; remove the scaling from the network"
        )
