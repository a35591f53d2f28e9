"""Class means stand in for a classifier."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kdhooks import KDHooksError, Teacher, class_means
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import tiny_batch, tiny_teacher


@pytest.mark.parametrize("flip", [False, True])
def test_class_means_equal_the_plain_computation(flip: bool) -> None:
    teacher = tiny_teacher()
    session = TeacherSession(teacher)
    images, labels = tiny_batch(copies=3)
    labels[4] = -1
    found = class_means(teacher, [(images[:7], labels[:7]), (images[7:], labels[7:])], 6, flip=flip)
    for label in range(6):
        total = torch.zeros(12)
        for image, own in zip(images, labels, strict=True):
            if own == label:
                views = [image, image.flip(-1)] if flip else [image]
                for view in views:
                    total += F.normalize(session(view[None]).embedding)[0]
        torch.testing.assert_close(found[label], F.normalize(total, dim=0))


def test_they_find_their_own_classes() -> None:
    teacher = tiny_teacher()
    images, labels = tiny_batch()
    rows = Teacher(teacher.module, classifier=class_means(teacher, [(images, labels)], 6))  # type: ignore[arg-type]
    assert rows.classifier is not None
    assert torch.equal(rows.classifier.nearest(TeacherSession(teacher)(images).embedding), labels)


def test_every_class_needs_an_image_and_every_label_a_class() -> None:
    teacher = tiny_teacher()
    images, labels = tiny_batch()
    with pytest.raises(KDHooksError, match=r"1 of 7 have none \(the first: \[6\]\)"):
        class_means(teacher, [(images, labels)], 7)
    with pytest.raises(KDHooksError, match="labels run from 0 to 4; found 5"):
        class_means(teacher, [(images, labels)], 5)
    with pytest.raises(KDHooksError, match="6 of 6 have none"):
        class_means(teacher, [], 6)


# --- stopped and gone on with ----------------------------------------------------------------


class Counted:
    """A teacher that counts the images it sees; or another one."""

    def __init__(self, dim: int = 12, turned: bool = False) -> None:
        self.seen, self._turned = 0, turned
        self._model = tiny_teacher(dim).module

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        assert self._model is not None
        embedding: Tensor = self._model(images)
        return embedding.flip(1) if self._turned else embedding


def batches_until(stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Six batches of three images; an interruption comes in the place of one."""
    images, labels = tiny_batch(copies=3)
    for number in range(6):
        if number == stop:
            raise KeyboardInterrupt
        yield images[3 * number : 3 * number + 3], labels[3 * number : 3 * number + 3]


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pass that stopped in the middle: four of six batches are kept, two by two."""
    monkeypatch.setattr("kdhooks.teacher.class_means.SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        class_means(Teacher(Counted()), batches_until(5), 6, save=tmp_path / "sums")
    return tmp_path / "sums"


def test_a_stopped_pass_goes_on_where_it_was(partial: Path) -> None:
    straight = class_means(Teacher(Counted()), batches_until(), 6)
    counted = Counted()
    torch.testing.assert_close(
        class_means(Teacher(counted), batches_until(), 6, save=partial), straight, rtol=0, atol=0
    )
    assert counted.seen == 2 * 2 * 3 + 1  # two batches, mirrored too, and the probe
    counted = Counted()
    class_means(Teacher(counted), batches_until(), 6, save=partial)
    assert counted.seen == 1


def test_sums_of_another_pass_are_refused(partial: Path) -> None:
    for teacher, options in (
        (Counted(turned=True), {}),
        (Counted(dim=9), {}),
        (Counted(), {"flip": False}),
    ):
        with pytest.raises(KDHooksError, match="started with another teacher, number of classes"):
            class_means(Teacher(teacher), batches_until(), 6, save=partial, **options)
    with pytest.raises(KDHooksError, match="started with another teacher, number of classes"):
        class_means(Teacher(Counted()), batches_until(), 7, save=partial)
    swapped = [(images, labels.flip(0)) for images, labels in batches_until()]
    with pytest.raises(KDHooksError, match="summed over 4 batches with other labels"):
        class_means(Teacher(Counted()), swapped, 6, save=partial)
