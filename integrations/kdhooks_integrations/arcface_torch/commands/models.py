"""Opens the models of `kdhooks evaluate`: files, installed packs, and teachers of a recipe."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.recipe import Recipe, build_teachers
from kdhooks.teacher.from_table import build_from_table
from kdhooks.teacher.several import Teachers, one_or_several
from kdhooks.teacher.table import TeacherTable
from kdhooks.teacher.teacher import Teacher
from kdhooks.tensor_files import first_bytes, user_path
from kdhooks_integrations.arcface_torch.commands.export import load_student
from kdhooks_integrations.arcface_torch.networks import teacher_factories

_TEACHER = re.compile(r"teacher(?:\.(\d{1,4}))?")


@dataclass(frozen=True)
class Model:
    """A model, and its name in the results."""

    name: str
    source: str  # the text on the command line
    teacher: Teacher | Teachers  # the frozen model, which may also be a student


@dataclass(frozen=True)
class Checkpoints:
    """The options that describe checkpoints."""

    networks: Sequence[str]  # one for all, or one for each checkpoint in their order
    width: int | None
    weights: str
    fp16: bool | None  # None: the factory's own choice


def open_models(
    texts: Sequence[str], recipe: Recipe | None, checkpoints: Checkpoints, root: Path | None
) -> list[Model]:
    """Open the models of a command line.

    texts: MODEL or NAME=MODEL each. root: the folder with insightface's packs in its models.
    """
    named = [_named(text) for text in texts]
    names = [name for name, _ in named]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise KDHooksError(
            f"evaluate: two models are called '{twice}'; name them, as in NAME={twice}"
        )
    files = [one for _, one in named if _is_checkpoint(one)]
    _refuse_unused(files, checkpoints)
    networks = iter(_networks(files, checkpoints))
    taught: list[Teacher] | None = None
    models = []
    for name, source in named:
        with_teacher = _TEACHER.fullmatch(source)
        opened: Teacher | Teachers
        try:
            if with_teacher:
                taught = taught or _teachers(recipe)
                opened = _chosen(taught, with_teacher[1])
            elif _is_checkpoint(source):
                how = checkpoints
                network = load_student(source, next(networks), how.width, how.weights, how.fp16)
                opened = Teacher(network)
            elif _is_onnx(source):
                file = user_path(source, "the file")
                first_bytes(file, "the file")
                opened = build_from_table(TeacherTable(onnx=file))
            else:
                opened = build_from_table(TeacherTable(insightface=source, root=root))
        except KDHooksError as error:
            raise KDHooksError(f"evaluate: model '{name}': {error}") from error
        models.append(Model(name, source, opened))
    return models


def _named(text: str) -> tuple[str, str]:
    """Split NAME=MODEL; the name of a MODEL without a name is its text."""
    name, equals, source = text.partition("=")
    if not equals or Path(text).exists():
        return text, text
    if not name or not source:
        raise KDHooksError(f"evaluate: a model must be MODEL or NAME=MODEL; found '{text}'")
    return name, source


def _is_onnx(source: str) -> bool:
    return source.lower().endswith(".onnx")


def _is_checkpoint(source: str) -> bool:
    """Whether the text names a file; a pack has neither a suffix nor a folder in its name."""
    if _is_onnx(source) or _TEACHER.fullmatch(source):
        return False
    path = Path(source)
    return path.is_file() or path.suffix != "" or path.name != source


def _refuse_unused(files: Sequence[str], given: Checkpoints) -> None:
    """Refuse options that describe checkpoints if there are no checkpoints."""
    options = {
        "--embedding-size": given.width, "--weights": given.weights, "--fp16": given.fp16,
    }  # fmt: skip
    for option, value in options.items():
        if value and not files:
            raise KDHooksError(
                f"evaluate: {option} is for checkpoints such as model.pt; found none among the "
                "models; leave it out"
            )


def _networks(files: Sequence[str], given: Checkpoints) -> Sequence[str]:
    """Return the network of each checkpoint."""
    networks = given.networks
    if bool(networks) != bool(files) or len(networks) not in {0, 1, len(files)}:
        raise KDHooksError(
            f"evaluate: --network must name the network of each checkpoint, or one for all; found "
            f"{len(files)} checkpoints ({listed(files)}) and {len(networks)} networks "
            f"({listed(networks)}); specify --network once, or once for each checkpoint in their "
            "order"
        )
    return networks if len(networks) == len(files) else [*networks] * len(files)


def _teachers(recipe: Recipe | None) -> list[Teacher]:
    if recipe is None:
        raise KDHooksError("is a teacher of a recipe; found no recipe; specify --recipe FILE")
    stored = [str(one.embeddings) for one in recipe.teachers if one.embeddings is not None]
    if stored:
        raise KDHooksError(
            f"a teacher must be a network to embed the images of a test; found '{stored[0]}' in "
            "teacher.embeddings, which has only embeddings of the training images; use a recipe "
            "that names the network"
        )
    return build_teachers(recipe, teacher_factories(None, recipe))


def _chosen(teachers: list[Teacher], number: str | None) -> Teacher | Teachers:
    if number is None:
        return one_or_several(teachers)
    if int(number) >= len(teachers):
        known = [f"teacher.{place}" for place in range(len(teachers))]
        raise KDHooksError(
            f"must be one of the recipe's teachers; {near_miss(f'teacher.{number}', known)}there "
            f"are {len(teachers)}, counted from 0"
        )
    return teachers[int(number)]
