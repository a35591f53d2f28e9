"""The student sees a view instead of the trainer's images, in a hand-written loop."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from kdhooks import Distiller, KDHooksError, StudentView, Teacher, build, hookimpl, viewed
from kdhooks.teacher.cache import CacheOptions
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.ranks import Results, here, mine, on_two_ranks
from tests.small_distiller import Method, distil, student

STEPS = 4
EVERY: dict[str, Any] = {
    "mask": {"p": 0.5},
    "grey": {"p": 0.5},
    "blur": {"p": 0.5},
    "low_resolution": {"sizes": [4, 8], "p": 0.7},
    "blocks": {"p": 0.5},
}


def view() -> StudentView:
    return StudentView(**EVERY)


def batches() -> list[tuple[Tensor, Tensor]]:
    images, labels = tiny_batch()
    return [(images.roll(step, 3), labels) for step in range(STEPS)]


def task(embedding: Tensor) -> Tensor:
    return embedding.square().mean()


def trained(
    net: nn.Module,
    kd: Distiller | None,
    look: Callable[[Tensor, int], Tensor] = lambda images, step: images,
) -> list[Tensor]:
    """Return the parameters after some steps of a loop."""
    optimizer = SGD([*net.parameters(), *(kd.parameters() if kd else ())], lr=0.1)
    for step, (images, labels) in enumerate(batches()):
        loss = task(net(look(images, step)))
        if kd is not None:
            loss = sum(kd(images, labels).values(), start=loss)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in net.parameters()]


def seen_by(net: nn.Module) -> list[Tensor]:
    """Return a list that receives the first layer's input in each forward."""
    found: list[Tensor] = []
    layer: nn.Module = net.layer1  # type: ignore[assignment]
    layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    return found


# --- the run stays the same ----------------------------------------------------------------------


def test_weight_0_with_a_view_equals_the_plain_run_on_the_viewed_images() -> None:
    plain, net = student(), student()
    expected = trained(plain, None, lambda images, step: viewed(view(), images, seed=5, step=step))
    with distil(Method(weight=0.0), net=net, student_view=view(), seed=5) as kd:
        assert_close(trained(net, kd), expected, rtol=0, atol=0)
    other = student()
    with distil(Method(weight=0.0), net=other, student_view=view(), seed=6) as kd:
        assert any(
            not torch.equal(one, two) for one, two in zip(trained(other, kd), expected, strict=True)
        ), "another seed leads to another run"


