"""A step pairs the outputs of one forward of the student with the teacher's for the same images."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close

from kdhooks import Distiller, EmbeddingTap, FeatureTap, KDHooksError, Teacher, hookimpl
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.second_device import NAME, Device, in_a_process, python_devices

SIZE: dict[str, Any] = {"input_shape": (3, 32, 32)}


def student() -> TinyFaceNet:
    torch.manual_seed(0)
    return TinyFaceNet().train()


def distiller(net: nn.Module, *methods: object, **options: Any) -> Distiller:
    return Distiller(net, tiny_teacher(), list(methods) or ["fcd"], **SIZE, **options)


def total(terms: dict[str, Tensor]) -> Tensor:
    return torch.stack([*terms.values()]).sum()


def others(images: Tensor) -> Tensor:
    return images.flip(0)


# --- a forward whose terms are not computed ------------------------------------------------------

UNTAKEN = "ran again in training before kd computed the terms of its last forward"


def test_a_second_forward_before_the_terms_are_computed_is_refused() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net) as kd:
        net(images)
        with pytest.raises(KDHooksError, match=UNTAKEN):
            net(others(images))
        net(images)  # the refused forwards are forgotten
        kd(images, labels)


def test_an_optimizer_step_before_the_terms_are_computed_is_refused() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net) as kd:
        optimizer = SGD(net.parameters(), lr=0.1)
        for _ in range(3):  # also after the first steps, which check the parameters
            net(images)
            total(kd(images, labels)).backward()
            optimizer.step()
        net(images).sum().backward()
        before = [parameter.clone() for parameter in net.parameters()]
        with pytest.raises(KDHooksError, match="optimizer steps before kd computed the terms"):
            optimizer.step()
        assert_close([*net.parameters()], before, rtol=0, atol=0)


def test_a_loop_that_never_calls_kd_is_refused_at_its_first_step() -> None:
    net, (images, _) = student(), tiny_batch()
    with distiller(net):
        net(images).sum().backward()
        with pytest.raises(KDHooksError, match=r"call kd\(images, labels\) after each forward"):
            SGD(net.parameters(), lr=0.1).step()


def test_a_student_whose_hooks_never_run_is_refused_before_the_second_step() -> None:
    net, (images, _) = student(), tiny_batch()
    with distiller(net):
        optimizer = SGD(net.parameters(), lr=0.1)
        net.forward(images).sum().backward()
        optimizer.step()
        with pytest.raises(KDHooksError, match=r"computed no term; .*not student\.forward"):
            optimizer.step()


def test_paused_forwards_and_steps_do_not_count() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net) as kd:
        optimizer = SGD(net.parameters(), lr=0.1)
        with kd.paused():
            for _ in range(3):
                net(images).sum().backward()
                optimizer.step()
        net(images)
        with kd.paused(), kd.paused():
            net(others(images))
        terms = kd(images, labels)
        with pytest.raises(ZeroDivisionError), kd.paused():
            raise ZeroDivisionError
        net(images)
        assert kd.pending is images, "an error ends the pause"
        kd.discard()
        net(images)
        assert_close(kd(images, labels), terms)
        assert kd.step == 2


def test_terms_that_no_backward_reaches_are_refused_before_the_second_step() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net, "fcd", "rkd") as kd:
        optimizer = SGD(net.parameters(), lr=0.1)

        def step() -> None:
            net(images)
            kd(images, labels)["fcd"].backward()
            optimizer.step()

        step()
        with pytest.raises(KDHooksError, match="optimizer stepped without rkd: no backward pass"):
            step()


# --- images that are not those of the forward ----------------------------------------------------


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (others, r"after a forward on \(12, 3, 32, 32\), with other content; call kd once"),
        (lambda images: images[:5], r"found \(5, 3, 32, 32\) after a forward on \(12, "),
        (lambda images: images + 0.01, "with other content"),
    ],
)
def test_other_images_are_refused(given: Callable[[Tensor], Tensor], match: str) -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net) as kd:
        for _ in range(2):  # in every step
            net(images)
            kd(images, labels)
        net(images)
        with pytest.raises(KDHooksError, match=match):
            kd(given(images), labels[: len(given(images))])


@pytest.mark.parametrize(
    "given",
    [
        lambda images: images.clone(),
        lambda images: images[:],
        lambda images: images.detach(),
        lambda images: images.double(),
        lambda images: images.contiguous(memory_format=torch.channels_last),
    ],
)
def test_the_same_images_in_another_tensor_are_accepted(given: Callable[[Tensor], Tensor]) -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net) as kd:
        net(images)
        expected = kd(images, labels)
        net(images)
        assert_close(kd(given(images), labels), expected)


def other_images_elsewhere(nonfinite: Any) -> tuple[int, str]:
    """Return the step in which the error was raised, and its message."""
    with Device():
        net = student().to(NAME)
        kd = distiller(net, nonfinite=nonfinite)
        images, labels = (x.to(NAME) for x in tiny_batch())
        for step in range(4):
            net(images)
            try:
                kd(others(images) if step == 2 else images, labels)
            except KDHooksError as error:
                return step, str(error)
    return -1, ""


@python_devices
@pytest.mark.parametrize(("nonfinite", "step"), [("raise", 3), ("skip", 2)])
def test_comparing_images_does_not_wait_for_another_device(nonfinite: str, step: int) -> None:
    with in_a_process() as pool:
        found, message = pool.submit(other_images_elsewhere, nonfinite).result()
    assert found == step
    assert message.startswith("step 3: the images given to kd must be those of the student's last")


@pytest.mark.parametrize("view", [lambda images: images, lambda images: images[:]])
def test_images_that_were_overwritten_after_the_forward_are_refused(
    view: Callable[[Tensor], Tensor],
) -> None:
    net, (images, labels) = student(), tiny_batch()
    with distiller(net) as kd:
        net(view(images))
        images.mul_(0.5)
        with pytest.raises(KDHooksError, match="changed in place after the student's forward"):
            kd(view(images), labels)


def test_the_images_are_found_among_several_inputs() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = student()

        def forward(self, points: Tensor, images: Tensor | None = None) -> Tensor:
            embedding: Tensor = self.inner(points if images is None else images)
            return embedding

    net, (images, labels) = Keyed().train(), tiny_batch()
    with distiller(net) as kd:
        net(torch.rand(12, 5, 2), images=images)
        assert kd.pending is images, "the images are the tensor (b 3 h w)"
        kd(images, labels)
        net(others(images), images)
        kd(images, labels)


@pytest.mark.parametrize("wrap", [lambda x: {"images": x}, lambda x: [[1, x]]])
def test_images_inside_of_an_argument_are_compared(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = student()

        def forward(self, batch: Any) -> Tensor:
            images = batch["images"] if isinstance(batch, dict) else batch[0][1]
            embedding: Tensor = self.inner(images)
            return embedding

    net, (images, labels) = Wrapped().train(), tiny_batch()
    kd = distiller(net, run_student=lambda images: net(wrap(images)))
    net(wrap(images))
    kd(images, labels)
    net(wrap(others(images)))
    with pytest.raises(KDHooksError, match="must be those of the student's last forward"):
        kd(images, labels)


def test_the_teacher_may_see_other_images() -> None:
    net, (images, labels) = student(), tiny_batch()
    clean, network = images * 0.9, tiny_teacher().module
    assert network is not None
    with distiller(net) as kd:
        net(images)
        found = kd(images, labels, teacher_images=clean)
        dimmed = Teacher(network, transform=lambda images: images * 0.9)
        with Distiller(net, dimmed, ["fcd"], **SIZE) as same:
            net(images)
            assert_close(found, same(images, labels))
        kd.discard()  # this Distiller has recorded the other one's forward, too
        net(images)
        with pytest.raises(KDHooksError, match="one embedding for each of 12 images; found 5"):
            kd(images, labels, teacher_images=clean[:5])


# --- one submodule that runs twice in one forward ------------------------------------------------


class TwoViews(TinyFaceNet):
    """Runs its backbone on the images and on their mirror images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = TinyFaceNet()

    def forward(self, images: Tensor) -> Tensor:
        embedding: Tensor = self.backbone(images) + self.backbone(images.flip(-1))
        return embedding


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_backbone_that_runs_twice_needs_the_number_of_the_call(side: str) -> None:
    class At:
        def __init__(self, path: str) -> None:
            self.path = path

        @hookimpl
        def feature_tap(self) -> FeatureTap:
            ours, theirs = self.path, "layer1"
            if side == "teacher":
                ours, theirs = theirs, ours
            return FeatureTap("maps", Maps(), student=(ours,), teacher=(theirs,))

    class Maps(nn.Module):
        def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
            """[(b k h w)], [(b k h w)], (b) -> ()."""
            gap: Tensor = student[0].mean(dim=1) - teacher[0].mean(dim=1)
            distance: Tensor = gap.square().mean()
            return distance

    def step(path: str) -> Any:
        torch.manual_seed(0)
        net, network = (TwoViews(), TinyFaceNet())[:: 1 if side == "student" else -1]
        for model in (net, network):
            model(tiny_batch()[0])
        images, labels = tiny_batch()
        kd = Distiller(net.train(), Teacher(network), [At(path)], **SIZE)
        net(images)
        return kd(images, labels)["maps"]

    with pytest.raises(KDHooksError, match=rf"{side} tap 'backbone\.layer1' ran twice in one forw"):
        step("backbone.layer1")
    first, second = step("backbone.layer1@1"), step("backbone.layer1@2")
    assert not torch.equal(first, second)


