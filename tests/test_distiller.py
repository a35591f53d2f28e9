"""One step: taps -> teacher -> losses; and all that must not happen beside it."""

import copy
import gc
import io
import random
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kdhooks import (
    ClassifierShare,
    ClassShard,
    ComparedClassifiers,
    Distiller,
    EmbeddingTap,
    FeatureTap,
    InheritedClassifier,
    KDHooksError,
    Model,
    ParameterTap,
    Teacher,
    hookimpl,
)
from kdhooks.declarations import Weight
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher

SMALL = (3, 32, 32)


class Gap(nn.Module):
    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """(b d), (b e), (b) -> ()."""
        return (student - teacher).square().mean()


class Method:
    """A method made of one tap."""

    def __init__(self, name: str = "gap", weight: Weight = 1.0, loss: nn.Module | None = None):
        self.tap = EmbeddingTap(name, loss or Gap(), weight)

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return self.tap


def student() -> TinyFaceNet:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return TinyFaceNet().train()


def distil(*methods: object, net: nn.Module | None = None, **options: object) -> Distiller:
    return Distiller(
        net if net is not None else student(),
        options.pop("teacher", None) or tiny_teacher(),  # type: ignore[arg-type]
        methods,
        input_shape=SMALL,
        **options,  # type: ignore[arg-type]
    )


def test_terms_are_weighted_and_named_in_the_order_of_the_methods() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method("b", 2.0), Method("a", 0.5), net=net)
    embedding = net(images)
    terms = kd(images, labels)
    raw = (embedding - TeacherSession(tiny_teacher())(images).embedding).square().mean()
    assert list(terms) == ["b", "a"]
    torch.testing.assert_close(terms["b"], 2 * raw)
    torch.testing.assert_close(terms["a"], 0.5 * raw)
    torch.testing.assert_close(kd.metrics["b"], raw.detach())
    assert not kd.metrics["b"].requires_grad


def test_the_plain_loop_trains_student_and_projector() -> None:
    images, labels = tiny_batch()
    net, head = student(), nn.Linear(12, 6)
    teacher = tiny_teacher(dim=20)
    with Distiller(
        net, teacher, [{"name": "fcd", "weight": 8, "projector": True}], input_shape=SMALL
    ) as kd:
        parameters = [*net.parameters(), *head.parameters(), *kd.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05)
        gaps = []
        for _ in range(30):
            task = F.cross_entropy(head(net(images)), labels)
            loss = sum(kd(images, labels).values(), start=task)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gaps.append(float(kd.metrics["fcd"]))
    assert [name for name, _ in kd.named_parameters()] == ["losses.fcd.projector.weight"]
    assert gaps[-1] < gaps[0] / 2
    net(images)
    assert kd.pending is None, "after the with block no hook is left"


