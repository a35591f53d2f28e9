"""A Teacher is a configuration that several runs can share; each run has its own session."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, EmbeddingTap, KDHooksError, Model, Teacher, hookimpl
from kdhooks.taps import Taps
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.small_distiller import Gap, teacher_network

SIZE: dict[str, Any] = {"input_shape": (3, 32, 32)}
PROJECTED = {"name": "fcd", "projector": True}
STAGES: dict[str, Any] = {
    "student_stages": ["layer1", "layer3"],
    "teacher_stages": ["layer1", "layer3"],
}


def student() -> TinyFaceNet:
    torch.manual_seed(0)
    return TinyFaceNet().train()


def terms(kd: Distiller, net: nn.Module) -> dict[str, Tensor]:
    images, labels = tiny_batch()
    net(images)
    found: dict[str, Tensor] = kd(images, labels)
    return found


# --- one teacher for two runs --------------------------------------------------------------------


class Shift(nn.Module):
    """Adds a trained vector to the teacher's embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(12))

    def forward(self, teacher: nn.Module, images: Tensor) -> Tensor:
        embedding: Tensor = teacher(images)
        return embedding + self.by


class Shifted:
    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("gap", Gap())

    @hookimpl
    def adapt_teacher(self, teacher: Model) -> nn.Module:
        return Shift()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (["at", "fcd"], ["at"]),
        (["at"], ["fcd"]),
        (["fcd"], ["at"]),
        ([Shifted()], ["fcd"]),
        (["fcd"], [Shifted()]),
    ],
)
def test_a_second_run_changes_nothing_for_the_first(first: list[Any], second: list[Any]) -> None:
    alone, other = student(), student()
    expected = terms(Distiller(alone, Teacher(teacher_network()), first, **STAGES, **SIZE), alone)
    teacher, net = Teacher(teacher_network()), student()
    before = dict(vars(teacher))
    kd = Distiller(net, teacher, first, **STAGES, **SIZE)
    one_more = Distiller(other, teacher, second, **STAGES, **SIZE)
    found = terms(kd, net)
    assert_close(found, expected, rtol=0, atol=0)
    sum(found.values(), start=torch.zeros(())).backward()
    assert all(parameter.grad is not None for parameter in kd.parameters())
    terms(one_more, other)
    kd.remove()
    terms(one_more, other)
    assert vars(teacher) == before


def test_closing_one_leaves_the_hooks_and_the_cache_of_the_other(tmp_path: Path) -> None:
    teacher = Teacher(teacher_network(), cache=CacheOptions(path=tmp_path))
    first, second = student(), student()
    one = Distiller(first, teacher, ["fcd"], **SIZE)
    two = Distiller(second, teacher, ["fcd"], **SIZE)
    expected = terms(one, first)
    one.remove()
    terms(two, second)
    found = terms(two, second)
    assert_close(found, expected, rtol=1e-3, atol=1e-5)
    (cache,) = two._session.caches
    assert cache.hits > 0


def test_a_probe_leaves_no_hook_on_the_teacher() -> None:
    network = teacher_network()
    kd = Distiller(student(), Teacher(network), ["fcd"], **STAGES, **SIZE)
    assert not any(m._forward_hooks for m in network.modules())
    kd.remove()


# --- the student and the teacher are two models --------------------------------------------------


def test_a_student_that_is_its_own_teacher_is_refused() -> None:
    net = teacher_network().requires_grad_().train()
    with pytest.raises(KDHooksError, match=r"must have parameters of their own.*copy\.deepcopy"):
        Distiller(net, net, ["fcd"], **SIZE)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters()), "nothing is changed"


def test_a_method_of_a_module_is_refused_as_a_teacher() -> None:
    awake = teacher_network().train()
    with pytest.raises(
        KDHooksError, match="must not be a method of a module, since the module would not"
    ):
        Distiller(student(), awake.forward, ["fcd"], **SIZE)


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_a_function_may_return_a_buffer_that_it_overwrites(micro_batch: int | None) -> None:
    network, buffer = teacher_network().eval(), torch.zeros(64, 12)

    def embed(images: Tensor) -> Tensor:
        with torch.no_grad():
            buffer[: len(images)].copy_(network(images))
        return buffer[: len(images)]

    images, _ = tiny_batch()
    with TeacherSession(Teacher(embed, micro_batch=micro_batch)) as session:
        first = session(images).embedding
        session(images.flip(0))
    assert_close(first, network(images).detach())


def test_a_student_that_another_run_froze_is_refused() -> None:
    peer = teacher_network().train()
    Teacher(peer)
    with pytest.raises(KDHooksError, match="must train at least one parameter; found all of them"):
        Distiller(peer, tiny_teacher(), ["fcd"], **SIZE)


