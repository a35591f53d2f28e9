"""Describes an installed method and its requirements, for `kdhooks methods NAME`."""

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kdhooks.asking import Declarations
from kdhooks.classes.shards import ClassShard
from kdhooks.declarations import Model, Tap
from kdhooks.discovery import create, load, methods
from kdhooks.errors import KDHooksError
from kdhooks.generators import undisturbed_generators
from kdhooks.hookspecs import HOOKS
from kdhooks.kinds import Option, alternatives, described
from kdhooks.options import REQUIRED, opened
from kdhooks.probing import probe_student, probe_teacher
from kdhooks.schedules import Schedule
from kdhooks.testing import TinyFaceNet, tiny_teacher

_STAGES = ("layer1", "layer2")


@dataclass(frozen=True)
class Needs:
    """The requirements of a method whose options have their defaults."""

    labels: bool
    class_rows: bool  # of the teacher
    own_classifier: bool  # the student's, trained
    feature_maps: bool
    torch_teacher: bool  # not an ONNX file in onnxruntime


def needs_of(method: object) -> Needs:
    """Find the requirements of a method by leaving out each input: the method may refuse that."""
    with undisturbed_generators(0, torch.device("cpu")), _silent():
        images = torch.rand(2, 3, 32, 32)
        student = probe_student(TinyFaceNet(), "", _STAGES, images)
        teacher = probe_teacher(tiny_teacher(), _STAGES, images)
        declarations = Declarations([method], [])
        rows = teacher.classifier
        assert rows is not None
        head = ClassShard(rows.slice(0, rows.total).requires_grad_(), 0, rows.total)

        def taps(teacher: Model) -> tuple[Tap, ...]:
            return declarations.taps(student, teacher, head)

        def does_without(**left_out: Any) -> bool:
            try:
                taps(replace(teacher, **left_out))
            except KDHooksError:
                return False
            return True

        declared = taps(teacher)
        return Needs(
            labels=any(tap.needs_labels for tap in declared),
            class_rows=not does_without(classifier=None),
            own_classifier=any(tap.needs_head for tap in declared),
            feature_maps=any(tap.student_paths for tap in declared),
            torch_teacher=not does_without(module=None, stages=()),
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Silence the warnings of methods about the tiny models that they are tried on."""
    log = logging.getLogger("kdhooks")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def as_table(name: str) -> dict[str, Any]:
    """Return everything known about a method, in types that JSON can represent."""
    made = load(name)
    info = next(info for info in methods() if info.name == name)
    try:
        found: dict[str, Any] = {"needs": asdict(needs_of(create(name)))}
    except KDHooksError as error:  # it has options without a usable default
        found = {"needs": None, "reason": str(error)}
    return {
        **asdict(info),
        "class": f"{made.__module__}:{made.__qualname__}",
        "hooks": [hook for hook in HOOKS if hasattr(made, hook)],
        **found,
        "options": {key: _as_table(option) for key, option in opened(made).items()},
    }


def _as_table(option: Option) -> dict[str, Any]:
    kinds = alternatives(option.kind)
    scheduled = Schedule in kinds
    plain = [k for k in kinds if k is not type(None) and not (scheduled and k is not float)]
    simple = isinstance(option.default, bool | int | float | str | tuple)
    return {
        "type": " or ".join(described(kind) for kind in plain),
        "required": option.default is REQUIRED,
        "default": option.default if simple else None,
        "range": str(option.bounds),
        "unit": option.unit,
        "schedule": scheduled,
        "meaning": option.meaning,
    }


def as_text(table: Mapping[str, Any]) -> str:
    """Format the result of `as_table` as text."""
    lines = [
        f"{table['name']}: {table['paper']}",
        f"package  {table['package']}, {table['class']}",
        f"hooks    {', '.join(table['hooks'])}",
    ]
    if table["needs"] is None:
        lines.append(f"needs    depends on its options: {table['reason']}")
    else:
        words = [key.replace("_", " ") for key, needed in table["needs"].items() if needed]
        lines.append(f"needs    {', '.join(words) or 'only the embeddings'}")
    lines.append("options")
    for name, option in table["options"].items():
        written = json.dumps(option["default"], ensure_ascii=False)  # as TOML writes it too
        default = "" if option["default"] is None else f" = {written}"
        notes = [
            "required" if option["required"] else "",
            option["type"],
            f"{option['range']} {option['unit']}".strip(),
            "or a schedule" if option["schedule"] else "",
        ]
        lines.append(f"  {name}{default}  ({', '.join(note for note in notes if note)})")
        if option["meaning"]:
            lines.append(f"      {option['meaning']}")
    return "\n".join(lines)