def test_weight_zero_equals_the_plain_run_bit_for_bit() -> None:
    def train(distilled: bool) -> tuple[dict[str, Tensor], Tensor]:
        torch.manual_seed(3)
        net = TinyFaceNet().train()
        methods = ["fcd", "coupleface", "proxylesskd"]
        kd = None
        if distilled:
            kd = distil(*[{"name": name, "weight": 0.0} for name in methods], net=net)
        head = nn.Linear(12, 6)
        optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
        images, labels = tiny_batch()
        loss = torch.zeros(())
        for _ in range(4):
            noisy = images + 0.01 * torch.randn(images.shape)
            loss = F.cross_entropy(head(net(noisy)), labels)
            if kd is not None:
                loss = sum(kd(noisy, labels).values(), start=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return copy.deepcopy(net.state_dict()), loss.detach()

    plain, distilled = train(False), train(True)
    torch.testing.assert_close(plain, distilled, rtol=0, atol=0)


def test_the_global_generators_are_left_as_they_were() -> None:
    class Drawing(Method):
        @hookimpl
        def embedding_tap(self) -> EmbeddingTap:
            random.random()
            np.random.rand()
            torch.rand(1)
            return self.tap

    before = random.getstate(), np.random.get_state(legacy=True), torch.get_rng_state()
    distil(Drawing(), {"name": "proxylesskd", "projector": True})
    assert random.getstate() == before[0]
    np.testing.assert_equal(np.random.get_state(legacy=True), before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_initial_weights_depend_on_the_seed_alone() -> None:
    def projector(seed: int) -> Tensor:
        torch.rand(seed + 1)
        kd = distil({"name": "fcd", "projector": True}, seed=seed)
        return next(kd.parameters())

    assert torch.equal(projector(1), projector(1))
    assert not torch.equal(projector(1), projector(2))


def test_probing_leaves_the_student_as_it_was() -> None:
    net = student()
    net.layer2.eval()
    before = copy.deepcopy(net.state_dict())
    distil(Method(), net=net)
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert net.training
    assert not net.layer2.training


def test_a_step_retains_no_tensor_of_it() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", "coupleface", "proxylesskd", net=net)
    embedding = net(images)
    alive = weakref.ref(embedding)
    torch.stack([*kd(images, labels).values(), embedding.sum()]).sum().backward()
    del embedding
    gc.collect()
    assert alive() is None
    assert kd.pending is None
    held = [t for t in kd.metrics.values() if t.ndim or t.requires_grad]
    assert not held


def test_evaluation_runs_no_teacher_and_keeps_nothing() -> None:
    calls: list[int] = []

    def embed(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :12]

    net, (images, _) = student(), tiny_batch()
    kd = distil(Method(), net=net, teacher=Teacher(embed))
    calls.clear()
    net.eval()(images)
    with torch.no_grad():
        net.train()(images)
    assert kd.pending is None
    assert calls == []


def test_state_dict_holds_no_teacher_and_restores_the_step() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", "proxylesskd", Method("gap", lambda step: float(step)), net=net)
    assert set(kd.state_dict()) == {"_extra_state", "losses.proxylesskd.warmup.steps"}
    for _ in range(3):
        net(images)
        kd(images, labels)
    file = io.BytesIO()
    torch.save(kd.state_dict(), file)
    file.seek(0)
    resumed = distil("fcd", "proxylesskd", Method("gap", lambda step: float(step)), net=net)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    kd.remove()
    net(images)
    terms = resumed(images, labels)
    torch.testing.assert_close(terms["gap"], 3 * resumed.metrics["gap"])


class Table(Gap):
    """A loss with a matrix that decays, and a table inside that does not."""

    def __init__(self, spared: str = "rows") -> None:
        super().__init__()
        self.linear = nn.Linear(12, 12, bias=False)
        self.table = nn.Module()
        self.table.rows = nn.Parameter(torch.ones(3))
        self.table.no_weight_decay = lambda: {spared}  # type: ignore[assignment]


def test_parameters_that_a_loss_spares_do_not_decay() -> None:
    loss = Table()
    groups = distil(Method(loss=loss)).parameter_groups(0.5)
    assert [group["weight_decay"] for group in groups] == [0.5, 0.0]
    assert [list(map(id, group["params"])) for group in groups] == [
        [id(loss.linear.weight)],
        [id(loss.table.rows)],
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    for parameter in loss.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = loss.linear.weight.detach().clone()
    optimizer.step()
    assert loss.table.rows.tolist() == [1, 1, 1]  # type: ignore[operator]
    torch.testing.assert_close(loss.linear.weight.detach(), before * 0.95)


def test_losses_without_parameters_make_no_group() -> None:
    assert distil(Method()).parameter_groups(0.5) == []


def test_a_name_that_no_parameter_has_is_refused() -> None:
    with pytest.raises(KDHooksError, match=r"names 'losses\.gap\.table\.row', .*did you mean"):
        distil(Method(loss=Table("row"))).parameter_groups(0.5)


def test_a_copy_has_no_teacher_and_disturbs_nothing() -> None:
    net = student()
    kd = distil("fcd", net=net)
    copied = copy.deepcopy(kd)
    assert copied._session is None
    assert copied.taps[0].loss is copied.losses["fcd"] is not kd.losses["fcd"]
    assert not any("teacher" in name for name, _ in kd.named_modules())
    copied.remove()
    assert net._forward_hooks, "those of the original stay"
    teacher = kd.train()._session.teacher.module
    assert teacher is not None
    assert not teacher.training


def test_losses_run_in_float32_inside_autocast() -> None:
    seen: list[torch.dtype] = []

    class Spy(Gap):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            seen.extend([student.dtype, teacher.dtype, (student @ teacher.T).dtype])
            return super().forward(student, teacher, labels)

    net, (images, labels) = student(), tiny_batch()
    net.features = nn.Identity()  # type: ignore[assignment]  # so that the output is bfloat16
    kd = distil(Method(loss=Spy()), net=net)
    with torch.autocast("cpu", torch.bfloat16):
        assert net(images).dtype == torch.bfloat16
        kd(images, labels)
    assert seen == [torch.float32] * 3


def test_the_teacher_is_skipped_where_no_loss_needs_it_but_for_the_first_check() -> None:
    calls: list[int] = []
    module = tiny_teacher().module
    assert module is not None
    net, (images, labels) = student(), tiny_batch()
    kd = distil("proxylesskd", net=net)
    kd._session.teacher.module.register_forward_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    for _ in range(3):
        net(images)
        kd(images, labels)
    assert calls == [1]


# --- kinds of taps ---------------------------------------------------------------------------


class StageMeans(nn.Module):
    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        gaps = [(s.mean() - t.mean()).square() for s, t in zip(student, teacher, strict=True)]
        return torch.stack(gaps).sum()


class Stages:
    """Taps what `student.stages` and `teacher.stages` name."""

    @hookimpl
    def feature_tap(self, student: Model, teacher: Model) -> FeatureTap:
        self.shapes = [stage.shape for stage in (*student.stages, *teacher.stages)]
        self.channels = [stage.channels for stage in student.stages]
        return FeatureTap(
            "stages",
            StageMeans(),
            student=tuple(stage.path for stage in student.stages),
            teacher=tuple(stage.path for stage in teacher.stages),
        )


def test_hook_feature_tap() -> None:
    net, (images, labels) = student(), tiny_batch()
    method = Stages()
    options = {"student_stages": ["layer1", "layer4"], "teacher_stages": ["layer2", "layer4"]}
    kd = distil(method, net=net, **options)
    assert method.shapes == [(4, 16, 16), (16, 2, 2), (12, 8, 8), (24, 2, 2)]
    assert method.channels == [4, 16]
    net(images)
    kd(images, labels)["stages"].backward()
    assert net.get_parameter("layer4.0.weight").grad is not None
    assert net.fc.weight.grad is None


def order(steps: int, seen: Callable[[Tensor, int], Tensor]) -> list[str]:
    """In which teacher and student run; seen: (images, step) -> what the teacher is given."""
    net, teacher = student(), tiny_teacher()
    kd = distil("fcd", net=net, teacher=teacher)
    images, labels = tiny_batch()
    assert teacher.module is not None
    found: list[str] = []
    for name, model in (("s", net), ("t", teacher.module)):
        model.register_forward_hook(lambda *_, name=name: found.append(name))
    for step in range(steps):
        net(images)
        kd(seen(images, step), labels)
    return found


def test_the_teacher_runs_at_the_students_entrance_but_for_the_first_step() -> None:
    """Where the student's activations take no memory yet; the first step has checks to make."""
    assert order(3, lambda images, step: images) == ["s", "t", "t", "s", "t", "s"]


def test_a_teacher_of_other_images_is_asked_for_them_alone() -> None:
    assert order(3, lambda images, step: images.clone()) == ["s", "t"] * 3


def test_a_teacher_of_other_images_from_some_step_on_is_asked_for_them_alone_in_the_end() -> None:
    found = order(11, lambda images, step: images.clone() if step else images)
    assert found == ["s", "t", *8 * ["t", "s", "t"], *2 * ["s", "t"]]


def test_a_student_that_is_checkpointed_as_a_whole_is_recorded_once() -> None:
    net, (images, labels), calls = student(), tiny_batch(), list[int]()

    def embed(images: Tensor) -> Tensor:
        calls.append(len(images))
        return images.flatten(1)[:, :12]

    kd = distil("fcd", net=net, teacher=Teacher(embed))
    calls.clear()
    for _ in range(3):
        checkpoint(net, images, use_reentrant=False)
        torch.stack(list(kd(images, labels).values())).sum().backward()
        assert kd.pending is None
    assert calls == [12, 12, 12]


class Conditioned(TinyFaceNet):
    """Takes something else before the images."""

    def forward(self, domain: Tensor, images: Tensor) -> Tensor:  # type: ignore[override]
        embedding: Tensor = super().forward(images)
        return embedding + domain.sum()


def test_a_student_may_take_something_else_first() -> None:
    net, (images, labels) = Conditioned().train(), tiny_batch()
    domain = torch.zeros(len(images))
    kd = distil("fcd", net=net, run_student=lambda images: net(domain[: len(images)], images))
    for _ in range(3):
        net(domain, images)
        kd(images, labels)
    assert kd.step == 3


def test_stages_that_differ_from_the_probe_are_refused() -> None:
    net, (_, labels) = student(), tiny_batch()
    kd = distil(Stages(), net=net, student_stages=["layer1"], teacher_stages=["layer1"])
    net.fc = nn.Linear(64 * 4, 12)
    images = torch.rand(12, 3, 64, 64)
    net(images)
    with pytest.raises(KDHooksError, match=r"'layer1' put out \(4, 32, 32\) in training, \(4, 16"):
        kd(images, labels)


def test_hook_model_stages() -> None:
    class Known:
        @hookimpl
        def model_stages(self, model: nn.Module) -> list[str] | None:
            return ["layer3"] if isinstance(model, TinyFaceNet) else None

    method = Stages()
    distil(method, plugins=[Known()])
    assert method.shapes == [(12, 4, 4), (18, 4, 4)]


def test_hook_embedding_tap() -> None:
    class Asking:
        @hookimpl
        def embedding_tap(self, student: Model, teacher: Model) -> EmbeddingTap:
            self.widths = student.embedding_dim, teacher.embedding_dim
            return EmbeddingTap("gap", Gap())

    method = Asking()
    distil(method)
    assert method.widths == (12, 12)


def test_hook_parameter_tap_counts_once_an_optimiser_step() -> None:
    class Size(nn.Module):
        def forward(self, parameters: list[Tensor]) -> Tensor:
            """[(…)] -> ()."""
            return torch.stack([p.square().sum() for p in parameters]).sum()

    class Decay:
        @hookimpl
        def parameter_tap(self, student: Model) -> ParameterTap:
            return ParameterTap("decay", Size(), 0.5, parameters=("fc.weight",))

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Decay(), net=net)
    kd.accumulation = 2
    for _ in range(2):
        net(images)
        kd(images, labels)["decay"].backward()
    torch.testing.assert_close(net.fc.weight.grad, net.fc.weight.detach())


@pytest.mark.parametrize("kind", [ClassifierShare, InheritedClassifier, ComparedClassifiers])
def test_hook_classifier_share(kind: type[ClassifierShare]) -> None:
    class Scores(nn.Module):
        def forward(
            self,
            student: Tensor,
            teacher: Tensor,
            labels: Tensor,
            classifier: ClassShard,
            head: ClassShard | None = None,
        ) -> Tensor:
            """(b d), (b e), (b), classifier, head -> ()."""
            theirs = classifier.cosines(teacher)
            return ((head or classifier).cosines(student) - theirs).square().mean()

    class Sharing:
        @hookimpl
        def classifier_share(self, student: Model, teacher: Model) -> ClassifierShare:
            assert teacher.classifier is not None
            self.classes = teacher.classifier.total
            return kind("scores", Scores())

    net, (images, labels) = student(), tiny_batch()
    weight = nn.Parameter(torch.randn(6, 12))
    method = Sharing()
    kd = distil(method, net=net, head=ClassShard(weight, 0, 6))
    net(images)
    kd(images, labels)["scores"].backward()
    assert method.classes == 6
    assert net.fc.weight.grad is not None
    assert (weight.grad is not None) == (kind is ComparedClassifiers)
    assert kd.teacher_rows is not None
    assert not kd.teacher_rows.rows.requires_grad


def test_hook_adapt_teacher() -> None:
    class Prompted(nn.Module):
        """Trains a shift of the teacher's embedding, and nothing of the teacher."""

        def __init__(self) -> None:
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(12))

        def forward(self, teacher: nn.Module, images: Tensor) -> Tensor:
            embedding: Tensor = teacher(images)
            return embedding + self.shift

    class Adapting(Method):
        @hookimpl
        def adapt_teacher(self, teacher: Model) -> nn.Module:
            assert teacher.embedding_dim == 12
            return Prompted()

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Adapting(), net=net)
    assert [name for name, _ in kd.named_parameters()] == ["adapter.shift"]
    net(images)
    kd(images, labels)["gap"].backward()
    assert kd.adapter is not None
    assert kd.adapter.shift.grad is not None
    module = kd._session.teacher.module
    assert module is not None
    assert all(p.grad is None for p in module.parameters())
    assert not module.training


