"""The options of `kdhooks evaluate`, and what they must say together."""

import argparse
from pathlib import Path

from kdhooks.arguments import at_least, share
from kdhooks.errors import KDHooksError
from kdhooks.evaluation.pair_sets import FOLDS
from kdhooks_integrations.arcface_torch.commands.networks import (
    add_network,
    add_trainer,
    add_weights,
)
from kdhooks_integrations.arcface_torch.commands.parsing import add_device, make_parser, path
from kdhooks_integrations.arcface_torch.commands.results import check_output, check_picture

FARS = (1e-2, 1e-3)
BATCH, TRAINERS_BATCH = 128, 10


def check_evaluate(options: argparse.Namespace) -> None:
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
    if options.picture is not None:
        check_picture(options.picture)
        if options.picture == options.json:
            raise KDHooksError(
                f"evaluate: --json and --picture must be two files; found '{options.json}' twice"
            )
    for option in ("json", "picture"):
        file = getattr(options, option)
        if file is not None and file != Path("-"):
            check_output(file, f"--{option}", [str(one) for one in inputs if str(one)])


def evaluate_parser(about: str | None) -> argparse.ArgumentParser:
    """about: what --help says above the options."""
    parser = make_parser("evaluate", about)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="models to evaluate, as above (required)")
    add(
        "--data",
        required=True,
        nargs="+",
        action="extend",
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
        action="extend",
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
    add_weights(parser)
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
        help=f"images embedded at a time (default: {BATCH}; {TRAINERS_BATCH}, the trainer's, "
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
