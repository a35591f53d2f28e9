"""Several teachers act as one, whose cosines are means of theirs; each keeps its own settings."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import (
    ClassShard,
    Distiller,
    FeatureTap,
    KDHooksError,
    Model,
    Teacher,
    class_means,
    hookimpl,
)
from kdhooks.classes.joined import JoinedRows, joined
from kdhooks.classes.rows import Rows
from kdhooks.recipe import Recipe, build, build_teacher, build_teachers
from kdhooks.teacher.session import TeacherSession
from kdhooks.teacher.sessions import open_session
from kdhooks.teacher.several import Teachers, one_or_several
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.cache_samples import Counting
from tests.maps import normal
from tests.small_distiller import SMALL, Method, student

SIZE: dict[str, Any] = {"input_shape": SMALL}
BY_COSINES: dict[str, dict[str, object]] = {
    "cc": {},
    "ekd": {},
    "gkd": {"largest": 5},
    "kd": {},
    "rkd": {"unit_length": True},
    "sp": {},
}
"""The methods whose losses depend on the teacher only by cosines."""
NOT = {"rkd": {"unit_length": False}, "eckd": {}}  # these compare lengths, or a learned map


def network(seed: int = 1, dim: int = 12) -> TinyFaceNet:
    """Return a network with the BatchNorm statistics of the batch, which make embeddings differ."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        found = TinyFaceNet(dim, width=6)
    with torch.no_grad():
        for _ in range(20):
            found(tiny_batch(copies=4)[0])
    return found.double().eval()


def teacher(seed: int = 1, dim: int = 12, **options: Any) -> Teacher:
    """Return a teacher with the means of its classes as class rows."""
    module = network(seed, dim)
    images, labels = tiny_batch(copies=4)
    with torch.no_grad():
        embedding = F.normalize(module(images.double()))
    rows = torch.stack([embedding[labels == label].mean(dim=0) for label in range(6)])
    return Teacher(module, classifier=options.pop("classifier", rows), **options)


def images_and_labels() -> tuple[Tensor, Tensor]:
    images, labels = tiny_batch()
    return images.double(), labels


