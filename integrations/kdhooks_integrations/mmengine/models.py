"""Builds MMEngine's models, and finds their embedding, stages and classifier."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.model import BaseModel, PretrainedInit
from mmengine.registry import MODELS
from torch import Tensor, nn

from kdhooks.backbones import known_stages
from kdhooks.classes.shards import ClassShard
from kdhooks.errors import KDHooksError, in_one_line, listed, near_miss
from kdhooks.hookspecs import hookimpl
from kdhooks.recipe import Recipe
from kdhooks.teacher.checkpoints import load_checkpoint, load_strictly
from kdhooks.teacher.several import numbered
from kdhooks.teacher.table import InputTable, TeacherTable, with_module
from kdhooks_integrations.mmengine.checkpoints import readable
from kdhooks_integrations.mmengine.images import Seen, check_order, teachers_input
from kdhooks_integrations.mmengine.stages import stages_of

_BACKBONES = ("backbone", "img_backbone")
_EMBEDDING = ("neck", *_BACKBONES)  # the first child of these names returns the embedding
_CLASSIFIER = (
    "head.weight", "head.fc.weight", "head.norm_product.weight", "head.layers.head.weight",
)  # fmt: skip


def built(config: object, what: str) -> Any:
    if not isinstance(config, dict) or "type" not in config:
        raise KDHooksError(
            f"mmengine: {what} must be a model's config, dict(type=…); found {config!r}"
        )
    try:
        return MODELS.build(config)
    except KDHooksError:
        raise
    except Exception as error:
        if isinstance(error, KeyError) and "registry" in str(error):
            raise KDHooksError(f"mmengine: {what}: {error.args[0]}") from error
        raise KDHooksError(
            f"mmengine: {what} can't be built from its config; {in_one_line(error)}"
        ) from error


def network_of(path: Path) -> dict[str, Any]:
    """Return the model's config in a config file, with its data_preprocessor and scope."""
    try:
        config = Config.fromfile(path)
    except Exception as error:
        raise KDHooksError(
            f"mmengine: teacher.config: '{path}' can't be read as a config; {in_one_line(error)}"
        ) from error
    model = deepcopy(config.get("model"))
    outer = config.get("data_preprocessor")
    if isinstance(model, dict):
        outer, model = _student_of(model, outer)
    if not isinstance(model, dict):
        raise KDHooksError(
            f"mmengine: teacher.config: '{path}' must have a model, dict(type=…); found {model!r}"
        )
    for key, value in (("data_preprocessor", outer), ("_scope_", config.get("default_scope"))):
        if value is not None:
            model.setdefault(key, value)  # as MMEngine's Runner does
    return model


def _student_of(model: dict[str, Any], outer: Any = None) -> tuple[Any, Any]:
    """Return the data_preprocessor and the model; for a kdhooks.Distill, those of its student."""
    if "student" not in model:
        return outer, model
    return model.get("data_preprocessor", outer), model["student"]


class Conventions:
    """Finds the stages of a backbone, which may be the child of a model."""

    @hookimpl
    def model_stages(self, model: nn.Module) -> list[str] | None:
        children = dict(model.named_children())
        name = next((name for name in _BACKBONES if name in children), "")
        backbone = children.get(name, model)
        known = known_stages(backbone)
        if known is None or not set(known) <= {path for path, _ in backbone.named_modules()}:
            known = stages_of(backbone)
        return None if known is None else [f"{name}.{stage}".lstrip(".") for stage in known]


def with_embedding(recipe: Recipe, student: nn.Module) -> Recipe:
    if recipe.taps.student.embedding is not None:
        return recipe
    children = dict(student.named_children())
    path = _embedding_of(student)
    if path is None:
        raise KDHooksError(
            f"mmengine: the student has no child {' or '.join(_EMBEDDING)} that would return its "
            "embedding; name a module as taps.student.embedding; its children are: "
            f"{listed(name for name in children if name != 'data_preprocessor')}"
        )
    student_taps = replace(recipe.taps.student, embedding=path)
    return replace(recipe, taps=replace(recipe.taps, student=student_taps))


def _embedding_of(model: nn.Module) -> str | None:
    children = dict(model.named_children())
    return next((name for name in _EMBEDDING if name in children), None)


def own_classifier(student: nn.Module, path: str) -> tuple[ClassShard | None, str]:
    """Return the student's rows (c d), and the reason to refuse them for methods on logits."""
    known = dict(student.named_parameters())
    if path and path not in known:
        inside = [name for name in known if name.startswith(f"{path}.")]
        raise KDHooksError(
            f"mmengine: classifier = '{path}': the student has no such parameter; "
            + (f"inside of it are: {listed(inside)}" if inside else near_miss(path, known))
            + ("" if inside else f"it has {len(known)}")
        )
    name = path or next((name for name in _CLASSIFIER if name in known), "")
    if not name:
        return None, ""
    rows, owner = known[name], student.get_submodule(name.rpartition(".")[0])
    if path:
        _check_rows(rows, owner, f"classifier = '{path}'")
    elif rows.ndim != 2 or getattr(owner, "k", 1) != 1:
        return None, ""
    doubt = ""
    if not path and isinstance(getattr(owner, "bias", None), Tensor):
        doubt = (
            f"compares cosines to the rows '{name}', but the student's head adds a bias, so these "
            "are not its own logits; use a head without a bias, or set "
            f"classifier = '{name}' to compare the cosines anyway"
        )
    return ClassShard(rows, 0, len(rows)), doubt