class Random(nn.Module):
    """A third-party view that uses torch's global generator."""

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 h w) -> (b 3 h w)."""
        return images + 0.1 * torch.rand_like(images)


@pytest.mark.parametrize("make", [view, Random])
def test_the_global_generators_are_not_used(make: Callable[[], nn.Module]) -> None:
    net, (images, labels) = student(), tiny_batch()
    before = torch.get_rng_state()
    with distil(Method(), net=net, student_view=make()) as kd:
        net(images)
        kd(images, labels)
    assert torch.equal(before, torch.get_rng_state())


def test_random_numbers_of_a_foreign_view_follow_from_seed_and_step() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=Random(), seed=3) as kd:
        seen = seen_by(net)
        for _ in range(2):
            net(images)
            kd(images, labels)
            torch.rand(5)  # the trainer's own numbers are not the view's
    assert not torch.equal(seen[0], seen[1])
    for step, found in enumerate(seen):
        assert torch.equal(found, viewed(Random(), images, seed=3, step=step))


# --- the forwards with a view --------------------------------------------------------------------


def test_only_counted_forwards_in_training_are_viewed() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(), net=net, student_view=view())
    seen = seen_by(net)
    net.eval()(images)
    net.train()
    with torch.no_grad():
        net(images)
    with kd.paused():
        net(images)
    assert all(found is images for found in seen)
    net(images)
    assert torch.equal(seen[-1], viewed(view(), images))
    assert kd.pending is images, "kd and the teacher get the trainer's images"
    kd(images, labels)
    kd.remove()
    net(images)
    assert seen[-1] is images, "the view ends with the distillation"


def _note(seen: list[Tensor], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    seen.append(args[0])


def test_the_teacher_and_its_cache_see_the_trainers_images(tmp_path: Path) -> None:
    values = []
    for cache in (None, CacheOptions(path=tmp_path)):
        teacher = tiny_teacher()
        module = teacher.module
        assert module is not None
        taught: list[Tensor] = []
        module.register_forward_pre_hook(partial(_note, taught))
        net, (images, labels) = student(), tiny_batch()
        kd = distil(
            Method(), net=net, teacher=Teacher(module, cache=cache), student_view=view(), seed=1
        )
        terms = []
        taught.clear()
        for _ in range(STEPS):
            net(images)
            terms.append(kd(images, labels)["gap"].detach())
        kd.remove()
        values.append(torch.stack(terms))
        assert torch.equal(taught[-1], images)
        if cache is None:
            assert all(torch.equal(given, images) for given in taught)
        else:
            (found,) = kd._session.caches
            assert found.hits == (STEPS - 1) * len(images), "each step but the first"
    assert_close(values[1], values[0], rtol=1e-3, atol=1e-3)  # float16 in the cache
    assert values[0].unique().numel() == STEPS, "the student's view differs in each step"


def test_other_images_than_the_trainers_are_still_refused() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        seen = seen_by(net)
        net(images)
        with pytest.raises(KDHooksError, match="must be those of the student's last forward"):
            kd(seen[0], labels)
        net(images)
        images.mul_(0.5)
        with pytest.raises(KDHooksError, match="changed in place after the student's forward"):
            kd(images, labels)


def test_teacher_images_may_be_passed_as_well() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        net(images)
        kd(images, labels, teacher_images=images * 0.9)


def test_a_discarded_forward_does_not_advance_the_draws() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        seen = seen_by(net)
        net(images)
        kd.discard()
        net(images)
        kd(images, labels)
        net(images)
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


@pytest.mark.parametrize("wrap", [lambda x: {"images": x}, lambda x: [1, (x,)]])
def test_images_inside_of_an_argument_are_replaced(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapped(TinyFaceNet):
        def forward(self, batch: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(batch["images"] if isinstance(batch, dict) else batch[1][0])

    net, (images, labels) = Wrapped().train(), tiny_batch()
    given = wrap(images)
    run = lambda images: net(wrap(images))  # noqa: E731
    with distil(Method(), net=net, student_view=view(), run_student=run) as kd:
        seen = seen_by(net)
        net(given)
        kd(images, labels)
    assert torch.equal(seen[0], viewed(view(), images))
    assert given == wrap(images) or (given["images"] is images), "the trainer's object is unchanged"


# --- accumulation, ranks, resumption -------------------------------------------------------------


def test_accumulated_batches_are_viewed_like_one_large_batch() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        seen = seen_by(net)
        kd.accumulation = 3
        for _ in range(2):
            for part, of_part in zip(images.chunk(3), labels.chunk(3), strict=True):
                net(part)
                kd(part, of_part)
    for step in range(2):
        together = torch.cat(seen[3 * step : 3 * step + 3])
        assert_close(together, viewed(view(), images, step=step))


def flat() -> nn.Module:
    """Return a student without BatchNorm, whose statistics on two ranks would differ."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 8, stride=8), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12))


PROJECTED: dict[str, Any] = {"name": "fcd", "projector": True}


