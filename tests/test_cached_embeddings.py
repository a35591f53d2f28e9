"""A folder filled by `kdhooks cache build` replaces the teacher, which is then not loaded."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Teacher, build, class_means
from kdhooks.recipe import Recipe, build_teacher
from kdhooks.teacher.cache import CachedEmbeddings, CacheOptions
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher
from tests.cache_samples import Counting, filled, started, views
from tests.small_distiller import SMALL, student
from tests.test_several_teachers import teacher as double_teacher

SIZE: dict[str, Any] = {"input_shape": SMALL}
METHODS: list[object] = ["fcd", "rkd"]


def run(teacher: Any, batches: list[Tensor], *methods: object) -> list[Tensor]:
    """Return the loss of each step, and the student's weights at the end."""
    net = student()
    kd = Distiller(net, teacher, methods or METHODS, **SIZE)
    optimizer = torch.optim.SGD([*net.parameters(), *kd.parameters()], lr=1e-3)
    seen = []
    for images in batches:
        net(images)
        total = torch.stack([*kd(images).values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append(total.detach())
    kd.remove()
    return [*seen, *(parameter.detach() for parameter in net.parameters())]


def batches() -> list[Tensor]:
    return [views(0, 4), views(4, 8), views(2, 6)]


def test_it_trains_as_the_teacher_and_its_cache_do(tmp_path: Path) -> None:
    """They agree to the last bit because both read the same rows."""
    filled(tmp_path)
    network = Counting()
    expected = run(Teacher(network, cache=tmp_path), batches())
    found = run(Teacher(CachedEmbeddings(tmp_path)), batches())
    assert_close(found, expected, rtol=0, atol=0)
    without = run(Teacher(Counting()), batches())
    assert_close(found[:3], without[:3], rtol=2e-3, atol=1e-3)
    assert not all(torch.equal(a, b) for a, b in zip(found, without, strict=True))


def test_a_recipe_names_the_folder_beside_it(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    (tmp_path / "kd.toml").write_text(
        'methods = ["fcd"]\ninput_shape = [3, 32, 32]\nteacher = { embeddings = "cache" }\n'
    )
    net = student()
    kd = build(tmp_path / "kd.toml", net)
    images = views(0, 8)
    for _ in range(2):
        net(images)
        assert kd(images)["fcd"].isfinite()
    (cache,) = kd._session.caches
    assert (cache.hits, cache.asked, cache.writing) == (16, 16, False)
    assert kd._session.teacher.module is None


@pytest.mark.parametrize("step", [0, 2])
def test_a_view_that_is_not_there_is_refused(step: int, tmp_path: Path) -> None:
    filled(tmp_path)
    given = [views(0, 4), views(4, 8)]
    given.insert(step, views(5, 11))
    said = r"must hold every view.*; 3 of 6 images of this batch are missing; .*kdhooks cache build"
    with pytest.raises(KDHooksError, match=said):
        run(Teacher(CachedEmbeddings(tmp_path)), given)


def test_a_damaged_record_counts_as_missing(tmp_path: Path) -> None:
    filled(tmp_path)
    (rows,) = tmp_path.glob("*.rows")
    content = bytearray(rows.read_bytes())
    content[0] ^= 1
    rows.write_bytes(content)
    with pytest.raises(KDHooksError, match="; 1 of 8 images of this batch are missing"):
        run(Teacher(CachedEmbeddings(tmp_path)), [views(0, 8)])


def test_nothing_is_written_into_the_folder(tmp_path: Path) -> None:
    filled(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    run(Teacher(CachedEmbeddings(tmp_path)), batches())
    with pytest.raises(KDHooksError):
        run(Teacher(CachedEmbeddings(tmp_path)), [views(5, 11)])
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_views_that_are_added_meanwhile_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdhooks.teacher.cache.READ_ON_EVERY", 0.0)
    filled(tmp_path, 4)
    with TeacherSession(Teacher(CachedEmbeddings(tmp_path))) as session:
        session(views(0, 4))
        with started(tmp_path) as other:
            expected = other(views(4, 8)).embedding
        assert_close(session(views(4, 8)).embedding, expected, rtol=0, atol=0)


def test_it_runs_ahead_of_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path)
    order: list[str] = []

    class Watched(TinyFaceNet):
        def forward(self, images: Tensor) -> Tensor:
            order.append("student")
            return super().forward(images)

    net = Watched().train()
    kd = Distiller(net, Teacher(CachedEmbeddings(tmp_path)), ["fcd"], **SIZE)
    (cache,) = kd._session.caches
    begin = cache.start

    def start(*arguments: Any) -> Any:
        order.append("keys")
        return begin(*arguments)

    monkeypatch.setattr(cache, "start", start)
    images = views(0, 8)
    net(images)
    kd(images)
    order.clear()
    net(images)
    kd(images)
    assert order == ["keys", "student"]


def test_the_student_may_see_another_view(tmp_path: Path) -> None:
    filled(tmp_path)
    net, clean = student(), views(0, 8)
    kd = Distiller(net, Teacher(CachedEmbeddings(tmp_path)), ["fcd"], **SIZE)
    blurred = clean.mean(dim=(2, 3), keepdim=True).expand_as(clean).contiguous()
    net(blurred)
    assert kd(blurred, teacher_images=clean)["fcd"].isfinite()
    net(blurred)
    with pytest.raises(KDHooksError, match="8 of 8 images of this batch are missing"):
        kd(blurred)


def test_it_may_be_one_of_several_teachers(tmp_path: Path) -> None:
    filled(tmp_path)
    members = [tiny_teacher(), Teacher(CachedEmbeddings(tmp_path))]
    found = run(members, batches(), "sp")
    expected = run([tiny_teacher(), Teacher(Counting(), cache=tmp_path)], batches(), "sp")
    assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(KDHooksError, match=r"^teacher 1: teacher\.embeddings: .* 6 of 6 images"):
        run(members, [views(10, 16)], "sp")


def test_it_may_have_class_rows(tmp_path: Path) -> None:
    known = tiny_teacher()
    assert known.module is not None
    images, labels = tiny_batch()
    with TeacherSession(Teacher(known.module, cache=tmp_path), like=images) as session:
        session(images)
        session(images.flip(-1))
    rows = class_means(Teacher(CachedEmbeddings(tmp_path)), [(images, labels)], 6)
    assert_close(rows, class_means(Teacher(known.module), [(images, labels)], 6), rtol=0, atol=1e-3)
    net = student()
    kd = Distiller(net, Teacher(CachedEmbeddings(tmp_path), classifier=rows), ["thkd"], **SIZE)
    net(images)
    assert kd(images, labels)["thkd"].isfinite()
    rolled = Teacher(CachedEmbeddings(tmp_path), classifier=rows.roll(1, 0))
    kd.remove()
    kd = Distiller(net, rolled, ["thkd"], **SIZE)
    net(images)
    with pytest.raises(KDHooksError, match="classes must be in the order of the training labels"):
        kd(images, labels)


def test_a_resumed_run_is_the_straight_one(tmp_path: Path) -> None:
    filled(tmp_path)

    def start() -> tuple[nn.Module, Distiller]:
        net = student()
        teacher = Teacher(CachedEmbeddings(tmp_path))
        return net, Distiller(net, teacher, [{"name": "fcd", "projector": True}], **SIZE)

    def steps(net: nn.Module, kd: Distiller) -> list[Tensor]:
        optimizer = torch.optim.SGD([*net.parameters(), *kd.parameters()], lr=1e-2)
        seen = []
        for images in (views(0, 4), views(4, 8)):
            net(images)
            (term,) = kd(images).values()
            optimizer.zero_grad()
            term.backward()
            optimizer.step()
            seen.append(term.detach())
        return seen

    net, kd = start()
    straight = [*steps(net, kd), *steps(net, kd)]
    net, kd = start()
    seen = steps(net, kd)
    kept = net.state_dict(), kd.state_dict()
    net, kd = start()
    net.load_state_dict(kept[0])
    kd.load_state_dict(kept[1])
    assert_close([*seen, *steps(net, kd)], straight, rtol=0, atol=0)


# --- refusals ------------------------------------------------------------------------------------


def test_a_folder_that_is_no_cache_is_refused(tmp_path: Path) -> None:
    table = {"embeddings": str(tmp_path / "absent")}
    with pytest.raises(KDHooksError, match=r"must be a folder that .*absent', which does not"):
        Recipe.read({"teacher": table, "methods": ["fcd"]})
    (tmp_path / "absent").mkdir()
    with pytest.raises(KDHooksError, match=r"absent' holds no teacher\.json; specify the folder"):
        build_teacher(Recipe.read({"teacher": table, "methods": ["fcd"]}))


def test_images_of_another_shape_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(48, 12)).train()
    with pytest.raises(KDHooksError, match=r"filled with images of the shape \(3, 32, 32\); found"):
        Distiller(net, Teacher(CachedEmbeddings(tmp_path)), ["fcd"], input_shape=(3, 64, 64))


def test_methods_that_need_a_network_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    teacher = Teacher(CachedEmbeddings(tmp_path))
    stages: dict[str, Any] = {"student_stages": ["layer3"], "teacher_stages": ["layer3"]}
    said = "its embeddings are stored, and no network is loaded; give the network itself"
    with pytest.raises(KDHooksError, match=said):
        Distiller(student(), teacher, ["at"], **stages, **SIZE)
    with pytest.raises(KDHooksError, match="at needs at least 1 of the teacher's stages; found 0"):
        Distiller(student(), teacher, ["at"], student_stages=["layer3"], **SIZE)


@pytest.mark.parametrize(
    "option",
    [
        {"input": {"order": "bgr"}}, {"dtype": "float16"}, {"channels_last": True},
        {"compile": True}, {"side_stream": True}, {"micro_batch": 4}, {"cache": "cache"},
        {"embedding": "fc"}, {"checkpoint": "model.pt"}, {"convert": True},
    ],
)  # fmt: skip
def test_options_of_a_network_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    (key,) = option
    recipe = {"teacher": {"embeddings": str(tmp_path), **option}, "methods": ["fcd"]}
    with pytest.raises(KDHooksError, match=rf"teacher\.{key} belongs to .*; found embeddings"):
        Recipe.read(recipe)


def test_a_path_of_the_embedding_is_refused(tmp_path: Path) -> None:
    taps = {"teacher": {"embedding": "fc"}}
    recipe = {"teacher": {"embeddings": str(tmp_path)}, "methods": ["fcd"], "taps": taps}
    with pytest.raises(KDHooksError, match=r"names the embedding, as teacher\.embeddings does"):
        Recipe.read(recipe)


def test_arguments_of_a_network_are_refused(tmp_path: Path) -> None:
    filled(tmp_path)
    stored = CachedEmbeddings(tmp_path)
    with pytest.raises(KDHooksError, match="found the arguments dtype, micro_batch, which apply"):
        Teacher(stored, dtype=torch.float16, micro_batch=3)
    with pytest.raises(KDHooksError, match=r"found the arguments cache, which"):
        Teacher(stored, cache=CacheOptions(path=tmp_path))


def test_a_network_beside_the_folder_is_refused(tmp_path: Path) -> None:
    table = {"embeddings": str(tmp_path), "module": double_teacher().module}
    with pytest.raises(KDHooksError, match=r"exactly one of module, .*, embeddings; found mod"):
        Recipe.read({"teacher": table, "methods": ["fcd"]})
