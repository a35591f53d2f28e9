"""The source of a setting's students: its teacher, and the teacher's outputs for all images."""

from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.papers.locks import locked
from benchmarks.papers.material import Outputs, lesson
from benchmarks.papers.rows import TEACHER
from benchmarks.papers.settings import Setting
from kdhooks.errors import KDHooksError
from kdhooks.onnx.to_torch import to_torch
from kdhooks.paths import find
from kdhooks.teacher.input_transform import InputTransform
from kdhooks.teacher.several import Teachers
from kdhooks.teacher.teacher import Teacher
from kdhooks.tensor_files import write_tensors
from kdhooks_demo.faces import Faces
from kdhooks_demo.lesson import Lesson
from kdhooks_demo.main import teacher_of
from kdhooks_demo.training import Row, Settings, loaded, train

SEED = 0  # of the teachers that are trained here
AGAIN = "the teacher is trained again"
FCD = {"name": "fcd", "weight": 32.0}


class School:
    """The images of a setting, its teacher, and the teacher's outputs.

    Everything that takes long is kept in a folder: the outputs, and the weights of a teacher that
    is trained here.
    """

    def __init__(
        self, setting: Setting, faces: Faces, file: str | None, folder: Path, device: torch.device
    ) -> None:
        """faces: of everybody who is not tested. file: the one that replaces SFace, if any.

        KDHooksError: the teacher lacks a stage that the setting records.
        """
        self.setting = setting
        self.sface = _sface(file)
        _check_stages(self.sface, setting)
        self.folder = folder
        self._faces, self._device = faces, device

    @cached_property
    def _views(self) -> Faces:
        return self.setting.images.views(self._faces)

    @cached_property
    def teacher(self) -> Teacher | Teachers:
        """SFace, or the network that was distilled from it by FCD alone, or several of these."""
        return Teachers(self._each) if self.setting.teachers else self._each[0]

    @cached_property
    def _each(self) -> list[Teacher]:
        return [self._of(setting) for setting in self.setting.teachers or (self.setting,)]

    def _of(self, setting: Setting) -> Teacher:
        """Return the teacher of that setting, trained on the images of this one."""
        taught = setting.taught
        if taught is None:
            return self.sface
        outputs = self._outputs(self.sface, recorded=False)
        network = taught.student(outputs.embedding.shape[1])
        name = f"teacher-{setting.name}-{taught.images_seen}-{outputs.folder.name}.pt"
        file = self.folder / name
        with locked(file):
            if not file.is_file() or not loaded(network, file, "teacher", AGAIN):
                network = self._taught(taught, outputs, setting.name, file)
                write_tensors(network.state_dict(), file, "teacher")
        return Teacher(network.eval(), channels_last=self._device.type == "cpu")

    def _taught(self, taught: Settings, outputs: Outputs, name: str, file: Path) -> nn.Module:
        """Train a teacher, or continue its training. file: the one for its weights at the end."""
        course = lesson(self.setting.images, self._views, [outputs], set())
        row = Row(TEACHER, [FCD], labels=0.0)
        with tqdm(total=taught.steps, desc=f"teacher of setting {name}") as bar:

            def progress(steps: int, loss: float) -> None:
                bar.update(steps)

            begun = file.with_suffix(".begun.pt")
            trained = train(course.to(self._device), row, taught, SEED, progress, kept=begun)
        return trained.student.cpu()

    def lesson(self, left_out: set[str]) -> Lesson:
        """Return the training material without the people in `left_out`."""
        setting = self.setting
        outputs = [self._outputs(one, recorded=True) for one in self._each]
        return lesson(
            setting.images,
            self._views,
            outputs,
            left_out,
            self._each[0].module if setting.teacher_stages else None,
            setting.teacher_stages,
        )

    def _outputs(self, teacher: Teacher, recorded: bool) -> Outputs:
        stages = self.setting.recorded if recorded else {}
        return Outputs(self.folder, self._views.images, teacher, stages, self._device)


def _sface(file: str | None) -> Teacher:
    """Load SFace as a torch module, since its stages are tapped."""
    if file is None:
        return teacher_of(None)
    network = to_torch(file)
    transform = InputTransform(size=network.size, mean=network.mean, std=network.std)
    return Teacher(network, transform=transform, channels_last=True)


def _check_stages(teacher: Teacher, setting: Setting) -> None:
    """Refuse a teacher that lacks a stage, before it embeds thousands of images."""
    assert teacher.module is not None
    for path in setting.recorded.values():
        try:
            find(teacher.module, path, "teacher")
        except KDHooksError as error:
            raise KDHooksError(
                f"setting {setting.name} records features of the teacher, but the {error}; name "
                f"{len(setting.recorded)} stages of this teacher with --teacher-stages"
            ) from error