def trained(
    teachers: Any, *methods: object, steps: int = 3, dim: int = 12, **options: Any
) -> tuple[list[dict[str, Tensor]], nn.Module, Distiller]:
    """Train; return the terms of each step, the student, and its Distiller."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        net = TinyFaceNet(dim).double().train()
    rows = torch.linspace(-1, 1, 6 * dim, dtype=torch.float64).reshape(6, dim).sin()
    head = ClassShard(rows.requires_grad_(), 0, 6)
    kd = Distiller(net, teachers, methods, head=head, **SIZE, **options)
    optimizer = torch.optim.SGD([*net.parameters(), rows, *kd.parameters()], lr=1e-3)
    images, labels = images_and_labels()
    seen = []
    for _ in range(steps):
        task = net(images).square().mean()
        terms = kd(images, labels)
        optimizer.zero_grad()
        torch.stack([task, *terms.values()]).sum().backward()
        optimizer.step()
        seen.append({name: term.detach() for name, term in terms.items()})
    return seen, net, kd


def cosines(x: Tensor) -> Tensor:
    unit = F.normalize(x)
    return unit @ unit.T


# --- the mean of cosines -------------------------------------------------------------------------


def test_cosines_of_joined_embeddings_are_means() -> None:
    members = [teacher(1), teacher(2, dim=20), teacher(3, dim=7)]
    images, _ = images_and_labels()
    with open_session(Teachers(members)) as session:
        found = session(images).embedding
    apart = [TeacherSession(one)(images).embedding for one in members]
    wanted = torch.stack([cosines(one) for one in apart]).mean(dim=0)
    assert_close(found.norm(dim=1), torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-12)
    assert_close(cosines(found), wanted, rtol=0, atol=1e-12)
    assert (cosines(apart[0]) - wanted).abs().max() > 0.01, "the teachers differ"


def test_class_scores_of_joined_rows_are_means() -> None:
    members = [teacher(1), teacher(2, dim=20)]
    images, _ = images_and_labels()
    _, _, kd = trained(members, "kd", steps=1)
    assert kd.teacher_rows is not None
    with open_session(Teachers(members)) as session:
        found = kd.teacher_rows.shard().cosines(session(images).embedding)
    scores = []
    for one in members:
        assert one.classifier is not None
        embedding = F.normalize(TeacherSession(one)(images).embedding)
        scores.append(embedding @ F.normalize(one.classifier.slice(0, 6).double()).T)
    assert_close(found, torch.stack(scores).mean(dim=0), rtol=0, atol=1e-6)


def test_the_length_of_an_embedding_has_no_influence() -> None:
    short, long = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    assert_close(joined([short, long * 1e6]), joined([short, long]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", BY_COSINES)
def test_two_equal_teachers_are_one(method: str) -> None:
    spec = {"name": method, **BY_COSINES[method]}
    one, net, _ = trained(teacher(), spec)
    two, other, _ = trained([teacher(), teacher()], spec)
    close: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}  # class rows are kept in float32
    assert_close(two, one, **close)
    assert_close(dict(other.named_parameters()), dict(net.named_parameters()), **close)


@pytest.mark.parametrize("method", NOT)
def test_a_method_that_depends_on_more_than_cosines_would_be_noticed(method: str) -> None:
    spec: dict[str, object] = {"name": method, **NOT[method]}
    one, *_ = trained(teacher(), spec)
    two, *_ = trained([teacher(), teacher()], spec)
    assert (two[0][method] - one[0][method]).abs() > 1e-3


def test_the_same_module_may_be_two_teachers() -> None:
    module = network()
    found, *_ = trained([module, module], "sp")
    wanted, *_ = trained([network(), network()], "sp")
    assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["thkd", "margindistillation", "adadistill", "fcd"])
def test_a_student_as_wide_as_all_teachers_together_needs_no_projector(method: str) -> None:
    found, *_ = trained([teacher(1), teacher(2, dim=20)], method, dim=32)
    assert found[-1][method].isfinite()


def test_a_list_of_one_is_that_teacher() -> None:
    alone = trained(teacher(), {"name": "fcd", "projector": True}, "kd")
    listed = trained([teacher()], {"name": "fcd", "projector": True}, "kd")
    assert_close(listed[0], alone[0], rtol=0, atol=0)
    assert isinstance(listed[2]._session, TeacherSession)
    assert_close(listed[2].state_dict(), alone[2].state_dict(), rtol=0, atol=0)


def test_weight_zero_is_the_run_without_it() -> None:
    weightless = {"name": "fcd", "projector": True, "weight": 0.0}
    _, net, _ = trained([teacher(1), teacher(2)], weightless, {"name": "kd", "weight": 0.0})
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        plain = TinyFaceNet(12).double().train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        plain(images_and_labels()[0]).square().mean().backward()
        optimizer.step()
    assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=0)


# --- each teacher's own settings -----------------------------------------------------------------


def test_each_teacher_gets_its_own_input() -> None:
    class Mean(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images.mean(dim=(2, 3))

    tables = [{"module": Mean()}, {"module": Mean(), "input": {"order": "bgr", "mean": 0}}]
    recipe = Recipe.read({"teacher": tables, "methods": ["sp"]})
    image = torch.tensor([-1.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(2, 3, 16, 16)
    with open_session(one_or_several(build_teachers(recipe))) as session:
        found = session(image).embedding[0]
    bgr = (torch.tensor([1.0, 0.5, -1.0]) * 127.5 + 127.5) / 127.5
    parts = [F.normalize(part, dim=0) for part in (torch.tensor([-1.0, 0.5, 1.0]), bgr)]
    assert_close(found, torch.cat(parts) / 2**0.5)


def test_each_cache_hits(tmp_path: Path) -> None:
    nets = [Counting(), Counting(gain=2.0)]
    teachers = [Teacher(net, cache=tmp_path / str(n)) for n, net in enumerate(nets)]
    net, (images, labels) = student(), tiny_batch()
    kd = Distiller(net, teachers, ["sp"], **SIZE)
    for _ in range(4):
        net(images)
        kd(images, labels)
    caches = kd._session.caches
    assert [cache.folder.name for cache in caches] == ["0", "1"]
    assert [cache.hits for cache in caches] == [36, 36]
    before = [list(one.calls) for one in nets]
    net(images)
    kd(images, labels)
    assert [one.calls for one in nets] == before, "neither teacher ran again"
    kd.remove()


def test_one_teacher_may_be_cached_beside_another_that_is_tapped(tmp_path: Path) -> None:
    net, (images, labels) = student(), tiny_batch()
    teachers = [Teacher(Counting(), cache=tmp_path), tiny_teacher()]
    kd = Distiller(
        net, teachers, ["at"], student_stages=["layer3"], teacher_stages=["1.layer3"], **SIZE
    )
    net(images)
    assert kd(images, labels)["at"].isfinite()
    kd.remove()
    with pytest.raises(KDHooksError, match=r"^teacher 0: teacher\.cache stores embeddings only"):
        Distiller(
            net,
            [Teacher(Counting(), cache=tmp_path), tiny_teacher()],
            ["at"],
            student_stages=["layer3"],
            teacher_stages=["0.inner.layer3"],
            **SIZE,
        )
    assert not any(module._forward_hooks for module in net.modules())


def test_only_rows_of_a_shard_are_read() -> None:
    asked: list[tuple[int, int]] = []

    class Watched(Rows):
        def slice(self, start: int, stop: int) -> Tensor:
            asked.append((start, stop))
            return super().slice(start, stop)

    rows = JoinedRows([Watched([torch.randn(9, width)], ["rows"]) for width in (4, 5)])
    assert (rows.total, rows.dim, rows.slice(3, 6).shape) == (9, 9, (3, 9))
    assert rows.slice(6, 6).shape == (0, 9)
    assert asked == [(3, 6), (3, 6), (6, 6), (6, 6)]


def test_joined_rows_are_described_as_they_were_read() -> None:
    """The digest of rows after rounding would depend on the processor."""
    one, two = (Rows.open(normal(seed, 9, 4)) for seed in (1, 2))
    assert JoinedRows([one, two]).described() == (
        f"teacher 0's {one.described()} and teacher 1's {two.described()}"
    )


def test_the_teachers_run_ahead_of_the_student() -> None:
    order: list[str] = []
    teachers = [network(1), network(2)]
    for number, one in enumerate(teachers):
        one.register_forward_hook(lambda *_, number=number: order.append(f"teacher {number}"))
    with torch.random.fork_rng([]):
        net = TinyFaceNet().double().train()
    kd = Distiller(net, teachers, ["sp"], **SIZE)
    images, labels = images_and_labels()
    net(images)
    kd(images, labels)
    order.clear()
    net.register_forward_hook(lambda *_: order.append("student"))
    net(images)
    kd(images, labels)
    assert order == ["teacher 0", "teacher 1", "student"]


# --- taps ----------------------------------------------------------------------------------------


class Shown(nn.Module):
    """Keeps the teacher's features."""

    def forward(self, student: list[Tensor], teacher: list[Tensor], labels: Tensor) -> Tensor:
        """[(b k h w)], [(b k h w)], (b) -> ()."""
        self.seen = teacher
        return student[0].square().mean()


