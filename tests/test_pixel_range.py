"""Images of another range than [-1, 1] are refused where kdhooks converts or changes pixels."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from kdhooks import (
    InputTransform,
    KDHooksError,
    StudentView,
    Teacher,
    class_means,
    viewed,
)
from kdhooks.testing import tiny_batch
from kdhooks.views.draws import Draws
from tests.small_distiller import distil, student, teacher_network

_MEAN, _STD = (
    torch.tensor(numbers)[:, None, None]
    for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
)
WRONG = {
    "0..255": lambda images: (images + 1) * 127.5,
    "0..1": lambda images: (images + 1) / 2,
    "ImageNet": lambda images: ((images + 1) / 2 - _MEAN) / _STD,
}


def faces() -> tuple[Tensor, Tensor]:
    """Return images in [-1, 1], and their labels."""
    images, labels = tiny_batch()
    generator = torch.Generator().manual_seed(0)
    return torch.rand(images.shape, generator=generator) * 2 - 1, labels


class Combined(nn.Module):
    """A view of a user that contains a built-in one."""

    def __init__(self, view: StudentView) -> None:
        super().__init__()
        self.view = view

    def forward(self, images: Tensor, draws: Draws) -> Tensor:
        """(b 3 h w) -> (b 3 h w)."""
        seen: Tensor = self.view(images.flip(3), draws)
        return seen


def converted() -> Teacher:
    """Return a teacher that expects pixels in 0..255."""
    return Teacher(teacher_network(), transform=InputTransform(mean=0.0, std=1.0))


@pytest.mark.parametrize("scale", WRONG.values(), ids=WRONG)
def test_a_distiller_refuses_them_if_it_converts_for_the_teacher(
    scale: Callable[[Tensor], Tensor],
) -> None:
    images, labels = faces()
    net = student()
    with distil("fcd", net=net, teacher=converted()) as kd:
        net(scale(images))
        with pytest.raises(KDHooksError, match=r"teacher: images .* must be RGB in \[-1, 1\]"):
            kd(scale(images), labels)
        kd.discard()
        net(scale(images))
        kd(scale(images), labels, teacher_images=images)


@pytest.mark.parametrize("scale", WRONG.values(), ids=WRONG)
def test_networks_that_share_another_scale_are_left_alone(
    scale: Callable[[Tensor], Tensor],
) -> None:
    images, labels = faces()
    net = student()
    with distil("fcd", net=net) as kd:
        net(scale(images))
        kd(scale(images), labels)


@pytest.mark.parametrize("scale", WRONG.values(), ids=WRONG)
def test_class_means_refuse_them(scale: Callable[[Tensor], Tensor]) -> None:
    images, labels = faces()
    with pytest.raises(KDHooksError, match="images that its input transform converts must be"):
        class_means(converted(), [(scale(images), labels)], int(labels.max()) + 1)


@pytest.mark.parametrize("scale", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["mask", "blocks"])
def test_views_that_know_black_and_white_refuse_them(
    name: str, scale: Callable[[Tensor], Tensor]
) -> None:
    images, _ = faces()
    with pytest.raises(KDHooksError, match="images for the views mask and blocks must be RGB"):
        viewed(StudentView(**{name: {"p": 1.0}}), scale(images))
    viewed(StudentView(grey={"p": 1.0}, low_resolution={"sizes": [4]}), scale(images))


@pytest.mark.parametrize("combined", [False, True], ids=["alone", "combined"])
@pytest.mark.parametrize("scale", WRONG.values(), ids=WRONG)
def test_the_first_batch_of_a_training_is_checked(
    scale: Callable[[Tensor], Tensor], combined: bool
) -> None:
    """The Distiller has tried the view on random images in [-1, 1] before."""
    images, _ = faces()
    view = StudentView(mask={"p": 1.0})
    net = student()
    distil("fcd", net=net, student_view=Combined(view) if combined else view)
    with pytest.raises(KDHooksError, match="images for the views mask and blocks must be RGB"):
        net(scale(images))


def test_noise_in_a_part_of_the_image_is_not_another_range() -> None:
    """As random erasing leaves it."""
    images, _ = faces()
    images[:, :, :2, :2] = 3.0
    viewed(StudentView(mask={"p": 1.0}), images)


def test_only_the_first_batch_is_checked() -> None:
    """Later checks would make the host wait for the device in each step."""
    images, _ = faces()
    view = StudentView(mask={"p": 1.0})
    viewed(view, images)
    viewed(view, images.abs())
