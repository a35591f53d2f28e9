"""Probes the student and the teachers, by forwards that leave them unchanged."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from kdhooks.declarations import Model
from kdhooks.errors import KDHooksError
from kdhooks.modes import evaluating
from kdhooks.paths import find
from kdhooks.points import Points
from kdhooks.stages import Stage
from kdhooks.taps import Taps
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.several import Teachers, numbered
from kdhooks.teacher.teacher import Teacher

Observe: TypeAlias = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""Runs a forward, and returns the outputs at the paths and the embedding."""


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
    prober = _prober(module, observe)
    return Model(module, found.shape[1], probed, embedding=embedding, probe=prober, points=points)


def probe_teacher(
    teacher: Teacher, stages: Sequence[str], images: Tensor, points: Points | None = None
) -> Model:
    """Probe one teacher, in a session of its own."""

    def observe(paths: Sequence[str]) -> Mapping[str, Tensor]:
        with TeacherSession(teacher, paths) as session, _runs("teacher", images):
            output = session(images)
        return {**output.features, teacher.embedding: output.embedding}

    probed: tuple[Stage, ...] = ()
    if teacher.stored is not None and not any(stages):  # it holds none of random images
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
    return Model(
        teacher.module,
        dim,
        probed,
        rows,
        embedding=teacher.embedding,
        probe=prober,
        points=points,
    )


def probe_teachers(
    teacher: Teacher | Teachers,
    stages: Sequence[str],
    images: Tensor,
    points: Points | None,
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