def tapped(*paths: str, teachers: Any = None) -> list[Tensor]:
    shown = Shown()

    class Taps:
        @hookimpl
        def feature_tap(self) -> FeatureTap:
            ours = ("layer1",) * len(paths)
            return FeatureTap("shown", shown, student=ours, teacher=paths, needs_labels=False)

    trained(teachers or [network(1), network(2, dim=20)], Taps(), steps=1)
    return shown.seen


def outputs(net: nn.Module, path: str) -> Tensor:
    """Return the output of a submodule, or with "" of the network."""
    seen: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen.append(output)

    hook = net.get_submodule(path).register_forward_hook(record)
    with torch.no_grad():
        net(images_and_labels()[0])
    hook.remove()
    return seen[0]


def test_a_tap_names_its_teacher() -> None:
    found = tapped("1.layer2", "0.layer2", "1", "0.fc@1", "")
    first, second = network(1), network(2, dim=20)
    whole = joined([outputs(first, ""), outputs(second, "")])
    wanted = [outputs(second, "layer2"), outputs(first, "layer2"), outputs(second, "")]
    assert_close(found, [*wanted, outputs(first, "fc"), whole])
    assert (found[0] != found[1]).any()


def test_the_second_of_two_equal_teachers_can_be_tapped() -> None:
    module = network()
    assert_close(tapped("1.layer2", teachers=[module, module]), [outputs(module, "layer2")])


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("layer2", r"teacher has no submodule 'layer2'; did you mean"),
        ("2.layer2", r"no submodule '2\.layer2'; did you mean '1\.layer2'"),
        ("1.layer9", r"no submodule '1\.layer9'; did you mean '1\.layer4'"),
    ],
)
def test_a_tap_of_an_unknown_teacher_is_refused(path: str, words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        tapped(path)


def test_stages_of_several_teachers_are_paired_with_the_students() -> None:
    stages: dict[str, Any] = {
        "student_stages": ["layer2", "layer2"],
        "teacher_stages": ["0.layer2", "1.layer2"],
    }
    found, *_ = trained([network(1), network(2)], "at", steps=1, **stages)
    apart = [
        trained(network(seed), "at", steps=1, student_stages=["layer2"], teacher_stages=["layer2"])[
            0
        ][0]["at"]
        for seed in (1, 2)
    ]
    assert_close(found[0]["at"], torch.stack(apart).sum())


class Known:
    @hookimpl
    def model_stages(self, model: nn.Module) -> list[str] | None:
        return ["layer2", "layer3"] if isinstance(model, TinyFaceNet) else None


@pytest.mark.parametrize("method", ["at", "reviewkd", "fskd", "acsr", "cakd", "fitnet"])
def test_with_several_teachers_the_stages_must_be_named(method: str) -> None:
    kd = trained(network(), {"name": method}, steps=1, plugins=[Known()])[2]
    assert kd.taps[0].teacher_paths, "the stages of a single teacher are known"
    with pytest.raises(KDHooksError, match=rf"^{method}.* name (them|it|a submodule)"):
        trained([network(1), network(2)], {"name": method}, plugins=[Known()])


@pytest.mark.parametrize(
    "stages", [["layer2"], ["2.layer2"], ["0x.layer2"], ["stage2"], ["2.stage2"]]
)
def test_a_stage_without_the_number_of_a_teacher_is_refused(stages: list[str]) -> None:
    with pytest.raises(
        KDHooksError, match=r"must start with the number of one of 2 teachers.*'0\.l"
    ):
        trained([network(), network(2)], "at", student_stages=["layer2"], teacher_stages=stages)


def test_a_stage_of_an_unknown_backbone_is_refused_by_its_class() -> None:
    with pytest.raises(
        KDHooksError, match=r"'1\.stage2'; the stages of a TinyFaceNet are not known; .*layer1"
    ):
        trained(
            [network(), network(2)], "at", student_stages=["layer2"], teacher_stages=["1.stage2"]
        )


def test_fitnet_reads_the_joined_embedding() -> None:
    spec = {"name": "fitnet", "student": "", "teacher": ""}
    found, *_ = trained([network(1), network(2, dim=20)], spec, steps=1)
    assert found[0]["fitnet"].isfinite()


class WithLength(TinyFaceNet):
    """As AdaFace's networks, it returns the embedding and its length."""

    def forward(self, images: Tensor) -> Any:
        embedding = super().forward(images)
        return embedding, embedding.norm(dim=1, keepdim=True)


def test_each_teacher_has_a_name_for_its_embedding() -> None:
    """Whether it is the output, a submodule's, one of several outputs, or a function's."""
    plain, with_length = network(4), network(3, dim=7)
    with_length.__class__ = WithLength
    members = [
        network(1),
        Teacher(network(2, dim=20), embedding="fc"),
        Teacher(with_length, embedding="[0]"),
        lambda images: plain(images.double()),  # a function gets float32
    ]
    found = tapped(*(f"{number}.embedding" for number in range(4)), "3", teachers=members)
    wanted = [outputs(network(1), ""), outputs(network(2, dim=20), "fc")]
    wanted += [
        outputs(network(3, dim=7), ""),
        *[plain(images_and_labels()[0].float().double()).detach()] * 2,
    ]
    assert_close(found, wanted)


def test_a_function_cannot_be_tapped() -> None:
    with pytest.raises(KDHooksError, match=r"teacher 1: teacher has no submodules.*to_torch"):
        trained(
            [network(), lambda images: images.mean(dim=(2, 3))],
            "at",
            student_stages=["layer2"],
            teacher_stages=["1.layer2"],
        )
    found, *_ = trained([network(), lambda images: images.mean(dim=(2, 3))], "sp")
    assert found[-1]["sp"].isfinite()


# --- refusals ------------------------------------------------------------------------------------


def test_a_wrong_class_order_is_noticed_for_each_teacher() -> None:
    first, other = teacher(1), teacher(2)
    assert other.classifier is not None
    rolled = teacher(2, classifier=other.classifier.slice(0, 6).roll(1, 0))
    with pytest.raises(KDHooksError, match=r"^teacher 1 classifier: its classes must be in the or"):
        trained([first, rolled], "kd")
    with pytest.raises(KDHooksError, match=r"^teacher 0 classifier: its classes must be in the or"):
        trained([rolled, first], "kd")
    trained([rolled, first], "sp")  # needs no labels


@pytest.mark.parametrize("method", ["kd", "gkd", "coupleface", "icdface"])
def test_a_teacher_without_rows_is_refused_if_rows_are_needed(method: str) -> None:
    spec: dict[str, object] = {"name": method}
    spec |= {"projector": True} if method in ("coupleface", "icdface") else {}
    members = [teacher(1), teacher(2, classifier=None)]
    with pytest.raises(KDHooksError, match=rf"^{method}.* for teacher 1; .*kdhooks\.class_means"):
        trained(members, spec)
    trained(members, "sp")


def test_different_numbers_of_classes_are_refused() -> None:
    fewer = teacher(2, classifier=torch.randn(5, 12))
    with pytest.raises(KDHooksError, match="found 6 classes of teacher 0 and 5 of teacher 1; make"):
        trained([teacher(1), fewer], "kd")


def test_a_teacher_that_is_not_trained_is_named() -> None:
    def same(images: Tensor) -> Tensor:
        return images.new_ones(len(images), 4)

    def nothing(images: Tensor) -> Tensor:
        return images.new_zeros(len(images), 4)

    def infinite(images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3)) * torch.inf

    for fault, words in (
        (same, "^teacher 1 returns the same embedding for all images"),
        (nothing, "^teacher 1 returns an embedding of zeros for all images"),
        (infinite, "^teacher 1 tap 'embedding' is not finite on the first batch"),
    ):
        with pytest.raises(KDHooksError, match=words):
            trained([network(), fault], "sp")


