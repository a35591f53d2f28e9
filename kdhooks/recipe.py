"""The recipe, a checked description of a distillation for any host; `build` makes a Distiller."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from kdhooks.classes.shards import ClassShard
from kdhooks.discovery import create
from kdhooks.distiller import Distiller
from kdhooks.errors import KDHooksError
from kdhooks.generators import undisturbed_generators
from kdhooks.kinds import Option, shown
from kdhooks.options import REQUIRED, Options, check_arguments, option, read
from kdhooks.recipe_files import read_recipe_file
from kdhooks.schedules import Scheduled
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.from_table import build_from_table
from kdhooks.teacher.several import numbered
from kdhooks.teacher.table import NetworkFactory, TeacherTable
from kdhooks.teacher.teacher import Teacher
from kdhooks.tensor_files import user_path
from kdhooks.views.student_view import StudentView, ViewTable

_UNNAMED = {  # JSON Schema of a teacher's table that does not specify the embedding
    "not": {"type": "object", "anyOf": [{"required": ["embedding"]}, {"required": ["embeddings"]}]}
}


class SideTaps(Options, subject="recipe: taps"):
    """The tapped submodules of one model."""

    embedding: str | None = option(
        None,
        "The submodule that returns the embedding; by default the one that the host finds, or "
        "else the whole model.",
    )
    stages: tuple[str, ...] | None = option(
        None,
        "The last submodule of each stage, from shallow to deep: paths, names such as stage3, or "
        "patterns such as layer[1-4]; by default the stages of a known backbone.",
    )


class TapsTable(Options, subject="recipe: taps"):
    """The tapped submodules of both models."""

    student: SideTaps = option(SideTaps(), "The student's submodules.")
    teacher: SideTaps = option(SideTaps(), "The teacher's submodules.")


class Recipe(Options):
    """A recipe, checked as far as possible without the models."""

    teacher: TeacherTable | tuple[TeacherTable, ...] = option(
        REQUIRED, "The frozen network to learn from; for several teachers, a list of tables."
    )
    methods: Sequence[object] = option(
        REQUIRED, 'The methods: "name", or { name = "…", weight = …, and its options }.'
    )
    taps: TapsTable = option(TapsTable(), "The tapped submodules of both models.")
    input_shape: tuple[int, int, int] = option(
        (3, 112, 112), "Channels, height and width of the training images.", least=1
    )
    student_view: ViewTable | nn.Module | None = option(
        None, "Changes to the student's training images; the teacher sees the unchanged images."
    )
    labels: bool = option(
        True, "Whether the images have labels. If not, methods that need labels are refused."
    )
    task_weight: Scheduled = option(1.0, "The factor of the trainer's own loss.", least=0)
    log_teacher_accuracy: int = option(
        100,
        "The interval at which the log shows the teacher's accuracy on the batch, if a term uses "
        "the teacher's class rows; 0: never.",
        least=0,
        unit="steps",
    )
    seed: int = option(
        0,
        "The seed of the losses' initial weights and of the student's views.",
        least=0,
        most=2**63 - 1,
    )
    nonfinite: Literal["raise", "skip"] = option(
        "raise",
        "The reaction to a term that is not finite: raise an error, or skip all terms of the step.",
    )
    sharded: bool = option(
        True,
        "Whether each rank keeps the methods' class tables for its own classes only. If not, every "
        "rank keeps them for all classes, except the teacher's rows if the head is split.",
    )
    table_dtype: Literal["float32", "float16"] = option(
        "float32",
        "The precision of class rows that training does not change: the teacher's, and "
        "coupleface's prototypes.",
    )

    rules: ClassVar[Mapping[str, Any]] = {
        # The teacher's embedding may be specified in one place only.
        "if": {
            "required": ["taps"],
            "properties": {
                "taps": {
                    "required": ["teacher"],
                    "properties": {"teacher": {"required": ["embedding"]}},
                }
            },
        },
        "then": {
            "properties": {"teacher": {"maxItems": 1, "items": _UNNAMED, **_UNNAMED}},
        },
    }

    def check(self) -> None:
        if not self.methods:
            raise self.refused("methods", "must be a list of at least one; found []")
        object.__setattr__(self, "methods", [create(method) for method in self.methods])
        if not self.teachers:
            raise self.refused("teacher", "must be at least one table; found []")
        if len(self.teachers) == 1:
            object.__setattr__(self, "teacher", self.teachers[0])
        if self.taps.teacher.embedding is not None:
            self._check_embedding()

    def _check_embedding(self) -> None:
        """Refuse a teacher's embedding that is specified in two places."""
        first, *others = self.teachers
        if others:
            raise self.refused(
                "taps.teacher.embedding",
                f"names a submodule of one teacher; found {len(self.teachers)} teachers; set "
                "embedding in the table of each teacher that needs it",
            )
        for key in ("embedding", "embeddings"):
            if getattr(first, key) is not None:
                raise self.refused(
                    "taps.teacher.embedding",
                    f"names the embedding, as teacher.{key} does; found both; leave out one of "
                    "them",
                )

    @property
    def teachers(self) -> tuple[TeacherTable, ...]:
        """The tables of all teachers; usually there is only one."""
        return (self.teacher,) if isinstance(self.teacher, TeacherTable) else self.teacher

    @classmethod
    def read(  # type: ignore[override]
        cls, source: "Recipe | Mapping[str, Any] | str | Path", subject: str = "recipe"
    ) -> "Recipe":
        """Read a dict or a TOML file; relative paths in a file start at the file's folder."""
        if isinstance(source, Recipe):
            return source
        if isinstance(source, str | Path):
            source = read_recipe_file(user_path(source, "recipe"), cls)
        if isinstance(source, Mapping):
            source = {**source, **_teachers_as_tables(source)}
        return read(cls, source, subject)

    def refuse_tables(self, host: str) -> None:
        """Refuse a table of embeddings by index, for a host whose loop passes no indices."""
        for table in self.teachers:
            is_file = table.embeddings is not None and table.embeddings.is_file()
            if is_file or isinstance(table.module, EmbeddingTable):
                found = f"the file '{table.embeddings}'" if is_file else "an EmbeddingTable"
                raise KDHooksError(
                    f"{host}: teacher.embeddings must be a folder, since this trainer passes no "
                    f"indices; found {found}; create the folder with kdhooks cache build, or call "
                    "kd(images, labels, indices=…) in a loop of your own"
                )