# --- refused ---------------------------------------------------------------------------------


def test_a_call_without_a_students_forward_is_refused() -> None:
    kd, (images, labels) = distil(Method()), tiny_batch()
    with pytest.raises(KDHooksError, match="student tap 'output' recorded nothing"):
        kd(images, labels)


def test_images_and_labels_must_match() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(), net=net)
    net(images)
    with pytest.raises(KDHooksError, match="found 12 and 5"):
        kd(images, labels[:5])


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda s, t: (s - t).square(), r"found shape \(12, 12\)"),
        (lambda s, t: (s.detach() - t).square().mean(), "requires_grad False"),
    ],
)
def test_a_loss_must_be_a_scalar_with_a_gradient(
    loss: Callable[[Tensor, Tensor], Tensor], found: str
) -> None:
    class Bad(nn.Module):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return loss(student, teacher)

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=Bad()), net=net)
    net(images)
    with pytest.raises(KDHooksError, match=f"gap: a loss must be a scalar.*{found}"):
        kd(images, labels)


def test_a_loss_that_is_not_finite_is_refused_in_the_first_step() -> None:
    class Infinite(Gap):
        def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
            return super().forward(student, teacher, labels) * torch.inf

    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=Infinite()), net=net)
    net(images)
    with pytest.raises(KDHooksError, match="gap: its loss is inf in the first step"):
        kd(images, labels)


