"""`kdhooks doctor`: one step of a recipe on made-up faces, before the long training starts.

    kdhooks doctor --recipe kd.toml --network r50
    kdhooks doctor --recipe kd.toml --network mbf --batch-size 128 --num-classes 93431 \\
        --trainer insightface/recognition/arcface_torch --data ms1m-retinaface-t1

One line a check: ok, FAULT with the way out, or why it could not be made. The exit status is 0
where no fault was found, 1 where one was, 2 where the command itself is wrong.
"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from kdhooks.arguments import at_least, usable_device
from kdhooks.errors import KDHooksError
from kdhooks_integrations.arcface_torch.commands.examination import Examination, Unchecked
from kdhooks_integrations.arcface_torch.commands.networks import add_options, enter_trainer
from kdhooks_integrations.arcface_torch.commands.parsing import make_parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if not Path(options.recipe).expanduser().is_file():
        raise KDHooksError(f"doctor: there is no recipe '{options.recipe}'")
    if options.batch_size < 2:
        raise KDHooksError(f"doctor: --batch-size must be at least 2; found {options.batch_size}")
    enter_trainer(options.trainer)
    examination = Examination(options)
    checks = examination.checks()
    width = max(len(name) for name, _ in checks)
    for index, (name, check) in enumerate(checks):
        try:
            status, text = "ok", check()
        except Unchecked as reason:
            status, text = "--", f"not checked: {reason}"
        except KDHooksError as error:
            status, text = "FAULT", str(error)
        except Exception as error:  # of a network, a method or a package: a fault all the same
            traceback.print_exc(file=sys.stderr)
            status, text = "FAULT", f"{type(error).__name__}: {error}; see the traceback above"
        print(f"{status:5}  {name:{width}}  {' '.join(text.split())}", flush=True)
        if status == "FAULT":
            for later, _ in checks[index + 1 :]:
                print(f"--     {later:{width}}  not checked: the fault above comes first")
            return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("doctor", __doc__)
    add = parser.add_argument
    add("--recipe", required=True, help="TOML file: the teacher and the methods")
    add_options(parser, "--network")
    add("--batch-size", type=int, default=8, help="of one device; the training's own for its cost")
    add(
        "--num-classes",
        type=at_least(1),
        help="of the training; by default the teacher's classifier's",
    )
    add("--data", help="folder that the trainer trains on (config.rec); checks the class order")
    add("--fp16", action="store_true", help="as config.fp16 = True")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=device)
    return parser