def _teachers_as_tables(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """Convert a `teacher` that is a module in Python, or a list with modules, to tables."""
    teacher = recipe.get("teacher", {})
    if isinstance(teacher, list | tuple):
        named = [(f"teacher[{place}]", one) for place, one in enumerate(teacher)]
        return {"teacher": [_as_table(one, name) for name, one in named]}
    return {"teacher": _as_table(teacher, "teacher")} if "teacher" in recipe else {}


def _as_table(teacher: object, name: str) -> object:
    if isinstance(teacher, Mapping | TeacherTable):
        return teacher
    if isinstance(teacher, type) or not callable(teacher):
        raise KDHooksError(
            f'recipe: {name} must be a table, such as {{ network = "r100", checkpoint = "…" }} or '
            f'{{ onnx = "…" }}, or in Python a module or a function; found {shown(teacher)}'
        )
    return {"module": teacher}


def build(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    student: nn.Module,
    *,
    network: NetworkFactory | Sequence[NetworkFactory] | None = None,
    head: ClassShard | None = None,
    host_head: Literal["margin"] | None = None,
    plugins: Sequence[object] = (),
    run_student: Callable[[Tensor], object] | None = None,
    steps_per_epoch: int | None = None,
    learnt_whole: bool = False,
) -> Distiller:
    """Create the Distiller that a recipe describes.

    network: the host's factory for `teacher.network`, or one factory for each teacher.
    The other arguments are those of `Distiller`.
    """
    recipe = Recipe.read(recipe)
    check_arguments("build", {"student": Option(nn.Module, REQUIRED)}, locals())
    # A student without parameters is refused below.
    first = next(student.parameters(), torch.empty(0))
    with undisturbed_generators(recipe.seed, first.device):
        teachers = build_teachers(recipe, network)
    return Distiller(
        student,
        teachers,
        recipe.methods,
        student_embedding=recipe.taps.student.embedding or "",
        run_student=run_student,
        student_stages=recipe.taps.student.stages,
        teacher_stages=recipe.taps.teacher.stages,
        head=head,
        host_head=host_head,
        input_shape=recipe.input_shape,
        student_view=_as_module(recipe.student_view),
        plugins=plugins,
        labels=recipe.labels,
        task_weight=recipe.task_weight,
        log_teacher_accuracy=recipe.log_teacher_accuracy,
        steps_per_epoch=steps_per_epoch,
        seed=recipe.seed,
        nonfinite=recipe.nonfinite,
        sharded=recipe.sharded,
        learnt_whole=learnt_whole,
        table_dtype=recipe.table_dtype,
    )


def build_teacher(
    recipe: Recipe, network: NetworkFactory | Sequence[NetworkFactory] | None = None
) -> Teacher:
    """Create only the teacher of a recipe, for `kdhooks.class_means`."""
    if len(recipe.teachers) > 1:
        raise KDHooksError(
            f"recipe: build_teacher builds a single teacher; found {len(recipe.teachers)}; "
            "build_teachers returns a list of them, and kdhooks.class_means takes one at a time"
        )
    return build_teachers(recipe, network)[0]


def build_teachers(
    recipe: Recipe, network: NetworkFactory | Sequence[NetworkFactory] | None = None
) -> list[Teacher]:
    """Create all teachers of a recipe, in its order. network: as for `build`."""
    tables = recipe.teachers
    factories = list(network) if isinstance(network, Sequence) else [network] * len(tables)
    if len(factories) != len(tables):
        raise KDHooksError(
            f"recipe: network must be one factory, or one for each of {len(tables)} teachers; "
            f"found {len(factories)}"
        )
    if len(tables) == 1:
        return [build_from_table(tables[0], recipe.taps.teacher.embedding, factories[0])]
    made = []
    for number, (table, factory) in enumerate(zip(tables, factories, strict=True)):
        with numbered(number):
            made.append(build_from_table(table, None, factory))
    return made


def _as_module(view: ViewTable | nn.Module | None) -> nn.Module | None:
    return StudentView.of(view) if isinstance(view, ViewTable) else view