# --- labels that a term needs --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["thkd", "coupleface", "adadistill"])
def test_methods_that_use_labels_name_themselves(method: str) -> None:
    net, (images, _) = student(), tiny_batch()
    spec = {"name": method, **({"k": 2} if method == "coupleface" else {})}
    with distiller(net, "fcd", spec) as kd:
        net(images)
        with pytest.raises(
            KDHooksError, match=f"found NoneType; needed by: {method}; methods that need no"
        ):
            kd(images)


# --- in-place changes by a loss ------------------------------------------------------------------


class Writes(nn.Module):
    def __init__(self, write: Callable[[Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        self.write = write

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        value = (student - teacher).square().mean()
        self.write(student, teacher, labels)
        return value


@pytest.mark.parametrize(
    "write",
    [
        lambda student, teacher, labels: labels.zero_(),
        lambda student, teacher, labels: teacher.mul_(0.5),
        lambda student, teacher, labels: student.detach().mul_(0.5),
        lambda student, teacher, labels: teacher[0].zero_(),
    ],
)
def test_a_loss_that_writes_into_its_arguments_is_named(write: Callable[..., object]) -> None:
    class Writing:
        @hookimpl
        def embedding_tap(self) -> EmbeddingTap:
            return EmbeddingTap("writes", Writes(write))

    net, (images, labels) = student(), tiny_batch()
    with distiller(net, "fcd", Writing(), "rkd") as kd:
        net(images)
        with pytest.raises(KDHooksError, match="writes: its loss wrote into one of its arguments"):
            kd(images, labels)
