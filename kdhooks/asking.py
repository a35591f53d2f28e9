"""Collects the declarations of the methods, after probing the models that they are made for."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import pluggy
import torch
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.declarations import Model, Tap
from kdhooks.discovery import create
from kdhooks.errors import KDHooksError
from kdhooks.hookspecs import Specs
from kdhooks.kinds import shown
from kdhooks.modes import evaluating
from kdhooks.paths import find
from kdhooks.points import Points
from kdhooks.stages import Stage
from kdhooks.taps import Taps
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.several import Teachers, numbered
from kdhooks.teacher.teacher import Teacher

Observe: TypeAlias = Callable[[Sequence[str]], Mapping[str, Tensor]]
_COLLECTED = ("embedding_tap", "feature_tap", "classifier_share", "parameter_tap")


class Declarations:
    """The methods of one run, registered with a plugin manager of their own."""

    def __init__(self, methods: Sequence[object], plugins: Sequence[object]) -> None:
        """methods: names, tables or objects; plugins: objects that answer `model_stages`."""
        no_list = isinstance(methods, str | bytes | Mapping | Set)  # a set has no order
        given = list(methods) if isinstance(methods, Iterable) and not no_list else []
        if not given:
            raise KDHooksError(
                f"methods must be a list of at least one method; found {shown(methods)}"
            )
        self._manager = pluggy.PluginManager("kdhooks")
        self._manager.add_hookspecs(Specs)
        self._methods = [create(method) for method in given]
        if len(set(map(id, self._methods))) < len(self._methods):
            raise KDHooksError("each method may run once; found the same object twice in methods")
        for plugin in (*plugins, *self._methods):
            self._register(plugin)
        adapting = [m for m in self._methods if "adapt_teacher" in self._hooks_of(m)]
        if len(adapting) > 1:
            names = " and ".join(type(m).__name__ for m in adapting)
            raise KDHooksError(f"one method at most may adapt the teacher; found {names}")
        self._views = [
            type(plugin).__name__
            for plugin in (*plugins, *self._methods)
            if "student_view" in self._hooks_of(plugin)
        ]
        if len(self._views) > 1:
            raise KDHooksError(
                "one plugin at most may return the student's view; found "
                f"{' and '.join(self._views)}; combine their views in one module"
            )

    def described(self) -> list[str]:
        """One line for each method, the same on ranks with the same methods."""
        return [f"the method {type(method).__name__}" for method in self._methods]

    def _register(self, plugin: object) -> None:
        who = type(plugin).__name__
        try:
            self._manager.register(plugin)
            self._manager.check_pending()
        except (pluggy.PluginValidationError, ValueError) as error:
            raise KDHooksError(f"{who} does not fit the hook specifications: {error}") from error
        if not self._hooks_of(plugin):
            raise KDHooksError(
                f"{who} declares nothing: mark at least one of "
                f"{', '.join(_COLLECTED)} with @hookimpl"
            )

    def _hooks_of(self, plugin: object) -> list[str]:
        return [caller.name for caller in self._manager.get_hookcallers(plugin) or ()]

    def points(self, model: nn.Module | None, embedding: str) -> Points | None:
        """Return the names of a model's submodules; plugins may know the backbone's stages."""
        if model is None:
            return None
        return Points.of(model, self._manager.hook.model_stages(model=model), embedding)

    def points_of(self, teacher: Teacher | Teachers) -> Points | None:
        """Return the teacher's names; those of several teachers start with a teacher's number."""
        if isinstance(teacher, Teacher):
            return self.points(teacher.module, teacher.embedding)
        names = {"embedding": ""}
        for number, one in enumerate(teacher.members):
            if (points := self.points(one.module, one.embedding)) is not None:
                names |= {
                    f"{number}.{name}": f"{number}.{path}" if path else str(number)
                    for name, path in points.names.items()
                }
        return Points(teacher.module, (), names)  # unknown which teacher's stages to pair

    def taps(self, student: Model, teacher: Model, head: ClassShard | None) -> tuple[Tap, ...]:
        """Return every method's taps, in the order of the methods, checked against both models."""
        taps: list[Tap] = []
        for method in self._methods:
            declared = self._declared_by(method, student, teacher)
            if not declared and not {"adapt_teacher", "student_view"} & {*self._hooks_of(method)}:
                raise KDHooksError(f"{type(method).__name__} declares nothing for these models")
            taps.extend(tap.resolved(student, teacher) for tap in declared)
        names = [tap.name for tap in taps]
        for name in names:
            if names.count(name) > 1:
                several = any(getattr(method, "term", None) == name for method in self._methods)
                way_out = (
                    "give each of them a `term` of its own"
                    if several
                    else "each method may run once"
                )
                raise KDHooksError(f"two terms are named '{name}'; {way_out}")
        for tap in taps:
            tap.check(student, teacher, head)
        return tuple(taps)

    def _declared_by(self, method: object, student: Model, teacher: Model) -> list[Tap]:
        others = [plugin for plugin in self._manager.get_plugins() if plugin is not method]
        taps: list[Tap] = []
        for name in _COLLECTED:
            caller = self._manager.subset_hook_caller(name, others)
            sides = {"student": student}
            if name != "parameter_tap":
                sides["teacher"] = teacher
            for tap in caller(**sides):
                if not isinstance(tap, Tap):
                    raise KDHooksError(
                        f"{type(method).__name__}.{name} must return a declaration or None; "
                        f"found {type(tap).__name__}"
                    )
                taps.append(tap)
        return taps

    def teacher_adapter(self, teacher: Model) -> nn.Module | None:
        adapter: nn.Module | None = self._manager.hook.adapt_teacher(teacher=teacher)
        if adapter is None or teacher.module is None:
            return None
        if teacher.joins > 1:
            raise KDHooksError(
                f"{type(adapter).__name__} can adapt only one teacher; found {teacher.joins}; "
                "distil from one teacher, or switch it off (in cakd: prompts = { number = 0 })"
            )
        frozen = {id(parameter) for parameter in teacher.module.parameters()}
        if any(id(parameter) in frozen for parameter in adapter.parameters()):
            raise KDHooksError(
                f"{type(adapter).__name__} holds the teacher as a child, which would train and "
                "save it; take the teacher as the first argument of forward instead"
            )
        return adapter

    def student_view(self, given: nn.Module | None) -> nn.Module | None:
        """Return the view that was passed to the run, or else the one that a plugin returns."""
        found: object = self._manager.hook.student_view()
        if found is None:
            return given
        (who,) = self._views
        if not isinstance(found, nn.Module):
            raise KDHooksError(
                f"{who}.student_view must return a module or None; found {shown(found)}"
            )
        if given is not None:
            raise KDHooksError(
                f"the student's view must come from one place; found student_view and {who}; "
                "leave one of them out, or combine both in one module"
            )
        return found


