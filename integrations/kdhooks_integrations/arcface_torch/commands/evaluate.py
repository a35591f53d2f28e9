"""`kdhooks evaluate` measures how well models tell people apart, and whether they agree.

    kdhooks evaluate student/model.onnx buffalo_l --data faces/lfw.bin faces/cfp_fp.bin
    kdhooks evaluate ours=work_dirs/x/model.pt teacher --network r50 --recipe kd.toml \\
        --data lfw112.zip --pairs pairs.txt --far 1e-2 1e-3 --picture roc.png
    kdhooks evaluate work_dirs/x/model.pt --network r50 --data faces --protocol insightface

A model is an ONNX file, a checkpoint (with --network), the name of an installed insightface pack,
teacher, which is that of the recipe (several ones joined), or teacher.0, the first of several.
NAME=MODEL gives it another name.

Of each model, and across any two of them, the first image of a pair by one and the second by the
other, it prints the accuracy with its deviation over the folds, the EER, and the TAR at each FAR.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from kdhooks.arguments import at_least, share
from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import FOLDS, read_pair_sets
from kdhooks.recipe import Recipe
from kdhooks.views.student_view import StudentView, ViewTable
from kdhooks.views.viewing import Viewing
from kdhooks_integrations.arcface_torch.commands.compared import compare
from kdhooks_integrations.arcface_torch.commands.embedding import Embedder
from kdhooks_integrations.arcface_torch.commands.models import Checkpoints, open_models
from kdhooks_integrations.arcface_torch.commands.networks import (
    add_network,
    add_trainer,
    enter_trainer,
)
from kdhooks_integrations.arcface_torch.commands.parsing import (
    add_device,
    as_json,
    make_parser,
    path,
    quiet_stdout,
)
from kdhooks_integrations.arcface_torch.commands.pictures import as_input, as_verified
from kdhooks_integrations.arcface_torch.commands.results import (
    as_content,
    as_sentences,
    as_table,
    can_draw,
    check_output,
    draw,
    write_text,
)

_SHAPE = (3, 112, 112)
_FARS = (1e-2, 1e-3)
_BATCH, _TRAINERS_BATCH = 128, 10


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    _check(options)
    picture: Path | None = options.picture
    if picture is not None and not can_draw():
        picture = None
    enter_trainer(options.trainer)
    recipe = None if options.recipe is None else Recipe.read(options.recipe)
    embedder = _embedder(options, recipe)
    trainers = options.protocol == "insightface"
    printed = options.json == Path("-")
    with quiet_stdout(printed):
        sets = read_pair_sets(
            options.data, options.pairs, options.folds or FOLDS, "evaluate: --data"
        )
        how = Checkpoints(
            options.network or (), options.embedding_size, options.weights, options.fp16 or None
        )
        models = open_models(options.models, recipe, how, options.root)
        compared = [
            compare(models, tested, embedder, options.far, trainers, _progress(tested.name))
            for tested in sets
        ]
    seen = None if embedder.view is None else _described(embedder.view)
    if not printed:
        print(as_table(compared, options.far, trainers), end="\n\n")
        for sentence in as_sentences(compared, options.flip, seen):
            print(sentence)
    if options.json is not None:
        content = {
            "protocol": options.protocol,
            "flip": options.flip,
            "view": seen,
            "models": [{"model": model.name, "source": model.source} for model in models],
            "sets": as_content(compared),
        }
        if printed:
            print(as_json(content))
        else:
            write_text(f"{as_json(content)}\n", options.json, "--json")
    if picture is not None:
        draw(compared, picture)
    return 0


def _check(options: argparse.Namespace) -> None:
    """What the options say together, before anything is read."""
    if options.protocol == "insightface" and not options.flip:
        raise KDHooksError(
            "evaluate: --protocol insightface sums an image and its mirror image, as the trainer "
            "does; found --no-flip; leave one of them out"
        )
    if options.folds is not None and options.pairs is not None:
        raise KDHooksError(
            "evaluate: --folds is for verification files, and the file of --pairs has folds of its "
            "own; leave one of them out"
        )
    if options.view and options.recipe is None:
        raise KDHooksError(
            "evaluate: --view is the student_view of a recipe, and there is none; give --recipe "
            "FILE"
        )
    sources = [model.partition("=")[2] or model for model in options.models]
    inputs = [*sources, *options.data, options.pairs or "", options.recipe or ""]
    for option in ("json", "picture"):
        file = getattr(options, option)
        if file is not None and file != Path("-"):
            check_output(file, f"--{option}", [str(one) for one in inputs if str(one)])


def _embedder(options: argparse.Namespace, recipe: Recipe | None) -> Embedder:
    trainers = options.protocol == "insightface"
    return Embedder(
        shape=_SHAPE if recipe is None else recipe.input_shape,
        device=options.device,
        batch=options.batch_size or (_TRAINERS_BATCH if trainers else _BATCH),
        flip=options.flip,
        view=_view(recipe) if options.view and recipe is not None else None,
        scaled=as_verified if trainers else as_input,
        whole_batches=trainers,
    )


def _view(recipe: Recipe) -> Viewing:
    table = recipe.student_view
    if not isinstance(table, ViewTable):  # a module is given in Python alone
        raise KDHooksError(
            "evaluate: --view is the student_view of the recipe; found a recipe without; add "
            "[student_view] to it, or leave --view out"
        )
    return Viewing(StudentView.of(table), recipe.seed)


def _described(view: Viewing) -> str:
    return f"{view.view.extra_repr()}, seed {view.seed}"


def _progress(name: str) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        end = "\n" if done == total else ""
        print(f"\r{name}: {done} of {total} images", end=end, file=sys.stderr, flush=True)

    return show


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("evaluate", __doc__)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="models to evaluate, as above (required)")
    add(
        "--data",
        required=True,
        nargs="+",
        metavar="PATH",
        help="verification files such as lfw.bin, or folders with some; or with --pairs one folder "
        "or zip of aligned pictures, a folder for each person (required)",
    )
    add(
        "--pairs",
        type=path,
        metavar="FILE",
        help="pairs of the pictures, in the format of LFW's pairs.txt (default: none)",
    )
    add(
        "--folds",
        type=at_least(2),
        metavar="N",
        help="number of equal runs of pairs that a verification file is cut in; the threshold of "
        f"one comes from the others (default: {FOLDS})",
    )
    add(
        "--far",
        type=share,
        nargs="+",
        default=_FARS,
        metavar="RATE",
        help="false accept rates at which the TAR is measured, as shares (default: 0.01 0.001)",
    )
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether an embedding is the sum of an image's and its mirror image's (default: it "
        "is)",
    )
    add(
        "--protocol",
        choices=("exact", "insightface"),
        default="exact",
        help="exact: any threshold; insightface: accuracy as arcface_torch's training logs it, to "
        "the last digit (default: exact)",
    )
    add(
        "--recipe",
        type=path,
        metavar="FILE",
        help="TOML file with the teacher, the view and the shape of the images (default: none; "
        "images are 112x112)",
    )
    add(
        "--view",
        action="store_true",
        help="see the second image of each pair through the recipe's student_view (default: off)",
    )
    defaults = ("default: none; give it once, or once for each checkpoint", "the checkpoint's")
    add_network(parser, "--network", defaults, action="append")
    add(
        "--weights",
        default="",
        metavar="PLACE",
        help="place of the weights in a checkpoint, if several sets fit (default: the one)",
    )
    add(
        "--fp16",
        action="store_true",
        help="run the networks in float16 on a GPU, as with config.fp16 (default: off)",
    )
    add(
        "--root",
        type=path,
        metavar="FOLDER",
        help="folder whose folder models holds insightface's packs (default: ~/.insightface)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help=f"images embedded at a time (default: {_BATCH}; {_TRAINERS_BATCH}, the trainer's, "
        "with --protocol insightface)",
    )
    add(
        "--json",
        type=path,
        metavar="FILE",
        help="file for all results as one JSON object; -: print it in place of the table "
        "(default: none)",
    )
    add(
        "--picture",
        type=path,
        metavar="FILE",
        help="PNG file for the ROC curves, which matplotlib draws (default: none)",
    )
    add_trainer(parser)
    add_device(parser)
    return parser