def _check_rows(rows: Tensor, owner: nn.Module, what: str) -> None:
    if rows.ndim != 2:
        raise KDHooksError(f"mmengine: {what} must be rows (c d); found shape {tuple(rows.shape)}")
    if getattr(owner, "k", 1) != 1:  # mmpretrain's NormProduct
        raise KDHooksError(
            f"mmengine: {what} must have one row for each class; found {owner.k} sub-centres for "
            "each; use a head with num_subcenters = 1, or a method that needs no rows"
        )


def with_teacher(recipe: Recipe, student: Seen) -> Recipe:
    """Build the recipe's teachers, and complete their input and embedding.

    An embedding is looked for as in the student; `embedding=''` is the output of the forward.
    """
    if len(recipe.teachers) == 1:
        named = recipe.taps.teacher.embedding is not None
        return replace(recipe, teacher=_completed(recipe.teachers[0], student, named))
    made = []
    for number, teacher in enumerate(recipe.teachers):
        with numbered(number):
            made.append(_completed(teacher, student))
    return replace(recipe, teacher=tuple(made))


def _completed(teacher: TeacherTable, student: Seen, embedding_named: bool = False) -> TeacherTable:
    named = teacher.classifier
    if teacher.config is not None:
        teacher = replace(teacher, config=None, network=network_of(teacher.config))
    # EMAHook stores the weights to be used as state_dict, and the others beside it.
    teacher = with_module(teacher, _network, preferred="state_dict")
    model = teacher.module
    check_order(student, model, teacher.input.given())
    if not isinstance(model, nn.Module):
        return teacher
    seen = teachers_input(student, model, teacher.input.given())
    teacher = replace(teacher, input=InputTable.read(seen))
    if isinstance(named, Path) and (rows := _rows_of(model, named)) is not None:
        teacher = replace(teacher, classifier=rows)
    if isinstance(model, BaseModel) and teacher.embedding is None and not embedding_named:
        teacher = replace(teacher, embedding=_embedding_of(model) or "")
    return teacher


def _network(config: object, _: object) -> nn.Module:
    if isinstance(config, dict):
        outer, config = _student_of(config)
        if isinstance(config, dict) and outer is not None:
            config = {"data_preprocessor": outer, **config}
    network = built(config, "teacher.network")
    if not isinstance(network, nn.Module):
        raise KDHooksError(
            "mmengine: teacher.network must be the config of a module; found one that builds a "
            f"{type(network).__name__}"
        )
    return network


def _rows_of(teacher: nn.Module, given: Path) -> Tensor | None:
    """Return the parameter that teacher.classifier names; None if it names a file."""
    if given.is_file():
        return None
    known = dict(teacher.named_parameters())
    name = given.name
    if name in known:
        owner = teacher.get_submodule(name.rpartition(".")[0])
        _check_rows(known[name], owner, f"teacher.classifier = '{name}'")
        return known[name].detach()
    if hint := near_miss(name, known):
        raise KDHooksError(
            f"mmengine: teacher.classifier = '{name}' is neither a file nor a parameter of the "
            f"teacher; {hint}it has {len(known)}"
        )
    return None


def initialised(config: Mapping[str, Any]) -> nn.Module:
    """Build a teacher whose weights come from its init_cfg, and from those of its parts.

    A file that an init_cfg names must hold all weights of that part.
    """
    model: nn.Module = built(config, "teacher.module")
    if not isinstance(model, nn.Module):
        return model  # it is a function
    found = {name: getattr(part, "init_cfg", None) for name, part in model.named_modules()}
    files = {
        name: init
        for name, init in found.items()
        if isinstance(init, dict) and init.get("type") in ("Pretrained", PretrainedInit)
    }
    for name, init in files.items():
        _load(model.get_submodule(name), init, f"{name}.init_cfg".lstrip("."))
    if not files and found[""]:
        try:
            model.init_weights()  # type: ignore[operator]  # of mmengine's BaseModule
        except Exception as error:
            raise KDHooksError(
                f"mmengine: teacher.module can't be initialised by its init_cfg; "
                f"{in_one_line(error)}"
            ) from error
    return model


def _load(part: nn.Module, init: Mapping[str, Any], key: str) -> None:
    file = init.get("checkpoint")
    if not isinstance(file, str | Path) or not Path(file).expanduser().is_file():
        raise KDHooksError(
            f"mmengine: teacher.module: {key} must name a local file as its checkpoint; found "
            f"{file!r}; if it is a URL, download it first"
        )
    prefix = f"{init.get('prefix') or ''}.".lstrip(".")
    with readable():
        checkpoint = load_checkpoint(file)
    state = checkpoint.largest()
    of_it = {name.removeprefix(prefix): state[name] for name in state if name.startswith(prefix)}
    load_strictly(part, replace(checkpoint, content=of_it))