def chosen_stages(points: Points | None, paths: Sequence[str] | None, side: str) -> tuple[str, ...]:
    """Return the stages at the given paths, names and patterns; by default, the known stages."""
    if points is None:
        return tuple(paths or ())
    return points.stages if paths is None else points.several(paths, side)


@contextmanager
def _runs(side: str, images: Tensor) -> Iterator[None]:
    """Name the model and the setting to change if the first forward raises any other error."""
    try:
        yield
    except (KDHooksError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        size = ", or teacher.input.size to the size that the teacher takes"
        raise KDHooksError(
            f"the {side} must run on images of the shape {tuple(images.shape[1:])}; found "
            f"{type(error).__name__}: {error}; set input_shape to the shape of the training images"
            f"{size if side == 'teacher' else ''}"
        ) from error


def probe_student(
    module: nn.Module,
    embedding: str,
    stages: Sequence[str],
    images: Tensor,
    run: Callable[[Tensor], object] | None = None,
    points: Points | None = None,
) -> Model:
    """Probe the student by forwards in eval mode without gradients, which leave it unchanged."""

    def observe(paths: Sequence[str]) -> Mapping[str, Tensor]:
        taps = Taps(module, [embedding, *paths], "student")
        try:
            with evaluating(module), torch.no_grad(), taps, _runs("student", images):
                (run or module)(images)
            return taps.take()
        finally:
            taps.remove()

    outputs, probed = _probed(module, stages, "student", observe)
    found = outputs[embedding]
    if found.ndim != 2:
        raise KDHooksError(
            f"student embedding '{embedding or 'output'}' must be (b d); found shape "
            f"{tuple(found.shape)}; name the submodule that returns it as taps.student.embedding"
        )
    return Model(module, found.shape[1], probed, probe=_prober(module, observe), points=points)


def probe_teacher(
    teacher: Teacher, stages: Sequence[str], images: Tensor, points: Points | None = None
) -> Model:
    """Probe one teacher, in a session of its own."""

    def observe(paths: Sequence[str]) -> Mapping[str, Tensor]:
        with TeacherSession(teacher, paths) as session, _runs("teacher", images):
            output = session(images)
        return {**output.features, teacher.embedding: output.embedding}

    probed: tuple[Stage, ...] = ()
    if teacher.stored is not None and not stages:  # it holds none of random images
        teacher.stored.check_shape(tuple(images.shape[1:]))
        dim = teacher.stored.dim
    else:
        outputs, probed = _probed(teacher.module, stages, "teacher", observe)
        dim = outputs[teacher.embedding].shape[1]
    rows = teacher.classifier
    if rows is not None and rows.dim != dim == rows.total:
        raise KDHooksError(
            f"teacher classifier must have the shape (c e), one row per class; found {rows.total} "
            f"rows of width {rows.dim}, but the embedding is {dim} wide: it is transposed; save "
            "its transpose, weight.T"
        )
    if rows is not None and rows.dim != dim:
        raise KDHooksError(
            f"teacher classifier has rows of width {rows.dim}, but the teacher's embedding is "
            f"{dim} wide; use the classifier that was trained with this teacher"
        )
    prober = _prober(teacher.module, observe)
    return Model(teacher.module, dim, probed, rows, probe=prober, points=points)


def probe_teachers(
    teacher: Teacher | Teachers,
    stages: Sequence[str],
    images: Tensor,
    points: Points | None = None,
) -> Model:
    """Probe one teacher; or probe each of several teachers, and join them into one model."""
    if isinstance(teacher, Teacher):
        return probe_teacher(teacher, stages, images, points)
    models: list[Model] = []
    found: dict[str, Stage] = {}
    for number, paths in enumerate(teacher.split(stages)):
        with numbered(number):
            models.append(probe_teacher(teacher.members[number], list(paths), images))
        known = zip(models[number].stages, paths.values(), strict=False)  # a function has none
        found.update({path: _renamed(stage, path, number) for stage, path in known})
    dim = sum(model.embedding_dim for model in models)

    def probe(path: str) -> Stage:
        if path == "":
            return Stage("", (dim,))
        number, inner = teacher.place(path)
        with numbered(number):
            return _renamed(models[number].stage(inner, "teacher"), path, number)

    return Model(
        teacher.module,
        dim,
        tuple(found[path] for path in stages if path in found),
        teacher.classifier,
        without_rows="".join(f" for teacher {number}" for number in teacher.without_rows),
        joins=len(models),
        probe=probe,
        points=points,
    )


def _renamed(stage: Stage, path: str, number: int) -> Stage:
    """Return a stage of one of several teachers under the path that starts with its number."""
    fault = stage.probed
    if isinstance(fault, KDHooksError):
        fault = KDHooksError(f"teacher {number}: {fault}")
    return replace(stage, path=path, probed=fault)


def _prober(module: nn.Module | None, observe: Observe) -> Callable[[str], Stage] | None:
    """Return a function that probes any other submodule; each call runs one forward."""
    if module is None:
        return None
    return lambda path: Stage.of(module, path, observe([path])[path])


def _probed(
    module: nn.Module | None,
    paths: Sequence[str],
    side: str,
    observe: Observe,
) -> tuple[Mapping[str, Tensor], tuple[Stage, ...]]:
    """Return the outputs of a forward, and the stages.

    A stage that cannot be tapped keeps its error, which is raised only if a method taps it.
    observe: runs a forward, and returns the outputs at the paths and the embedding.
    """
    if module is None:
        return observe(paths), ()
    for path in paths:
        find(module, path, side)
    faults: dict[str, KDHooksError] = {}
    try:
        outputs = observe(paths)
    except KDHooksError:
        outputs = observe([])  # a fault of the embedding is raised now
        for path in paths:
            try:
                outputs = {**observe([path]), **outputs}
            except KDHooksError as error:
                faults[path] = KDHooksError(
                    f"{error}; stages are named, shallow to deep, as taps.{side}.stages in the "
                    f"recipe, or {side}_stages="
                )
    return outputs, tuple(
        Stage(path, faults[path]) if path in faults else Stage.of(module, path, outputs[path])
        for path in paths
    )
