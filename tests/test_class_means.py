"""Class means can replace a classifier."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    assert torch.equal(
        rows.classifier.nearest(TeacherSession(teacher)(images).embedding)[1], labels
    )


def test_every_class_needs_an_image_and_every_label_a_class() -> None:
    teacher = tiny_teacher()
    images, labels = tiny_batch()
    with pytest.raises(KDHooksError, match=r"1 of 7 have none \(the first: \[6\]\)"):
        class_means(teacher, [(images, labels)], 7)
    with pytest.raises(KDHooksError, match="labels run from 0 to 4; found 5"):
        class_means(teacher, [(images, labels)], 5)
    with pytest.raises(KDHooksError, match="at least one batch of images; found none"):
        class_means(teacher, [], 6)


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (lambda x, y: x, "batch 1 must be a pair of tensors, .*; found Tensor; wrap the loader"),
        (lambda x, y: (x, y, y), "found tuple of Tensor, Tensor, Tensor; wrap"),
        (lambda x, y: {"x": x, "y": y}, "found dict; wrap"),
        (lambda x, y: (x, y.tolist()), "found tuple of Tensor, list; wrap"),
        (lambda x, y: (x, y.float()), r"labels must be whole numbers.*found torch\.float32"),
        (lambda x, y: (x, y > 2), r"labels must be whole numbers.*found torch\.bool"),
        (lambda x, y: (x, F.one_hot(y, 6)), r"labels \(b\); found \(12, 3, 32, 32\) and \(12, 6\)"),
        (lambda x, y: (x, y[:-1]), r"labels \(b\); found \(12, 3, 32, 32\) and \(11,\)"),
        (lambda x, y: (x[0], y), r"found \(3, 32, 32\) and \(12,\)"),
        (lambda x, y: ((x * 127 + 127).byte(), y), r"floating point.*found torch\.uint8"),
        (lambda x, y: (x, y + 1), "labels run from 0 to 5; found 6 in batch 1"),
    ],
)
def test_batches_of_other_kinds_are_refused(
    batch: Callable[[Tensor, Tensor], Any], said: str
) -> None:
    images, labels = tiny_batch()
    with pytest.raises(KDHooksError, match=said):
        class_means(tiny_teacher(), [(images, labels), batch(images, labels)], 6)


def test_labels_of_a_column_and_empty_batches_are_taken() -> None:
    images, labels = tiny_batch()
    straight = class_means(tiny_teacher(), [(images, labels)], 6)
    batches: Any = [[images[:0], labels[:0]], [images, labels[:, None].int()]]  # as loaders do
    found = class_means(tiny_teacher(), batches, 6)
    assert torch.equal(found, straight)


def test_images_must_have_one_shape_that_the_teacher_takes() -> None:
    images, labels = tiny_batch()
    with pytest.raises(
        KDHooksError, match=r"same shape; found \(3, 32, 32\) and, in batch 1, \(3, 3"
    ):
        class_means(tiny_teacher(), [(images, labels), (images[..., :16], labels)], 6)
    with pytest.raises(
        KDHooksError, match=r"must run on images of the shape \(1, 32, 32\); it rais"
    ):
        class_means(tiny_teacher(), [(images[:, :1], labels)], 6)
    with pytest.raises(KDHooksError, match=r"batches must be pairs of .*; found int"):
        class_means(tiny_teacher(), 3, 6)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [0, -1, 2.0, True, "6"])
def test_the_number_of_classes_must_be_one(classes: Any) -> None:
    with pytest.raises(KDHooksError, match="classes must be a whole number, at least 1; found"):
        class_means(tiny_teacher(), [tiny_batch()], classes)


def test_an_image_that_is_not_finite_is_named() -> None:
    images, labels = tiny_batch()
    broken = images.clone()
    broken[4, 1, 2, 3] = torch.nan
    said = rf"image 16, of class {int(labels[4])}, is not, since the image is not finite; leave it"
    with pytest.raises(KDHooksError, match=said):
        class_means(tiny_teacher(), [(images, labels), (broken, labels)], 6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
def test_an_embedding_without_a_direction_is_named(value: float) -> None:
    images, labels = tiny_batch()

    def embed(images: Tensor) -> Tensor:
        found = images.mean(dim=(2, 3))
        found[3:4] = value
        return found

    with pytest.raises(KDHooksError, match=rf"image 3, of class {int(labels[3])}, is not; leave"):
        class_means(Teacher(embed), [(images, labels)], 6)


def test_each_image_needs_an_embedding() -> None:
    teacher = Teacher(lambda images: images.mean(dim=(2, 3))[:1])
    with pytest.raises(KDHooksError, match="one embedding per image; found 1 for 12"):
        class_means(teacher, [tiny_batch()], 6)


# --- the file of sums ------------------------------------------------------------------------


def never() -> Iterator[tuple[Tensor, Tensor]]:
    raise AssertionError("the pass has started")
    yield tiny_batch()


def test_a_file_that_cannot_be_written_is_refused_before_the_pass(tmp_path: Path) -> None:
    for path, said in (
        (tmp_path, "is a folder; name a file in it"),
        (tmp_path / "no" / "sums.pt", r"there is no folder '.*no' to write 'sums\.pt' in"),
        (tmp_path / "sums.npy", "its suffix is of another format"),
    ):
        with pytest.raises(KDHooksError, match=f"class means: .*{said}"):
            class_means(tiny_teacher(), never(), 6, save=path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (torch.ones(6, 12), "holds no sums of an earlier pass; specify another"),
        ({"sums": 3}, "holds no sums of an earlier pass"),
        (None, r"sums\.pt' is a text file"),
    ],
)
def test_a_file_of_something_else_is_refused(content: object, said: str, tmp_path: Path) -> None:
    if content is None:
        (tmp_path / "sums.pt").write_text("sums")
    else:
        torch.save(content, tmp_path / "sums.pt")
    before = (tmp_path / "sums.pt").read_bytes()
    with pytest.raises(KDHooksError, match=said):
        class_means(tiny_teacher(), [tiny_batch()], 6, save=tmp_path / "sums.pt")
    assert (tmp_path / "sums.pt").read_bytes() == before


# --- stopped and resumed passes --------------------------------------------------------------


class Counted:
    """A teacher that counts its images; `turned` makes it a different teacher."""

    def __init__(self, dim: int = 12, turned: bool = False) -> None:
        self.seen, self._turned = 0, turned
        self._model = tiny_teacher(dim).module

    def __call__(self, images: Tensor) -> Tensor:
        self.seen += len(images)
        assert self._model is not None
        embedding: Tensor = self._model(images)
        return embedding.flip(1) if self._turned else embedding


def batches_until(stop: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield six batches of three images; raise an interruption in place of batch `stop`."""
    images, labels = tiny_batch(copies=3)
    for number in range(6):
        if number == stop:
            raise KeyboardInterrupt
        yield images[3 * number : 3 * number + 3], labels[3 * number : 3 * number + 3]


