"""Defines the options of `kdhooks evaluate`, and checks that they are consistent."""

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
    """Check that the options are consistent, before any file is read."""
    if options.protocol == "insightface" and not options.flip:
        raise KDHooksError(
            "evaluate: --protocol insightface sums an image and its mirror image, as the trainer "
            "does; found --no-flip; leave one of them out"
        )
    if options.folds is not None and options.pairs is not None:
        raise KDHooksError(
            "evaluate: --folds is for verification files, but the file of --pairs defines its own "
            "folds; leave one of them out"
        )
    if options.view and options.recipe is None:
        raise KDHooksError(
            "evaluate: --view applies the student_view of a recipe; found no recipe; specify "
            "--recipe FILE"
        )
    sources = [model.partition("=")[2] or model for model in options.models]
    inputs = [*sources, *options.data, options.pairs or "", options.recipe or ""]
    if options.picture is not None:
        check_picture(options.picture)
        if options.picture == options.json:
            raise KDHooksError(
                f"evaluate: --json and --picture must be different files; found '{options.json}' "
                "twice"
            )
    for option in ("json", "picture"):
        file = getattr(options, option)
        if file is not None and file != Path("-"):
            check_output(file, f"--{option}", [str(one) for one in inputs if str(one)])


def evaluate_parser(about: str | None) -> argparse.ArgumentParser:
    """about: the text that --help prints above the options."""
    parser = make_parser("evaluate", about)
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="models to evaluate, see above (required)")
    add(
        "--data",
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="verification files such as lfw.bin, or folders of such files; with --pairs, one "
        "folder or zip of aligned pictures, with a folder for each person (required)",
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
        help="number of folds into which the pairs of a verification file are split, in their "
        f"order; the threshold of a fold comes from the other folds (default: {FOLDS})",
    )
    add(
        "--far",
        type=share,
        nargs="+",
        action="extend",
        metavar="RATE",
        help="false accept rates, from 0 to 1, at which the TAR is measured (default: 0.01 0.001)",
    )
    add(
        "--flip",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether to add the embedding of the mirror image to that of the image "
        "(default: --flip)",
    )
    add(
        "--protocol",
        choices=("exact", "insightface"),
        default="exact",
        help="exact: accuracy at the best of all thresholds; insightface: accuracy computed as in "
        "arcface_torch's training, and equal to its log (default: exact)",
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
        help="apply the recipe's student_view to the second image of each pair (default: off)",
    )
    defaults = ("default: none; repeat it for each checkpoint if they differ", "the checkpoint's")
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
        help="folder whose subfolder models has insightface's packs (default: ~/.insightface)",
    )
    add(
        "--batch-size",
        type=at_least(1),
        metavar="N",
        help=f"number of images embedded at a time (default: {BATCH}; with --protocol insightface "
        f"the trainer's, {TRAINERS_BATCH})",
    )
    add(
        "--json",
        type=path,
        metavar="FILE",
        help="file for all results as one JSON object; - prints it instead of the table "
        "(default: none)",
    )
    add(
        "--picture",
        type=path,
        metavar="FILE",
        help="PNG file for the ROC curves; needs matplotlib (default: none)",
    )
    add_trainer(parser)
    add_device(parser)
    return parser