def loop(net: nn.Module, kd: Distiller, optimizer: SGD, steps: range) -> None:
    for step in steps:
        images, labels = (mine(part) for part in batches()[step])
        loss = sum(kd_terms(net, kd, images, labels), start=torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def kd_terms(net: nn.Module, kd: Distiller, images: Tensor, labels: Tensor) -> list[Tensor]:
    return [task(net(images)), *kd(images, labels).values()]


def resumed_and_straight() -> dict[str, Results]:
    """Return an uninterrupted run of four steps, and one that was resumed after two."""
    _, size = here()
    found: dict[str, Results] = {}
    for name, make in (("built-in", view), ("foreign", Random)):

        def started(
            make: Callable[[], nn.Module] = make,
        ) -> tuple[nn.Module, nn.Module, Distiller, SGD]:
            net = flat()
            kd = Distiller(net, tiny_teacher(), [PROJECTED], input_shape=(3, 32, 32),
                           student_view=make())  # fmt: skip
            outside = nn.parallel.DistributedDataParallel(net) if size > 1 else net
            return net, outside, kd, SGD([*net.parameters(), *kd.parameters()], 0.01, momentum=0.9)

        net, outside, kd, optimizer = started()
        loop(outside, kd, optimizer, range(2))
        saved = [x.state_dict() for x in (net, kd, optimizer)]
        saved = torch.load(_kept(saved))
        loop(outside, kd, optimizer, range(2, STEPS))
        straight = {key: value.clone() for key, value in net.state_dict().items()}
        kd.remove()
        net, outside, kd, optimizer = started()
        net.load_state_dict(saved[0])
        kd.load_state_dict(saved[1])
        optimizer.load_state_dict(saved[2])
        loop(outside, kd, optimizer, range(2, STEPS))
        found[name] = {"straight": straight, "resumed": dict(net.state_dict())}
        kd.remove()
    return found


def _kept(content: object) -> Any:
    import io

    file = io.BytesIO()
    torch.save(content, file)
    file.seek(0)
    return file


def test_resume_equals_the_straight_run_and_two_ranks_equal_one(tmp_path: Path) -> None:
    ranks, one = on_two_ranks(resumed_and_straight, tmp_path), resumed_and_straight()
    for found in (*ranks, one):
        for name in ("built-in", "foreign"):
            assert_close(found[name]["resumed"], found[name]["straight"], rtol=0, atol=0)
    for found in ranks:
        assert_close(found["built-in"]["straight"], one["built-in"]["straight"])


def views_that_differ() -> dict[str, Results]:
    rank, _ = here()
    said = ""
    try:
        distil(Method(), student_view=StudentView(mask={"p": 0.5 + 0.1 * rank}))
    except KDHooksError as error:
        said = str(error)
    return {"said": {"text": torch.tensor(list(said.encode()))}}


def test_ranks_with_different_views_are_refused(tmp_path: Path) -> None:
    for found in on_two_ranks(views_that_differ, tmp_path):
        said = bytes(found["said"]["text"].tolist()).decode()
        assert "all ranks must declare the same terms" in said
        assert "only rank 1 has: a student's view StudentView( Mask(p=0.6)" in said


# --- checkpointing and compilation ---------------------------------------------------------------


def test_checkpointed_blocks_are_recomputed_on_the_same_view() -> None:
    class Checkpointed(TinyFaceNet):
        def forward(self, images: Tensor) -> Tensor:
            x = images
            for name in ("layer1", "layer2", "layer3", "layer4"):
                x = checkpoint(self.get_submodule(name), x, use_reentrant=False)
            embedding: Tensor = self.features(self.fc(x.flatten(1)))
            return embedding

    outcomes = []
    for made in (TinyFaceNet, Checkpointed):
        torch.manual_seed(0)
        net = made().train()
        for norm in net.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 0.0  # otherwise the recomputation updates the statistics again
        with distil(Method(), net=net, student_view=view()) as kd:
            outcomes.append(trained(net, kd))
    assert_close(outcomes[1], outcomes[0], rtol=0, atol=0)


def test_a_checkpoint_around_the_student_is_refused() -> None:
    """Its recomputation would apply the view again."""
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        embedding = checkpoint(net, images, use_reentrant=False)
        loss = task(embedding) + kd(images, labels)["gap"]
        with pytest.raises(
            KDHooksError, match="ran again in a backward pass, by activation checkpoi"
        ):
            loss.backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_student_sees_the_view_of_each_step(backend: str) -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        compiled: Any = torch.compile(net, backend=backend)
        found = []
        for _ in range(STEPS):
            compiled(images)
            found.append(kd(images, labels)["gap"].detach())
        compiled.eval()(images)
    plain = student()
    with distil(Method(), net=plain, student_view=view()) as kd:
        expected = []
        for _ in range(STEPS):
            plain(images)
            expected.append(kd(images, labels)["gap"].detach())
    assert_close(torch.stack(found), torch.stack(expected))


# --- the sources of a view -----------------------------------------------------------------------


class Viewer:
    """A third-party plugin."""

    def __init__(self, found: object) -> None:
        self.found = found

    @hookimpl
    def student_view(self) -> object:
        return self.found


def test_a_method_that_only_returns_a_view_is_listed_among_the_methods() -> None:
    net, (images, labels) = student(), tiny_batch()
    with distil(Method(), Viewer(view()), net=net) as kd:
        seen = seen_by(net)
        net(images)
        assert list(kd(images, labels)) == ["gap"]
    assert torch.equal(seen[-1], viewed(view(), images))
    with distil(Viewer(view()), net=net) as kd:
        net(images)
        assert kd(images, labels) == {}


def test_a_recipe_has_the_view() -> None:
    recipe = {
        "teacher": tiny_teacher().module,
        "methods": ["fcd"],
        "input_shape": [3, 32, 32],
        "seed": 4,
    }
    (images, labels) = tiny_batch()
    for given in (EVERY, view()):
        net = student()
        with build({**recipe, "student_view": given}, net) as kd:
            seen = seen_by(net)
            net(images)
            kd(images, labels)
        assert torch.equal(seen[-1], viewed(view(), images, seed=4))


@pytest.mark.parametrize(
    ("options", "methods", "match"),
    [
        ({"student_view": EVERY}, (), "Distiller: student_view must be a module; found {"),
        ({"student_view": StudentView}, (), "student_view must be a module; found the class Stu"),
        ({}, (Viewer(3),), "Viewer.student_view must return a module or None; found 3"),
        ({}, (Viewer(view()), Viewer(None)), "one plugin at most may return the student's view"),
        (
            {"student_view": view()},
            (Viewer(view()),),
            "the student's view must come from one place; found student_view and Viewer; leave",
        ),
        (
            {"student_view": nn.Conv2d(3, 3, 1)},
            (),
            r"must have no trainable parameters, .*'weight'; call requires_grad_",
        ),
        (
            {"student_view": nn.Flatten()},
            (),
            r"the same shape and dtype .* \(2, 3, 32, 32\); found torch.float32 \(2, 3072\)",
        ),
        (
            {"student_view": nn.ReLU(inplace=True)},
            (),
            "student_view must not change the trainer's images in place, since the teacher",
        ),
        (
            {"student_view": StudentView(low_resolution={"sizes": [14, 64]})},
            (),
            "sizes must be at most the shorter side of the images, 32 pixels; found 64; leave it",
        ),
    ],
)
def test_a_view_that_cannot_work_is_refused_at_the_start(
    options: dict[str, Any], methods: tuple[object, ...], match: str
) -> None:
    net = student()
    with pytest.raises(KDHooksError, match=match):
        distil(Method(), *methods, net=net, **options)
    assert not net._forward_pre_hooks, "nothing is left behind"


def test_images_that_cannot_be_viewed_are_refused() -> None:
    class Pixels(TinyFaceNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.is_floating_point() else images / 127.5 - 1)

    net, (images, _) = Pixels().train(), tiny_batch()
    with distil(Method(), net=net, student_view=view()):
        with pytest.raises(
            KDHooksError, match=r"needs floating-point images .* found torch\.uint8"
        ):
            net((images * 127.5 + 127.5).to(torch.uint8))
        net(images)


def test_images_that_need_a_gradient_are_refused() -> None:
    net, (images, _) = student(), tiny_batch()
    with distil(Method(), net=net, student_view=view()) as kd:
        with pytest.raises(KDHooksError, match="runs without gradients, and the images require"):
            net(images.clone().requires_grad_())
        with kd.paused():
            net(images.clone().requires_grad_())


def test_images_in_an_unknown_container_are_refused() -> None:
    class Batch:
        def __init__(self, images: Tensor) -> None:
            self.images = images

    class Named(tuple[Any, ...]):
        pass

    class Wrapped(TinyFaceNet):
        def forward(self, batch: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return super().forward(batch[0] if isinstance(batch, tuple) else batch.images)

    net, (images, _) = Wrapped().train(), tiny_batch()
    run = lambda images: net((images,))  # noqa: E731
    with distil(Method(), net=net, student_view=view(), run_student=run):
        with pytest.raises(KDHooksError, match=r"needs images .* among the arguments of the stud"):
            net(Batch(images))
        with pytest.raises(KDHooksError, match="found them in another container; take the images"):
            net(Named((images,)))
        net((images,))


def test_half_precision_and_autocast_do_not_change_the_view() -> None:
    images, _ = tiny_batch()
    sharp = StudentView(mask={"p": 0.5}, low_resolution={"sizes": [8]}, blur={"p": 0.5})
    expected = viewed(sharp, images)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(viewed(sharp, images), expected)
    assert_close(viewed(sharp, images.double()), expected.double(), rtol=1e-5, atol=1e-5)
    for dtype in (torch.float16, torch.bfloat16):
        low = images.to(dtype)
        assert torch.equal(viewed(sharp, low), viewed(sharp, low.float()).to(dtype))
        module = view().to(dtype)
        assert torch.equal(viewed(module, images), viewed(view(), images)), "of a converted module"