@pytest.fixture
def partial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the file of a stopped pass: the sums of four of six batches, saved every two."""
    monkeypatch.setattr("kdhooks.teacher.class_means.SAVE_EVERY", 2)
    with pytest.raises(KeyboardInterrupt):
        class_means(Teacher(Counted()), batches_until(5), 6, save=tmp_path / "sums")
    return tmp_path / "sums"


def test_a_stopped_pass_resumes(partial: Path) -> None:
    straight = class_means(Teacher(Counted()), batches_until(), 6)
    counted = Counted()
    torch.testing.assert_close(
        class_means(Teacher(counted), batches_until(), 6, save=partial), straight, rtol=0, atol=0
    )
    assert counted.seen == 2 * 2 * 3 + 1  # two batches with their mirror images, and the probe
    counted = Counted()
    class_means(Teacher(counted), batches_until(), 6, save=partial)
    assert counted.seen == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"counts": torch.ones(7, dtype=torch.long)},
        {"counts": -torch.ones(6, dtype=torch.long)},
        {"counts": torch.ones(6)},
        {"sums": torch.full((6, 12), torch.nan, dtype=torch.double)},
        {"sums": torch.ones(6, 12)},
        {"probe": torch.ones(2, 12, dtype=torch.double)},
        {"batches": -3},
    ],
)
def test_damaged_sums_are_refused(changes: dict[str, object], partial: Path) -> None:
    torch.save(torch.load(partial) | changes, partial)
    with pytest.raises(KDHooksError, match=r"sums' must hold finite sums .*; it is damaged; remov"):
        class_means(Teacher(Counted()), batches_until(), 6, save=partial)


def test_the_teacher_must_be_a_teacher() -> None:
    for given in (tiny_teacher().module, "r50"):
        with pytest.raises(
            KDHooksError, match=r"teacher must be a kdhooks.Teacher, as returned by"
        ):
            class_means(given, [tiny_batch()], 6)  # type: ignore[arg-type]


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
    with pytest.raises(KDHooksError, match="summed over 4 batches; found 3; pass all batches"):
        class_means(Teacher(Counted()), list(batches_until())[:3], 6, save=partial)
    swapped = [(images, labels.flip(0)) for images, labels in batches_until()]
    with pytest.raises(KDHooksError, match="summed over 4 batches with other labels"):
        class_means(Teacher(Counted()), swapped, 6, save=partial)
