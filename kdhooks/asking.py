"""Collects the declarations of the methods for two models."""

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import replace

import pluggy
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.classes.splits import ClassTables
from kdhooks.declarations import Model, Tap
from kdhooks.discovery import create
from kdhooks.errors import KDHooksError
from kdhooks.hookspecs import Specs
from kdhooks.kinds import shown
from kdhooks.options import Options
from kdhooks.points import Points
from kdhooks.probing import probe_student, probe_teachers
from kdhooks.teacher.several import Teachers, inside
from kdhooks.teacher.teacher import Teacher

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
        lines = []
        for method in self._methods:
            options = method.described() if isinstance(method, Options) else ""
            lines.append(f"the method {type(method).__name__}{options and f' with {options}'}")
        return lines

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

    def student(
        self,
        module: nn.Module,
        embedding: str,
        stages: Sequence[str] | None,
        images: Tensor,
        run: Callable[[Tensor], object] | None,
    ) -> Model:
        """Probe the student on images (b 3 h w), at the stages that are named or known."""
        points = self._points(module, embedding)
        named = _chosen_stages(points, stages, "student")
        return probe_student(module, embedding, named, images, run, points)

    def teacher(
        self,
        teacher: Teacher | Teachers,
        stages: Sequence[str] | None,
        images: Tensor,
        tables: ClassTables,
    ) -> Model:
        """Probe the teachers on images (b 3 h w), at the stages that are named or known."""
        points = self._points_of(teacher)
        named = _chosen_stages(points, stages, "teacher")
        return replace(probe_teachers(teacher, named, images, points), tables=tables)

    def _points(self, model: nn.Module | None, embedding: str) -> Points | None:
        """Return the names of a model's submodules; plugins may know the backbone's stages."""
        if model is None:
            return None
        return Points.of(model, self._manager.hook.model_stages(model=model), embedding)

    def _points_of(self, teacher: Teacher | Teachers) -> Points | None:
        """Return the teacher's names; those of several teachers start with a teacher's number."""
        if isinstance(teacher, Teacher):
            return self._points(teacher.module, teacher.embedding)
        names = {"embedding": ""}
        for number, one in enumerate(teacher.members):
            points = self._points(one.module, one.embedding)
            names |= {
                f"{number}.{name}": inside(number, path)
                for name, path in (points.names if points else {"embedding": ""}).items()
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


def _chosen_stages(
    points: Points | None, paths: Sequence[str] | None, side: str
) -> tuple[str, ...]:
    """Return the stages at the given paths, names and patterns; by default, the known stages."""
    if points is None:
        return tuple(paths or ())
    return points.stages if paths is None else points.several(paths, side)