# --- number formats ------------------------------------------------------------------------------

FORMATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("ours", FORMATS)
@pytest.mark.parametrize("theirs", FORMATS)
@pytest.mark.parametrize("method", [PROJECTED, "at", "thkd", "rkd"])
def test_models_of_any_floating_point_format_train(
    ours: torch.dtype, theirs: torch.dtype, method: object
) -> None:
    network, (images, labels) = teacher_network().to(theirs), tiny_batch()
    classifier = tiny_teacher().classifier
    net = student().to(ours)
    kd = Distiller(net, Teacher(network, classifier=classifier), [method], **STAGES, **SIZE)
    images = images.to(ours)
    for _ in range(2):
        net(images)
        (term,) = kd(images, labels).values()
        assert term.dtype == torch.promote_types(ours, torch.float32)
        term.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.layer1.parameters())


def test_a_student_that_was_converted_later_trains() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = Distiller(net, tiny_teacher(), [PROJECTED, "thkd"], **SIZE)
    net.double()
    images = images.double()
    net(images)
    found = kd(images, labels)
    assert {term.dtype for term in found.values()} == {torch.float64}
    torch.stack([*found.values()]).sum().backward()
    assert all(p.dtype == torch.float64 and p.grad is not None for p in kd.parameters())


def test_integer_images_are_refused_with_their_conversion() -> None:
    class Pixels(TinyFaceNet):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward((images.float() - 127.5) / 127.5)

    net, (images, labels) = Pixels().train(), tiny_batch()
    pixels = (images.clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    kd = Distiller(net, tiny_teacher(), ["fcd"], **SIZE)
    net(pixels)
    with pytest.raises(KDHooksError, match=r"found torch.uint8; pass \(images.float\(\) - 127"):
        kd(pixels, labels)
    net(pixels)
    kd(pixels, labels, teacher_images=(pixels.float() - 127.5) / 127.5)


def test_an_empty_batch_is_refused() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 12)).train()
    kd = Distiller(net, tiny_teacher(), ["fcd"], **SIZE)
    images = torch.zeros(0, 3, 32, 32)
    net(images)
    with pytest.raises(KDHooksError, match="hold at least one sample; found an empty batch"):
        kd(images, torch.zeros(0, dtype=torch.long))


# --- forms of models -----------------------------------------------------------------------------


def exported(network: nn.Module) -> Any:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(network.eval(), (tiny_batch()[0],), dynamic_shapes=({0: batch},))


def traced(network: nn.Module) -> Any:
    return torch.jit.trace(network.eval(), tiny_batch()[0])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("form", [exported, lambda network: exported(network).module(), traced])
def test_an_exported_or_traced_model_can_teach_its_embedding(
    form: Callable[[nn.Module], Any],
) -> None:
    images, _ = tiny_batch()
    teacher = Teacher(form(teacher_network()))
    with TeacherSession(teacher) as session:
        assert_close(session(images).embedding, teacher_network()(images).detach())
    assert teacher.module is not None
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())
    net = student()
    terms(Distiller(net, teacher, ["fcd"], **SIZE), net)["fcd"].backward()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_the_submodules_of_an_exported_model_cannot_be_tapped() -> None:
    with pytest.raises(KDHooksError, match=r"'layer1'.* recorded nothing: a compiled, scripted"):
        Distiller(student(), Teacher(exported(teacher_network())), ["at"], **STAGES, **SIZE)


def test_a_model_that_takes_more_than_images_is_run_by_a_function() -> None:
    class Keyed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = teacher_network()

        def forward(self, images: Tensor, keypoints: Tensor) -> tuple[Tensor, None]:
            return self.inner(images) + keypoints.mean(), None

    def run(model: nn.Module, images: Tensor) -> Tensor:
        embedding: Tensor = model(images, images.new_ones(len(images), 5, 2))[0]
        return embedding

    images, _ = tiny_batch()
    with TeacherSession(Teacher(Keyed(), run=run), ["inner.layer1"]) as session:
        output = session(images)
    assert_close(output.embedding, teacher_network()(images).detach() + 1)
    assert list(output.features) == ["inner.layer1"]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("path", ["layer1", ""])
def test_a_loaded_script_cannot_be_tapped(tmp_path: Path, path: str, side: str) -> None:
    torch.jit.save(traced(teacher_network()), tmp_path / "scripted.pt")
    loaded = torch.jit.load(tmp_path / "scripted.pt")
    with pytest.raises(KDHooksError, match=rf"^{side} tap .* scripted one, .* the plain module"):
        Taps(loaded, [path], side)


# --- taps of the embedding -----------------------------------------------------------------------