def test_an_embedding_that_is_not_finite_is_noticed_in_a_later_step() -> None:
    spoilt = False

    def embed(images: Tensor) -> Tensor:
        found = images.mean(dim=(2, 3))
        return (
            torch.where(torch.arange(len(images))[:, None] == 3, torch.nan, found)
            if spoilt
            else found
        )

    net, (images, labels) = student(), tiny_batch()
    kd = Distiller(net, [tiny_teacher(), embed], ["sp"], **SIZE)
    net(images)
    kd(images, labels)
    spoilt = True
    net(images)
    kd(images, labels)
    with pytest.raises(KDHooksError, match=r"embedding not finite for 1 of 12 samples"):
        kd.check_finite()


class Adapting(Method):
    @hookimpl
    def adapt_teacher(self, teacher: Model) -> nn.Module:
        return nn.Linear(2, 2)


def test_several_teachers_cannot_be_adapted() -> None:
    with pytest.raises(
        KDHooksError, match=r"Linear can adapt only one teacher; found 2; .*prompts = \{ number ="
    ):
        trained([network(), network(2)], Adapting(), dim=24)


@pytest.mark.parametrize(
    ("teachers", "words"),
    [
        ([], "teacher must be at least one teacher; found an empty list"),
        (["a", "b"], "^teacher 0: teacher must be a module or a function"),
        ([network(), {"onnx": "t"}], "^teacher 1: teacher must be a module or a function"),
    ],
)
def test_an_object_that_is_no_teacher_is_refused(teachers: Any, words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        trained(teachers, "sp")


def test_a_student_among_its_teachers_is_refused() -> None:
    net = network().requires_grad_().train()
    with pytest.raises(KDHooksError, match="must have parameters of their own"):
        Distiller(net, [network(2), net], ["sp"], **SIZE)
    assert net.training


def test_class_means_need_a_single_teacher() -> None:
    members = [teacher(1), teacher(2)]
    batches = [tiny_batch()]
    for several in (members, Teachers(members)):
        with pytest.raises(KDHooksError, match=r"single kdhooks\.Teacher; found several; compute"):
            class_means(several, batches, 6)  # type: ignore[arg-type]
    assert class_means(members[1], [(tiny_batch()[0].double(), tiny_batch()[1])], 6).shape == (
        6,
        12,
    )


# --- recipes -------------------------------------------------------------------------------------


def made(name: Any, state: Mapping[str, Tensor]) -> nn.Module:
    return TinyFaceNet(dim=len(state["fc.bias"]), width=6)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write the files of two teachers, and a recipe."""
    for number, dim in enumerate((12, 20)):
        one = teacher(number + 1, dim)
        assert one.module is not None
        assert one.classifier is not None
        (tmp_path / f"t{number}").mkdir()
        torch.save(one.module.float().state_dict(), tmp_path / f"t{number}/model.pt")
        torch.save(one.classifier.slice(0, 6), tmp_path / f"t{number}/rows.pt")
    (tmp_path / "kd.toml").write_text(
        """
        methods = ["kd", "at"]
        input_shape = [3, 32, 32]

        [[teacher]]
        network = "tiny"
        checkpoint = "t0/model.pt"
        classifier = "t0/rows.pt"

        [[teacher]]
        network = "tiny"
        checkpoint = "t1/model.pt"
        classifier = "t1/rows.pt"
        dtype = "bfloat16"

        [taps]
        student.stages = ["layer3", "layer4"]
        teacher.stages = ["0.layer3", "1.layer4"]
        """
    )
    return tmp_path


def test_a_recipe_lists_teachers_with_paths_beside_the_file(folder: Path) -> None:
    recipe = Recipe.read(folder / "kd.toml")
    assert [table.checkpoint for table in recipe.teachers] == [
        folder / "t0/model.pt",
        folder / "t1/model.pt",
    ]
    first, second = build_teachers(recipe, made)
    assert (first.dtype, second.dtype) == (None, torch.bfloat16)
    with pytest.raises(KDHooksError, match="one for each of 2 teachers; found 1"):
        build_teachers(recipe, [made])
    rows = torch.randn(6, 12).requires_grad_()
    net = student()
    kd = build(recipe, net, network=made, head=ClassShard(rows, 0, 6))
    images, labels = tiny_batch()
    net(images)
    assert set(kd(images, labels)) == {"kd", "at"}
    assert [tap.teacher_paths for tap in kd.taps] == [(), ("0.layer3", "1.layer4")]


def test_a_single_table_in_a_list_is_one_teacher(folder: Path) -> None:
    table = {"network": "tiny", "checkpoint": folder / "t0/model.pt"}
    recipe = Recipe.read({"teacher": [table], "methods": ["fcd"]})
    assert recipe.teacher is recipe.teachers[0]
    assert build_teacher(recipe, made).module is not None


def test_modules_and_functions_are_listed_in_python() -> None:
    recipe = Recipe.read({"teacher": [network(), torch.flatten], "methods": ["sp"]})
    first, second = build_teachers(recipe)
    assert (first.module is None, second.module is None) == (False, True)
    with pytest.raises(KDHooksError, match="builds a single teacher; found 2; build_teachers"):
        build_teacher(recipe)


@pytest.mark.parametrize("where", ["table", "taps"])
def test_the_embedding_of_a_teacher_is_named_in_its_table(where: str) -> None:
    first: dict[str, Any] = {"module": network(1)}
    given: dict[str, Any] = {"teacher": first, "methods": ["sp"]}
    if where == "table":
        first["embedding"] = "fc"
    else:
        given["taps"] = {"teacher": {"embedding": "fc"}}
    assert build_teacher(Recipe.read(given)).embedding == "fc"
    first["embedding"] = "fc"
    given["teacher"] = [{"module": network(2)}, first]
    if where == "table":
        assert [one.embedding for one in build_teachers(Recipe.read(given))] == ["", "fc"]
        return
    with pytest.raises(KDHooksError, match=r"names a submodule of one teacher; found 2 teachers"):
        Recipe.read(given)
    given["teacher"] = first
    with pytest.raises(
        KDHooksError, match=r"names the embedding, as teacher\.embedding does; found"
    ):
        Recipe.read(given)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ([], "recipe: teacher must be at least one table"),
        ([{"module": torch.flatten}, {}], r"recipe: teacher\[1\] needs exactly one of module"),
        ([{"module": torch.flatten}, 3], r"recipe: teacher\[1\] must be a table"),
        (
            [{"module": torch.flatten}, {"network": "r50"}],
            r"recipe: teacher\[1\]\.network needs teacher\.checkpoint",
        ),
        (
            [{"module": torch.flatten, "dtyp": "float16"}, {"module": torch.flatten}],
            r"recipe: teacher\[0\] has no option 'dtyp'; did you mean 'dtype'",
        ),
        (
            [{"module": torch.flatten}, {"module": torch.flatten, "input": {"std": 0}}],
            r"recipe: teacher\[1\]\.input\.std must be above 0",
        ),
    ],
)
def test_a_faulty_table_is_named_by_its_index(tables: Any, words: str) -> None:
    with pytest.raises(KDHooksError, match=words):
        Recipe.read({"teacher": tables, "methods": ["sp"]})


def test_a_faulty_file_is_reported_with_its_teachers_index(folder: Path) -> None:
    torch.save({"fc.bias": torch.zeros(12)}, folder / "t1/model.pt")
    with pytest.raises(KDHooksError, match=r"^teacher 1: "):
        build_teachers(Recipe.read(folder / "kd.toml"), made)


# --- resume --------------------------------------------------------------------------------------


def test_a_resumed_run_is_the_straight_one() -> None:
    methods = [
        {"name": "fcd", "projector": True},
        {"name": "coupleface", "projector": True, "k": 2, "relations": "bank"},
    ]
    members = [tiny_teacher(), tiny_teacher(dim=20)]

    def start() -> tuple[nn.Module, Distiller]:
        net = student()
        return net, Distiller(net, members, methods, **SIZE)

    def steps(net: nn.Module, kd: Distiller, count: int) -> list[Tensor]:
        optimizer = torch.optim.SGD([*net.parameters(), *kd.parameters()], lr=1e-3)
        seen = []
        for number in range(kd.step, kd.step + count):
            images, labels = (x.roll(number, 0) for x in tiny_batch())
            net(images)
            total = torch.stack([*kd(images, labels).values()]).sum()
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            seen.append(total.detach())
        return seen

    straight = steps(*start(), 4)
    net, kd = start()
    seen = steps(net, kd, 2)
    kept = copy.deepcopy([net.state_dict(), kd.state_dict()])
    assert not any("inner" in key or "layer" in key for key in kept[1]), "no teacher is saved"
    net, kd = start()
    net.load_state_dict(kept[0])
    kd.load_state_dict(kept[1])
    assert_close([*seen, *steps(net, kd, 2)], straight, rtol=0, atol=0)
