"""The checks of `kdhooks doctor`, in order; each uses the results of those before it."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

from kdhooks.errors import KDHooksError, listed
from kdhooks.first_step import check_class_order, check_teacher
from kdhooks.probing import probe_student
from kdhooks.recipe import Recipe, build_teachers
from kdhooks.teacher.session import TeacherOutput
from kdhooks.teacher.sessions import open_session
from kdhooks.teacher.several import Teachers, one_or_several
from kdhooks.teacher.teacher import Teacher
from kdhooks.views.viewing import viewed
from kdhooks_integrations.arcface_torch import attach
from kdhooks_integrations.arcface_torch.commands import networks
from kdhooks_integrations.arcface_torch.commands.cost import held, measure
from kdhooks_integrations.arcface_torch.commands.faces import made_up, read_batch
from kdhooks_integrations.arcface_torch.commands.settings import Settings
from kdhooks_integrations.arcface_torch.commands.sides import write_sides
from kdhooks_integrations.arcface_torch.commands.trial import Head, Trial
from kdhooks_integrations.arcface_torch.networks import teacher_factories

_NO_LABELS = "labels = false, and no class is compared"
_DEFAULT_CLASSES = 1000
_EPOCH = 1000  # steps in an epoch, for schedules; doctor runs only the first step
_GIB = 2**30


class Unchecked(Exception):
    """The reason why a check was not possible."""


class Doubtful(Exception):
    """A conclusion that does not stop the training, but is most likely not intended."""


class Examination:
    """The checks of one recipe; each of them uses the results of those before it."""

    recipe: Recipe
    student: nn.Module
    width: int
    teacher: Teacher | Teachers
    outputs: list[tuple[str, Teacher, TeacherOutput]]  # name, teacher and its output for images
    images: Tensor
    labels: Tensor | None
    disputed: bool = False  # whether labels of random images would depend on the teacher
    classes: int
    trial: Trial

    def __init__(
        self,
        settings: Settings,
        installs: Sequence[str],
        recipe: Path,
        data: str | None,
        device: torch.device,
        picture: Path,
    ) -> None:
        """
        installs: recipes that the config itself installs.
        picture: the file to write with the images of teacher and student.
        """
        self.settings, self.installs = settings, installs
        self.path, self.data, self.device, self.picture = recipe, data, device, picture
        sources = settings.sources
        self.facts: dict[str, Any] = {  # for the report in JSON
            "settings": {
                name: {"value": value, "source": sources[name]}
                for name, value in settings.values().items()
            },
            "gradients": None,
            "cost": None,
        }

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("settings", self.describe_settings),
            ("recipe", self.read_recipe),
            ("student", self.make_student),
            ("images", self.take_images),
            ("teacher", self.load_teacher),
            ("classes", self.compare_classes),
            ("class order", self.compare_order),
            ("taps", self.attach),
            ("view", self.show_view),
            ("step", self.take_step),
            ("gradients", self.compare_gradients),
            ("cost", self.weigh),
        ]

    def describe_settings(self) -> str:
        text = self.settings.described()
        others = [name for name in self.installs if Path(name).resolve() != self.path.resolve()]
        if others:
            raise Doubtful(
                f"{text}; the config itself installs the recipe '{others[-1]}', but this report is "
                f"about '{self.path}'"
            )
        return text

    def read_recipe(self) -> str:
        self.recipe = Recipe.read(self.path)
        self.recipe.refuse_tables("arcface_torch")
        names = [type(method).__name__ for method in self.recipe.methods]
        return f"{', '.join(names)}; images of {self.recipe.input_shape}"

    def make_student(self) -> str:
        given = self.settings
        torch.manual_seed(0)
        self.student = networks.make(
            given.network, given.asked("embedding_size"), given.asked("fp16")
        )
        self.student.to(self.device)
        images = torch.zeros(2, *self.recipe.input_shape, device=self.device)
        probed = probe_student(self.student, self.recipe.taps.student.embedding or "", (), images)
        self.width = probed.embedding_dim
        if given.embedding_size not in (None, self.width):
            raise KDHooksError(
                f"{given.network}: the embedding must have as many numbers as the head expects, "
                f"embedding_size {given.embedding_size} ({given.sources['embedding_size']}); found "
                f"{self.width}; set embedding_size to {self.width}, or name another network"
            )
        half = ", in float16 only on a GPU" if given.fp16 and self.device.type == "cpu" else ""
        return f"{given.network}, {_millions(self.student)}, embedding {self.width}{half}"

    def take_images(self) -> str:
        count, classes = self.settings.batch_size, self.settings.num_classes
        self.labels, self.classes = None, classes or 0
        if self.data is None:
            images = made_up(count, self.recipe.input_shape)
            text = f"{count} random images; --data FOLDER uses those of the training"
        else:
            images, labels, self.classes = read_batch(
                self.data, count, classes, self.recipe.input_shape
            )
            self.labels = labels.to(self.device)
            text = f"{count} of {self.data}, of {len(set(labels.tolist()))} people"
        self.images = images.to(self.device)
        return text

    def load_teacher(self) -> str:
        factories = teacher_factories(None, self.recipe)
        self.teacher = one_or_several(build_teachers(self.recipe, factories))
        members = self.teacher.members if isinstance(self.teacher, Teachers) else [self.teacher]
        if self.data is None and any(one.stored is not None for one in members):
            raise KDHooksError(
                "--data is needed if a cache replaces the teacher, since the cache has no "
                "embeddings of random images; specify the folder of the training data"
            )
        with open_session(self.teacher) as session:
            self.outputs = session.of_each(session(self.images))
        found = []
        for who, teacher, output in self.outputs:
            check_teacher(output, self.images, who)
            size = f"{_millions(teacher.module)}, " if teacher.module else ""
            start = f"{who}: " if len(self.outputs) > 1 else ""
            width = output.embedding.shape[1]
            found.append(f"{start}{size}embedding {width}, finite, different for each image")
        return "; ".join(found)

    def compare_classes(self) -> str:
        rows = self.teacher.classifier
        if rows is None:
            self.classes = self.classes or _DEFAULT_CLASSES
            without = self.teacher.without_rows if isinstance(self.teacher, Teachers) else []
            who = f"teacher {listed(map(str, without))}" if without else "the teacher"
            raise Unchecked(f"{who} has no classifier, and no class is compared")
        if not self.recipe.labels:
            self.classes = self.classes or _DEFAULT_CLASSES
            raise Unchecked(_NO_LABELS)
        if self.classes not in (0, rows.total):
            raise KDHooksError(
                f"teacher classifier has {rows.total} classes, the training {self.classes}; they "
                "must be the same classes in the same order: use the classifier of a teacher that "
                "was trained on this data set, or class means from kdhooks.class_means"
            )
        checked = f"{rows.total} of the teacher, of width {rows.dim}"
        if not self.classes:
            self.classes = rows.total
            raise Unchecked(
                f"{checked}; specify --config or --num-classes of the training to compare them"
            )
        return f"{checked}, as many as in the training"

    def compare_order(self) -> str:
        with_rows = [
            (who, teacher.classifier, output.embedding)
            for who, teacher, output in self.outputs
            if teacher.classifier is not None
        ]
        if not with_rows:
            raise Unchecked("there is no classifier")
        if not self.recipe.labels:
            raise Unchecked(_NO_LABELS)
        if self.labels is None:
            # The first step also compares labels with the teacher's classes, so each random image
            # gets the class that the teacher finds for it.
            _, rows, embedding = with_rows[0]
            _, self.labels = rows.nearest(embedding)
            self.disputed = len(with_rows) > 1
            raise Unchecked("random images have no class; specify --data FOLDER of the training")
        found = []
        for who, rows, embedding in with_rows:
            warning = check_class_order(rows, embedding, self.labels, who)
            hits = int((rows.nearest(embedding)[1] == self.labels).sum())
            start = f"{who}: " if len(self.outputs) > 1 else ""
            text = f"{start}{hits} of {len(self.labels)} images are closest to their own class"
            found.append(f"{text}; {warning}" if warning else text)
        return "; ".join(found)

    def attach(self) -> str:
        if self.labels is None:
            self.labels = torch.arange(len(self.images), device=self.images.device) % self.classes
        given = self.settings
        head = Head(self.classes, self.width, given).to(self.device).train()
        models = [{"params": model.parameters()} for model in (self.student.train(), head)]
        optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(models, given.lr, momentum=0.9, weight_decay=given.weight_decay)
            if given.optimizer == "sgd"
            else torch.optim.AdamW(models, given.lr, weight_decay=given.weight_decay)
        )
        attachment = attach(
            self.student,
            head,
            optimizer,
            ConstantLR(optimizer),
            self.recipe,
            accumulation=given.gradient_acc,
            steps_per_epoch=_EPOCH,
        )
        if self.disputed and (attachment.distiller.labelled or attachment.distiller.inherited):
            attachment.remove()
            raise KDHooksError(
                "--data is needed if several teachers have class rows, since they would assign "
                "different classes to random images; specify the folder of the training data"
            )
        self.trial = Trial(self.student, head, attachment, self.images, self.labels)
        taps = [tap.described() for tap in attachment.distiller.taps]
        if not head.weight.requires_grad:
            taps.append("the head holds the teacher's rows, frozen")
        return "; ".join(taps)

    def show_view(self) -> str:
        view = self.trial.attachment.distiller.student_view
        if view is None:
            raise Unchecked("the student sees the trainer's images, as the teacher does")
        if find_spec("PIL") is None:
            raise Unchecked("the picture needs Pillow; pip install pillow")
        return write_sides(
            self.picture, self.images, viewed(view, self.images, seed=self.recipe.seed)
        )

    def take_step(self) -> str:
        loss = self.trial.step()
        metrics = self.trial.attachment.distiller.metrics
        taps = self.trial.attachment.distiller.taps
        values = "".join(f", {tap.name} {float(metrics[tap.name]):.4g}" for tap in taps)
        return f"total loss {float(loss):.4g}; terms before their weights{values or ': none'}"

    def compare_gradients(self) -> str:
        balance = self.trial.balance()
        self.facts["gradients"] = balance.as_json()
        if conclusions := balance.conclusions():
            raise Doubtful("; ".join([balance.described(), *conclusions]))
        return balance.described()

    def weigh(self) -> str:
        trial, batch = self.trial, len(self.images)
        whole = measure(trial)
        distiller = trial.attachment.distiller
        modules = [trial.backbone, trial.head]
        copies = 3 if self.settings.optimizer == "sgd" else 4
        fixed = held([*modules, distiller], copies) + held(
            [self.teacher.module] if self.teacher.module else [], 1
        )
        plain_fixed = held(modules, copies)
        trial.attachment.remove()
        plain = measure(trial)
        memory, plain_memory = whole.bytes + fixed, plain.bytes + plain_fixed
        self.facts["cost"] = {
            "seconds": whole.seconds,
            "undistilled_seconds": plain.seconds,
            "bytes": memory,
            "undistilled_bytes": plain_memory,
            "device": str(self.device),
        }
        hours = whole.seconds / batch * 1e6 / 3600
        return (
            f"a batch of {batch} takes {whole.seconds:.3g} s, {plain.seconds:.3g} s undistilled; a "
            f"million images take {hours:.2g} hours; memory about {memory / _GIB:.2g} "
            f"GiB, {plain_memory / _GIB:.2g} GiB undistilled; on {self._device()}"
        )

    def _device(self) -> str:
        if self.images.device.type == "cuda":
            return torch.cuda.get_device_name()
        return "a CPU, so the time says little about a GPU"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.3g} million weights"