def as_function(network: nn.Module) -> Teacher:
    return Teacher(lambda images: network(images))


def in_a_dict(network: nn.Module) -> Teacher:
    class Described(nn.Module):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            return {"embedding": network(images)}

    return Teacher(Described(), run=lambda model, images: model(images)["embedding"])


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def as_script(network: nn.Module) -> Teacher:
    file = io.BytesIO()
    torch.jit.save(traced(network), file)
    return Teacher(torch.jit.load(io.BytesIO(file.getvalue())))


def by_index(network: nn.Module) -> Teacher:
    with torch.no_grad():
        return Teacher(EmbeddingTable(network(tiny_batch()[0])))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("form", [as_function, in_a_dict, as_script, by_index])
def test_a_tap_at_the_path_of_the_embedding_is_the_embedding(
    form: Callable[[nn.Module], Teacher],
) -> None:
    images, _ = tiny_batch()
    wanted = teacher_network()(images).detach()
    with TeacherSession(form(teacher_network()), [""]) as session:
        output = session(images, torch.arange(len(images)))
    assert_close(output.embedding, wanted)
    assert torch.equal(output.features[""], output.embedding)


def test_a_tap_at_the_embedding_sees_what_the_function_has_made_of_the_output() -> None:
    def flipped(model: nn.Module, images: Tensor) -> Tensor:
        embedding: Tensor = model(images) + model(images.flip(3))
        return embedding

    images, _ = tiny_batch()
    network = teacher_network()
    with TeacherSession(Teacher(teacher_network(), run=flipped), [""]) as session:
        found = session(images).features[""]
    assert_close(found, (network(images) + network(images.flip(3))).detach())


@pytest.mark.parametrize("embedding", ["", "features"])
def test_a_cache_serves_a_tap_at_the_embedding(tmp_path: Path, embedding: str) -> None:
    images, labels = tiny_batch()
    spec = {"name": "fitnet", "student": "embedding", "teacher": "embedding"}
    values = []
    for cache in (None, tmp_path, tmp_path):
        net = student()
        teacher = Teacher(teacher_network(), embedding=embedding, cache=cache)
        with Distiller(net, teacher, [spec], **SIZE) as kd:
            net(images)
            values.append(kd(images, labels)["fitnet"].detach())
            hits = [one.hits for one in kd._session.caches]
    assert hits == [len(images)]
    assert_close(values[1], values[0], rtol=1e-3, atol=0)  # a cache rounds embeddings
    assert torch.equal(values[1], values[2])


def test_a_teacher_with_a_function_of_its_own_cannot_be_adapted() -> None:
    """The adapter would call the module, and train on another embedding than all other terms."""
    teacher = Teacher(teacher_network(), run=lambda model, images: model(images) * 2)
    with pytest.raises(
        KDHooksError, match=r"^Shift adapts .* leaves out the argument run; .*holds"
    ):
        Distiller(student(), teacher, [Shifted()], **SIZE)

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = teacher_network()

        def forward(self, images: Tensor) -> Tensor:
            embedding: Tensor = self.net(images) * 2
            return embedding

    images, _ = tiny_batch()
    with TeacherSession(Teacher(Doubled()), adapter=Shift()) as session:
        found = session(images).embedding
    assert_close(found, teacher_network()(images) * 2)


# --- running ahead -------------------------------------------------------------------------------


def counted() -> tuple[TeacherSession, list[int]]:
    """Return a session, and a list that receives the sizes of its teacher's batches."""
    seen: list[int] = []

    def embed(images: Tensor) -> Tensor:
        seen.append(len(images))
        return images.mean(dim=(2, 3))

    return TeacherSession(Teacher(embed)), seen


def test_only_a_call_with_the_same_unchanged_images_uses_the_output() -> None:
    session, seen = counted()
    images, _ = tiny_batch()
    session(images)
    session.run_ahead(images)
    assert_close(session(images).embedding, images.mean(dim=(2, 3)))
    assert len(seen) == 2, "the call used the output of run_ahead"
    session.run_ahead(images)
    images.mul_(0.5)
    assert_close(session(images).embedding, images.mean(dim=(2, 3)))
    session.run_ahead(images)
    assert_close(session(images[:5]).embedding, images[:5].mean(dim=(2, 3)))
    session.run_ahead(images)
    session.drop_ahead()
    assert_close(session(images).embedding, images.mean(dim=(2, 3)))
    assert len(seen) == 8, "each other call ran the teacher again"


def test_running_ahead_stops_if_its_outputs_are_not_used() -> None:
    session, seen = counted()
    images, _ = tiny_batch()
    session(images)
    for _ in range(30):
        session.run_ahead(images)
    assert len(seen) == 1 + 8
