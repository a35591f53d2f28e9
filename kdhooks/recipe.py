"""A checked description of a distillation, the same in every host, becomes a Distiller."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.declarations import check_weight
from kdhooks.discovery import create
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.finite import check_nonfinite
from kdhooks.generators import undisturbed_generators
from kdhooks.onnx.session import OnnxModel, insightface_model
from kdhooks.onnx.to_torch import to_torch
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.checkpoints import load_checkpoint, load_strictly
from kdhooks.teacher.input_transform import InputTransform, channels
from kdhooks.teacher.teacher import Teacher, check_compile

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

NetworkFactory: TypeAlias = Callable[[Any, Mapping[str, Tensor]], nn.Module]
"""A host's own way from `teacher.network` and the checkpoint's tensors to an empty module."""

_KEYS = ("teacher", "methods", "taps", "input_shape", "seed", "nonfinite")
_SOURCES = ("module", "network", "config", "onnx", "insightface")
_TEACHER_KEYS = (
    *_SOURCES, "checkpoint", "root", "classifier", "input", "dtype", "channels_last", "compile",
    "side_stream", "micro_batch", "convert", "cache",
)  # fmt: skip
_FLAGS = ("channels_last", "side_stream", "convert")
_INPUT_KEYS = ("size", "order", "mean", "std")
_CACHE_KEYS = ("path", "max_gb")
_TAP_KEYS = ("embedding", "stages")
_DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, checked as far as it can be without the models."""

    teacher: Mapping[str, Any]
    methods: Sequence[object]
    taps: Mapping[str, Mapping[str, Any]]
    input_shape: tuple[int, int, int] = (3, 112, 112)
    seed: int = 0
    nonfinite: Literal["raise", "skip"] = "raise"

    @classmethod
    def read(cls, source: "Recipe | Mapping[str, Any] | str | Path") -> "Recipe":
        """From a dict, or a TOML file, whose relative paths start at the file's folder."""
        if isinstance(source, Recipe):
            return source
        folder = Path()
        if isinstance(source, str | Path):
            folder, source = Path(source).expanduser().parent, _read_toml(Path(source))
        _only(source, _KEYS, "recipe")
        for key in ("teacher", "methods"):
            if key not in source:
                raise KDHooksError(f"recipe needs '{key}'; found {listed(map(str, source))}")
        methods = source["methods"]
        if not isinstance(methods, Sequence) or isinstance(methods, str) or not methods:
            raise KDHooksError(f"recipe: methods must be a list of at least one; found {methods!r}")
        taps = source.get("taps", {})
        _only(taps, ("student", "teacher"), "recipe: taps")
        for side, table in taps.items():
            _only(table, _TAP_KEYS, f"recipe: taps.{side}")
        _check_simple(source)
        return cls(
            teacher=_checked_teacher(source["teacher"], folder),
            methods=[_checked_method(method) for method in methods],
            taps=taps,
            input_shape=tuple(source.get("input_shape", (3, 112, 112))),
            seed=source.get("seed", 0),
            nonfinite=source.get("nonfinite", "raise"),
        )

    def stages(self, side: str) -> Sequence[str] | None:
        stages: Sequence[str] | None = self.taps.get(side, {}).get("stages")
        return stages

    def embedding(self, side: str) -> str:
        return str(self.taps.get(side, {}).get("embedding", ""))


def build(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    student: nn.Module,
    *,
    network: NetworkFactory | None = None,
    head: ClassShard | None = None,
    host_head: Literal["margin"] | None = None,
    plugins: Sequence[object] = (),
    run_student: Callable[[Tensor], object] | None = None,
) -> Distiller:
    """The Distiller that a recipe describes.

    network: the host's factory for `teacher.network`; the rest: see `Distiller`.
    """
    recipe = Recipe.read(recipe)
    with undisturbed_generators(recipe.seed, next(student.parameters()).device):
        teacher = build_teacher(recipe, network)
    return Distiller(
        student,
        teacher,
        recipe.methods,
        student_embedding=recipe.embedding("student"),
        run_student=run_student,
        student_stages=recipe.stages("student"),
        teacher_stages=recipe.stages("teacher"),
        head=head,
        host_head=host_head,
        input_shape=recipe.input_shape,
        plugins=plugins,
        seed=recipe.seed,
        nonfinite=recipe.nonfinite,
    )


def build_teacher(recipe: Recipe, network: NetworkFactory | None = None) -> Teacher:
    """The teacher alone, as `kdhooks.class_means` takes it."""
    spec = recipe.teacher
    transform = InputTransform()
    model: nn.Module | Callable[[Tensor], Tensor]
    if "module" in spec:
        model = spec["module"]
    elif "config" in spec:
        raise KDHooksError(
            f"recipe: teacher.config is a config file of MMEngine's, which '{spec['config']}' is "
            "not read as here; give the module itself as teacher"
        )
    elif "network" in spec:
        model = _from_checkpoint(spec, network)
    else:
        path = spec.get("onnx") or insightface_model(
            spec["insightface"], spec.get("root", "~/.insightface")
        )
        given = spec.get("input", {})
        said = {"mean", "std"} <= set(given)  # three of each are for the transform below
        scale = (_average(given["mean"]), _average(given["std"])) if said else None
        opened = (to_torch if spec.get("convert") else OnnxModel)(path, scale)
        transform = InputTransform(size=opened.size, mean=opened.mean, std=opened.std)
        model = opened
    return Teacher(
        model,
        transform=replace(transform, **spec.get("input", {})),
        classifier=spec.get("classifier"),
        embedding=recipe.embedding("teacher"),
        dtype=_DTYPES[spec.get("dtype", "float32")],
        channels_last=spec.get("channels_last", False),
        compile=spec.get("compile", False),
        side_stream=spec.get("side_stream", False),
        micro_batch=spec.get("micro_batch"),
        cache=spec.get("cache"),
    )


