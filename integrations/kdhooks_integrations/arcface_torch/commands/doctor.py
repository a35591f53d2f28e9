"""`kdhooks doctor` checks a recipe with one step, before the long training starts.

    kdhooks doctor --recipe kd.toml --config configs/ms1mv3_r50
    kdhooks doctor --recipe kd.toml --config configs/ms1mv3_r50 --batch-size 16 \\
        --trainer insightface/recognition/arcface_torch --data ms1m-retinaface-t1
    kdhooks doctor --recipe kd.toml --network mbf --num-classes 93431

It creates the student, the head and the training step that the config describes, and distils one
batch. Options override the config; the report states the source of each value.

Each check prints one line: ok; WARN with a conclusion; FAULT with the way to correct it; or -- with
the reason why the check was not possible. The exit status is 0 if there was no fault, 1 if there
was one, and 2 if the command itself is wrong.
"""

import argparse
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from kdhooks.arguments import at_least
from kdhooks.errors import KDHooksError
from kdhooks_integrations.arcface_torch.commands.configs import read_config
from kdhooks_integrations.arcface_torch.commands.examination import (
    Doubtful,
    Examination,
    Unchecked,
)
from kdhooks_integrations.arcface_torch.commands.networks import (
    add_network,
    add_trainer,
    enter_trainer,
)
from kdhooks_integrations.arcface_torch.commands.parsing import (
    add_device,
    add_json,
    make_parser,
    path,
    print_json,
    quiet_stdout,
)
from kdhooks_integrations.arcface_torch.commands.settings import settle

_MARKS = {"ok": "ok", "warning": "WARN", "fault": "FAULT", "unchecked": "--"}
_OPTIONS = ("network", "embedding_size", "num_classes", "batch_size", "fp16")
"""The values of a config that can be overridden by an option."""


@dataclass(frozen=True)
class Finding:
    name: str
    status: str  # a key of `_MARKS`
    text: str


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    if not options.recipe.is_file():
        raise KDHooksError(f"doctor: there is no recipe '{options.recipe}'")
    enter_trainer(options.trainer)
    with quiet_stdout(options.json):
        examination = _examination(options)
        findings = []
        width = max(len(name) for name, _ in examination.checks())
        for finding in examine(examination):
            findings.append(finding)
            if not options.json:
                print(
                    f"{_MARKS[finding.status]:5}  {finding.name:{width}}  {finding.text}",
                    flush=True,
                )
    statuses = [finding.status for finding in findings]
    worst = next((status for status in ("fault", "warning") if status in statuses), "ok")
    if options.json:
        checks = [asdict(finding) for finding in findings]
        print_json({"status": worst, **examination.facts, "checks": checks})
    return 1 if worst == "fault" else 0


def _examination(options: argparse.Namespace) -> Examination:
    written: dict[str, Any] = {}
    recipes: list[str] = []
    if options.config is not None:
        written, recipes = read_config(options.config, options.trainer)
    given = {name: value for name in _OPTIONS if (value := getattr(options, name)) is not None}
    settings = settle(written, options.config, given)
    return Examination(
        settings, recipes, options.recipe, options.data, options.device, options.picture
    )


def examine(examination: Examination) -> Iterator[Finding]:
    """Yield one finding for each check; after a fault, the remaining checks are skipped."""
    fault = False
    for name, check in examination.checks():
        if fault:
            yield Finding(name, "unchecked", "not checked: correct the fault above first")
            continue
        try:
            status, text = "ok", check()
        except Unchecked as reason:
            status, text = "unchecked", f"not checked: {reason}"
        except Doubtful as reason:
            status, text = "warning", str(reason)
        except KDHooksError as error:
            status, text = "fault", str(error)
        except Exception as error:  # raised by a network, a method or a package
            status, text = "fault", _described(error)
        fault = status == "fault"
        yield Finding(name, status, " ".join(text.split()))


def _described(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return f"a batch must fit into memory; found {error}; lower --batch-size or --num-classes"
    traceback.print_exc(file=sys.stderr)
    return f"{type(error).__name__}: {error}; see the traceback above"


def _parser() -> argparse.ArgumentParser:
    parser = make_parser("doctor", __doc__)
    add = parser.add_argument
    add(
        "--recipe",
        required=True,
        type=path,
        metavar="FILE",
        help="TOML file with the teacher and the methods (required)",
    )
    add(
        "--config",
        metavar="FILE",
        help="config for train_v2.py, such as configs/ms1mv3_r50 (default: none; the values of the "
        "trainer's configs/base.py are then assumed)",
    )
    add_network(parser, "--network", ("default: the config's", "the config's, else 512"))
    add(
        "--batch-size",
        type=at_least(2),
        metavar="N",
        help="per-device batch size (default: the config's, else 8)",
    )
    add(
        "--num-classes",
        type=at_least(1),
        metavar="N",
        help="number of classes of the training (default: the config's, else that of the teacher's "
        "classifier)",
    )
    add(
        "--fp16",
        action=argparse.BooleanOptionalAction,
        help="run the student in float16, as with config.fp16, or not (default: the config's, else "
        "not)",
    )
    add(
        "--data",
        metavar="FOLDER",
        help="training data, the folder config.rec; it is needed to check the order of the classes "
        "(default: random images)",
    )
    add(
        "--picture",
        type=path,
        default="student_view.png",
        metavar="FILE",
        help="PNG file to write with the images of teacher and student, if the recipe has a "
        "student_view (default: student_view.png in the working directory)",
    )
    add_trainer(parser)
    add_device(parser)
    add_json(parser)
    return parser
