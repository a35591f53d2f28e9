"""The checks of `kdhooks doctor`, in the order in which one needs the other."""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ConstantLR

from kdhooks.asking import probe_student
from kdhooks.errors import KDHooksError
from kdhooks.first_step import check_class_order, check_teacher
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.teacher import Teacher
from kdhooks_integrations.arcface_torch import attach
from kdhooks_integrations.arcface_torch.commands import networks
from kdhooks_integrations.arcface_torch.commands.cost import held, measure
from kdhooks_integrations.arcface_torch.commands.faces import made_up, read_batch
from kdhooks_integrations.arcface_torch.commands.trial import Head, Trial
from kdhooks_integrations.arcface_torch.networks import teacher_factory

_DEFAULT_CLASSES = 1000
_GIB = 2**30


class Unchecked(Exception):
    """Why a check could not be made."""


class Examination:
    """What one check finds, the next one takes."""

    recipe: Recipe
    student: nn.Module
    width: int
    teacher: Teacher
    embedding: Tensor  # the teacher's, of the images
    images: Tensor
    labels: Tensor | None
    classes: int
    trial: Trial

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options

    def checks(self) -> list[tuple[str, Callable[[], str]]]:
        return [
            ("recipe", self.read_recipe),
            ("student", self.make_student),
            ("images", self.take_images),
            ("teacher", self.load_teacher),
            ("classes", self.compare_classes),
            ("class order", self.compare_order),
            ("taps", self.attach),
            ("step", self.take_step),
            ("gradients", self.trace_gradients),
            ("cost", self.weigh),
        ]

    def read_recipe(self) -> str:
        self.recipe = Recipe.read(self.options.recipe)
        names = [type(method).__name__ for method in self.recipe.methods]
        return f"{', '.join(names)}; images of {self.recipe.input_shape}"

    def make_student(self) -> str:
        given = self.options
        torch.manual_seed(0)
        self.student = networks.make(given.network, given.embedding_size, given.fp16)
        self.student.to(given.device)
        images = torch.zeros(2, *self.recipe.input_shape, device=given.device)
        probed = probe_student(self.student, self.recipe.embedding("student"), (), images)
        self.width = probed.embedding_dim
        return f"{given.network}, {_millions(self.student)}, embedding {self.width}"

    def take_images(self) -> str:
        given = self.options
        self.labels, self.classes = None, given.num_classes or 0
        if given.data is None:
            images = made_up(given.batch_size, self.recipe.input_shape)
            text = f"{given.batch_size} made up; --data FOLDER takes those of the training"
        else:
            images, labels, self.classes = read_batch(
                given.data,
                given.batch_size,
                given.num_classes,
                self.recipe.input_shape,
            )
            self.labels = labels.to(given.device)
            text = f"{given.batch_size} of {given.data}, of {len(set(labels.tolist()))} people"
        self.images = images.to(given.device)
        return text

    def load_teacher(self) -> str:
        self.teacher = build_teacher(self.recipe, teacher_factory(None, self.recipe))
        with TeacherSession(self.teacher) as session:
            output = session(self.images)
        self.embedding = output.embedding
        check_teacher(output, self.images)
        size = f"{_millions(self.teacher.module)}, " if self.teacher.module else ""
        return f"{size}embedding {output.embedding.shape[1]}, finite, and its images differ"

    def compare_classes(self) -> str:
        rows = self.teacher.classifier
        if rows is None:
            self.classes = self.classes or _DEFAULT_CLASSES
            raise Unchecked("the teacher comes without a classifier, and no class is compared")
        if self.classes not in (0, rows.total):
            raise KDHooksError(
                f"teacher classifier has {rows.total} classes, the training {self.classes}; they "
                "must be the same classes in the same order: take the classifier of a teacher of "
                "this data set, or class means made with kdhooks.class_means"
            )
        checked = f"{rows.total} of the teacher, of width {rows.dim}"
        if not self.classes:
            self.classes = rows.total
            raise Unchecked(f"{checked}; give --num-classes of the training to compare them")
        return f"{checked}, as many as in the training"

    def compare_order(self) -> str:
        rows = self.teacher.classifier
        if rows is None:
            raise Unchecked("there is no classifier")
        embedding = self.embedding
        if self.labels is None:
            # The first step compares as well: made-up faces are of whom the teacher takes them for.
            self.labels = rows.nearest(embedding)
            raise Unchecked("made-up faces are nobody's; give --data FOLDER of the training")
        check_class_order(rows, embedding, self.labels)
        hits = int((rows.nearest(embedding) == self.labels).sum())
        return f"{hits} of {len(self.labels)} images are nearest to their own class"

    def attach(self) -> str:
        if self.labels is None:
            self.labels = torch.arange(len(self.images), device=self.images.device) % self.classes
        head = Head(self.classes, self.width).to(self.images.device).train()
        models = [{"params": model.parameters()} for model in (self.student.train(), head)]
        optimizer = torch.optim.SGD(models, lr=0.1)
        attachment = attach(self.student, head, optimizer, ConstantLR(optimizer), self.recipe)
        self.trial = Trial(self.student, head, attachment, self.images, self.labels)
        taps = [tap.described() for tap in attachment.distiller.taps]
        if not head.weight.requires_grad:
            taps.append("the head holds the teacher's rows, frozen")
        return "; ".join(taps)

    def take_step(self) -> str:
        loss = self.trial.step()
        metrics = self.trial.attachment.distiller.metrics
        taps = self.trial.attachment.distiller.taps
        values = "".join(f", {tap.name} {float(metrics[tap.name]):.4g}" for tap in taps)
        return f"loss {float(loss):.4g} in all; before its weight{values or ' nothing else'}"

    def trace_gradients(self) -> str:
        found = self.trial.gradients()
        return ", ".join(f"{name} {length:.3g}" for name, (_, length) in found.items())

    def weigh(self) -> str:
        trial, batch = self.trial, len(self.images)
        whole = measure(trial)
        distiller = trial.attachment.distiller
        modules = [trial.backbone, trial.head]
        fixed = held([*modules, distiller], 3) + held(
            [self.teacher.module] if self.teacher.module else [], 1
        )
        plain_fixed = held(modules, 3)
        trial.attachment.remove()
        plain = measure(trial)
        hours = whole.seconds / batch * 1e6 / 3600
        return (
            f"a batch of {batch} takes {whole.seconds:.3g} s, {plain.seconds:.3g} s undistilled; a "
            f"million images {hours:.2g} hours; memory about {(whole.bytes + fixed) / _GIB:.2g} "
            f"GiB, {(plain.bytes + plain_fixed) / _GIB:.2g} GiB undistilled; on {self._device()}"
        )

    def _device(self) -> str:
        if self.images.device.type == "cuda":
            return torch.cuda.get_device_name()
        return "a CPU, which says little of a GPU's time"


def _millions(module: nn.Module) -> str:
    return f"{sum(p.numel() for p in module.parameters()) / 1e6:.3g} million weights"