def _from_checkpoint(spec: Mapping[str, Any], network: NetworkFactory | None) -> nn.Module:
    if network is None:
        raise KDHooksError(
            f"teacher network {spec['network']!r} is built by a host's own factory, and there is "
            "none here; give the module itself as teacher, or kdhooks.build(…, network=factory)"
        )
    state = load_checkpoint(spec["checkpoint"])
    return load_strictly(network(spec["network"], state), state, spec["checkpoint"])


def _average(value: object) -> float:
    numbers = channels(value, "recipe: teacher.input")
    return sum(numbers) / 3 if isinstance(numbers, tuple) else numbers


def _check_simple(source: Mapping[str, Any]) -> None:
    shape = source.get("input_shape", (3, 112, 112))
    if not isinstance(shape, Sequence) or [type(n) for n in shape] != [int] * 3 or min(shape) < 1:
        raise KDHooksError(
            f"recipe: input_shape must be channels, height and width; found {shape!r}"
        )
    seed = source.get("seed", 0)
    if type(seed) is not int:
        raise KDHooksError(f"recipe: seed must be a whole number; found {seed!r}")
    check_nonfinite(source.get("nonfinite", "raise"), "recipe: ")


def _checked_teacher(teacher: object, folder: Path) -> Mapping[str, Any]:
    """The teacher's table, with one source and paths that exist."""
    if not isinstance(teacher, Mapping):
        teacher = {"module": teacher}
    _only(teacher, _TEACHER_KEYS, "recipe: teacher")
    sources = [key for key in _SOURCES if key in teacher]
    if len(sources) != 1:
        raise KDHooksError(
            f"recipe: teacher needs exactly one of {', '.join(_SOURCES)}; found {listed(sources)}"
        )
    made = "config" if "config" in teacher else "network"
    if ("checkpoint" in teacher) != (made in teacher):
        raise KDHooksError(
            f"recipe: teacher.{made} and teacher.checkpoint go together, for a network without a "
            f"checkpoint knows nothing; found {listed(map(str, teacher))}"
        )
    if "module" in teacher and not callable(teacher["module"]):
        raise KDHooksError(
            "recipe: teacher must be a table, a module or a function; found "
            f"{type(teacher['module']).__name__}"
        )
    given: Any = teacher.get("input", {})
    _only(given, _INPUT_KEYS, "recipe: teacher.input")
    InputTransform(**given)
    for key in _FLAGS:
        if not isinstance(teacher.get(key, False), bool):
            raise KDHooksError(
                f"recipe: teacher.{key} must be true or false; found {teacher[key]!r}"
            )
    check_compile(teacher.get("compile", False), "recipe: ")
    for key in ("checkpoint", "config", "onnx", "insightface"):
        if not isinstance(teacher.get(key, ""), str | Path):
            raise KDHooksError(f"recipe: teacher.{key} must be a path; found {teacher[key]!r}")
        if "://" in str(teacher.get(key, "")):
            raise KDHooksError(
                f"recipe: teacher.{key} must be a file of this machine; found the address "
                f"'{teacher[key]}'; fetch it before, so that what is trained with stays the same"
            )
    if teacher.get("dtype", "float32") not in _DTYPES:
        raise KDHooksError(
            f"recipe: teacher.dtype must be one of {listed(_DTYPES)}; found '{teacher['dtype']}'"
        )
    checked = dict(teacher)
    for key in ("checkpoint", "config", "onnx", "classifier"):
        value = teacher.get(key)
        if isinstance(value, str | Path):
            path = folder / Path(value).expanduser()
            if key != "classifier" and not path.is_file():
                raise KDHooksError(f"recipe: teacher.{key}: there is no file '{path}'")
            checked[key] = path
    if "cache" in teacher:
        checked["cache"] = _checked_cache(teacher["cache"], folder)
    return checked


def _checked_cache(cache: object, folder: Path) -> CacheOptions:
    """A folder, or a table with it and a bound."""
    table: Any = {"path": cache} if isinstance(cache, str | Path) else cache
    _only(table, _CACHE_KEYS, "recipe: teacher.cache")
    if not isinstance(table.get("path"), str | Path):
        raise KDHooksError(
            'recipe: teacher.cache must name a folder, as "cache" or as '
            f'{{ path = "cache", max_gb = 20 }}; found {cache!r}'
        )
    path = folder / Path(table["path"]).expanduser()
    if path.exists() and not path.is_dir():
        raise KDHooksError(f"recipe: teacher.cache must be a folder; '{path}' is a file")
    return CacheOptions(path, table.get("max_gb"))


def _checked_method(method: object) -> object:
    if isinstance(method, Mapping) and isinstance(method.get("weight"), int | float):
        check_weight(str(method.get("name")), method["weight"])
    return create(method)


def _only(table: object, known: Sequence[str], where: str) -> None:
    if not isinstance(table, Mapping):
        raise KDHooksError(f"{where} must be a table; found {type(table).__name__}")
    for key in table:
        if key not in known:
            raise KDHooksError(
                f"{where} has no key '{key}'; {near_miss(str(key), known)}"
                f"its keys are: {listed(known)}"
            )


def _read_toml(path: Path) -> Mapping[str, Any]:
    path = path.expanduser()
    if not path.is_file():
        raise KDHooksError(f"recipe: there is no file '{path}'")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise KDHooksError(f"recipe: '{path}' is not TOML: {error}") from error