class FailsOnce(Gap):
    """Not finite in its second step."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.map = nn.Linear(12, 12)

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        gap = super().forward(self.map(student), teacher, labels)
        return gap * torch.inf if self.calls == 2 else gap


def test_a_term_that_is_not_finite_later_stops_the_run() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=FailsOnce()), net=net)
    for _ in range(2):
        net(images)
        kd(images, labels)
    net(images)
    with pytest.raises(KDHooksError, match=r"step 2: gap not finite; .* nonfinite = 'skip' goes"):
        kd(images, labels)


def test_no_checkpoint_is_written_after_a_term_that_was_not_finite() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(loss=FailsOnce()), net=net)
    for _ in range(2):
        net(images)
        kd(images, labels)
    with pytest.raises(KDHooksError, match="step 2: gap not finite"):
        kd.state_dict()


def test_a_teacher_that_fails_on_some_images_names_their_labels() -> None:
    known = tiny_teacher()
    assert known.module is not None
    module = known.module
    calls: list[int] = []

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        embedding: Tensor = module(images).clone()
        if len(calls) == 3:  # the probe, one step, this one
            embedding[[1, 4]] = torch.nan
        return embedding

    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", net=net, teacher=Teacher(failing))
    for _ in range(2):
        net(images)
        kd(images, labels)
    lost = labels[[1, 4]].tolist()
    net(images)
    with pytest.raises(KDHooksError, match=rf"for 2 of 12 samples \(labels \[{lost[0]}, {lost[1]}"):
        kd(images, labels)


def test_skipping_goes_on_without_the_terms_of_the_step(caplog: pytest.LogCaptureFixture) -> None:
    net, (images, labels) = student(), tiny_batch()
    loss = FailsOnce()
    kd = distil(Method(loss=loss), net=net, nonfinite="skip")
    values = []
    for _ in range(3):
        net.zero_grad()
        loss.zero_grad()
        net(images)
        term = kd(images, labels)["gap"]
        term.backward()
        values.append(term.item())
        assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)
        if loss.calls == 2:
            assert not any(p.grad is not None and p.grad.any() for p in net.parameters())
            assert kd.metrics == {}
    assert values[0] == values[2] > 0 == values[1]
    assert kd.skipped == 1
    assert "step 2: gap not finite; the step goes on without its terms" in caplog.text


@pytest.mark.parametrize(
    "method", ["adadistill", {"name": "coupleface", "k": 2, "relations": "bank"}]
)
def test_what_is_left_out_spoils_no_bank(method: object) -> None:
    known = tiny_teacher()
    module, calls = known.module, []
    assert module is not None

    def failing(images: Tensor) -> Tensor:
        calls.append(1)
        embedding: Tensor = module(images)
        return embedding * torch.nan if len(calls) == 3 else embedding

    net, (images, labels) = student(), tiny_batch()
    teacher = Teacher(failing, classifier=known.classifier)
    kd = distil(method, net=net, teacher=teacher, nonfinite="skip")
    for _ in range(4):
        net(images)
        kd(images, labels)
    assert kd.skipped == 1
    assert kd.step == 4
    assert all(torch.isfinite(buffer).all() for buffer in kd.buffers())


def test_what_to_do_with_them_has_two_names() -> None:
    with pytest.raises(KDHooksError, match="nonfinite must be 'raise' or 'skip'; found 'pass'"):
        distil("fcd", nonfinite="pass")


@pytest.mark.parametrize(
    ("teacher", "match"),
    [
        (lambda x: x.flatten(1)[:, :12] * torch.inf, "teacher tap 'embedding' is not finite"),
        (lambda x: torch.ones(len(x), 12), "the same embedding .mean cosine 1.00000"),
    ],
)
def test_a_teacher_that_knows_nothing_is_refused(
    teacher: Callable[[Tensor], Tensor], match: str
) -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil(Method(), net=net, teacher=Teacher(teacher))
    net(images)
    with pytest.raises(KDHooksError, match=match):
        kd(images, labels)


def test_a_single_constant_image_is_no_proof_against_the_teacher() -> None:
    net = student()
    kd = distil(Method(), net=net)
    images = torch.zeros(4, *SMALL)
    net(images)
    assert "gap" in kd(images, torch.zeros(4, dtype=torch.long))


def test_a_wrong_class_order_is_refused() -> None:
    good = tiny_teacher()
    assert good.module is not None
    assert good.classifier is not None
    rows = good.classifier.slice(0, 6)
    net, (images, labels) = student(), tiny_batch()
    kd = distil("proxylesskd", net=net, teacher=Teacher(good.module, classifier=rows.roll(1, 0)))
    net(images)
    with pytest.raises(KDHooksError, match="find their own row in 0% of 12 samples"):
        kd(images, labels)


def test_a_label_beyond_the_classifier_is_refused() -> None:
    net, (images, labels) = student(), tiny_batch()
    kd = distil("fcd", net=net)
    net(images)
    with pytest.raises(KDHooksError, match="below the classifier's 6 classes; found 6; teacher"):
        kd(images, labels + 1)


def test_classifier_and_embedding_must_be_of_one_network() -> None:
    module = tiny_teacher().module
    assert module is not None
    teacher = Teacher(module, classifier=torch.randn(6, 20))
    with pytest.raises(KDHooksError, match="rows of width 20, its embedding is 12 wide"):
        distil("fcd", teacher=teacher)


def test_teacher_and_trainer_must_have_the_same_classes() -> None:
    with pytest.raises(KDHooksError, match="has 6 classes, the trainer 7"):
        distil("proxylesskd", head=ClassShard(torch.randn(7, 12), 0, 7))


def test_an_embedding_that_is_no_matrix_names_the_way_out() -> None:
    with pytest.raises(KDHooksError, match=r"student embedding 'layer4' must be \(b d\)"):
        distil(Method(), student_embedding="layer4")


def test_a_term_that_the_hosts_head_computes_is_left_out() -> None:
    kd = distil("fcd", "proxylesskd", host_head="margin")
    assert kd.inherited is not None
    assert (kd.inherited.name, kd.inherited.weight) == ("proxylesskd", 1.0)
    assert kd.inherited.rows().shape == (6, 12)
    assert [tap.name for tap in kd.taps] == ["fcd"]
    assert not list(kd.buffers()), "the host's head holds the rows now"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"m": 0.3}, "own head can't compute it; its options m ask for"),
        ({"weight": lambda step: 1.0}, "its weight must be a number if the trainer's head"),
    ],
)
def test_a_term_that_the_hosts_head_cannot_compute_is_refused(
    options: dict[str, object], match: str
) -> None:
    net = student()
    with pytest.raises(KDHooksError, match=match):
        distil({"name": "proxylesskd", **options}, net=net, host_head="margin")
    assert not net._forward_hooks


def test_without_such_a_head_or_with_weight_zero_kdhooks_computes_it() -> None:
    for options in ({"host_head": None}, {"host_head": "margin"}):
        weight = 0.0 if options["host_head"] else 1.0
        kd = distil({"name": "proxylesskd", "weight": weight}, **options)
        assert kd.inherited is None
        assert [tap.name for tap in kd.taps] == ["proxylesskd"]
