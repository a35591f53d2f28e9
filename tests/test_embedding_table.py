"""A table with a row for each sample replaces the teacher in a loop that passes indices."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from kdhooks import Distiller, KDHooksError, Teacher, build, class_means
from kdhooks.recipe import Recipe
from kdhooks.teacher.embedding_table import EmbeddingTable
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import tiny_batch, tiny_teacher
from kdhooks_integrations import arcface_torch
from tests.small_distiller import SMALL, student

SIZE: dict[str, Any] = {"input_shape": SMALL}


def data() -> tuple[Tensor, Tensor, Tensor]:
    """Return images, labels, and the teacher's embedding of each image."""
    images, labels = tiny_batch(copies=4)
    with TeacherSession(tiny_teacher()) as session:
        return images, labels, session(images).embedding


def run(teacher: Any, *, indexed: bool, steps: int = 4) -> list[Tensor]:
    """Return the losses of random batches, and the student's weights after them."""
    images, labels, _ = data()
    net = student()
    kd = Distiller(net, teacher, ["fcd", "rkd", "thkd"], **SIZE)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    seen = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = torch.randperm(len(images), generator=generator)[:12]
        net(images[some])
        given = {"indices": some} if indexed else {}
        total = torch.stack([*kd(images[some], labels[some], **given).values()]).sum()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seen.append(total.detach())
    kd.remove()
    return [*seen, *(parameter.detach() for parameter in net.parameters())]


def written(folder: Path, kind: str, rows: Tensor) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "npy":
        np.save(path, rows.numpy())
    elif kind == "pt":
        torch.save(rows, path)
    elif kind == "named.pt":
        torch.save({"embeddings": rows}, path)
    else:
        files = pytest.importorskip("safetensors.torch")
        files.save_file({"embeddings": rows}, path)
    return path


@pytest.mark.parametrize("kind", ["npy", "pt", "named.pt", "safetensors", ""])
def test_it_trains_as_the_teacher_does(kind: str, tmp_path: Path) -> None:
    """They differ only by rounding, since the batch sizes differ."""
    _, _, rows = data()
    rows_of_classes = tiny_teacher().classifier
    source = written(tmp_path, kind, rows) if kind else rows
    found = run(Teacher(EmbeddingTable(source), classifier=rows_of_classes), indexed=True)
    batchwise = run(tiny_teacher(), indexed=False)
    assert_close(found, batchwise, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_each_sample_gets_its_own_row(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = torch.randn(9, 5).to(dtype)
    table = EmbeddingTable(written(tmp_path, "npy", rows))
    some = torch.tensor([8, 0, 8, 3])
    found = table(torch.zeros(4, 3, 2, 2), some)
    wanted = rows[some] if dtype == torch.float64 else rows[some].float()
    assert_close(found, wanted, rtol=0, atol=0)
    assert_close(table(torch.zeros(4, 3, 2, 2), some[:, None].int()), wanted, rtol=0, atol=0)
    found.zero_()
    assert_close(table(torch.zeros(4, 3, 2, 2), some), wanted, rtol=0, atol=0)


def test_a_recipe_names_the_file_beside_it(tmp_path: Path) -> None:
    images, labels, rows = data()
    written(tmp_path, "npy", rows)
    (tmp_path / "kd.toml").write_text(
        'methods = ["fcd"]\ninput_shape = [3, 32, 32]\nteacher = { embeddings = "rows.npy" }\n'
    )
    net = student()
    kd = build(tmp_path / "kd.toml", net)
    for _ in range(2):
        net(images)
        assert kd(images, labels, indices=torch.arange(24))["fcd"].isfinite()
        net(images)
        with pytest.raises(
            KDHooksError, match=r"must be a tensor \(b\); found NoneType; call kd\("
        ):
            kd(images, labels)


def test_it_may_be_one_of_several_teachers() -> None:
    images, labels, rows = data()
    net = student()
    kd = Distiller(net, [tiny_teacher(), Teacher(EmbeddingTable(rows))], ["sp"], **SIZE)
    net(images)
    both = kd(images, labels, indices=torch.arange(24))
    kd.remove()
    alone = Distiller(net, tiny_teacher(), ["sp"], **SIZE)
    net(images)
    assert_close(both["sp"], alone(images, labels)["sp"], rtol=1e-4, atol=1e-4)


def test_rows_that_are_not_of_these_samples_are_noticed() -> None:
    images, labels, rows = data()
    shuffled = Teacher(EmbeddingTable(rows.roll(1, 0)), classifier=tiny_teacher().classifier)
    net = student()
    kd = Distiller(net, shuffled, ["thkd"], **SIZE)
    net(images)
    with pytest.raises(KDHooksError, match="classes must be in the order of the training labels"):
        kd(images, labels, indices=torch.arange(24))


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (torch.arange(24) + 1, r"must be from 0 to 23, the rows of .*; found 24; the table"),
        (torch.arange(24) - 1, r"must be from 0 to 23.*; found -1; the table"),
        (torch.arange(23), r"one for each of 24 images; found shape \(23,\)"),
        (torch.arange(24).float(), r"whole numbers \(b\).*float32"),
        (list(range(24)), r"must be a tensor \(b\); found list"),
    ],
)
@pytest.mark.parametrize("step", [0, 1])
def test_wrong_indices_are_refused_in_every_step(indices: Any, words: str, step: int) -> None:
    images, labels, rows = data()
    net = student()
    kd = Distiller(net, Teacher(EmbeddingTable(rows)), ["fcd"], **SIZE)
    for _ in range(step):
        net(images)
        kd(images, labels, indices=torch.arange(24))
    net(images)
    with pytest.raises(KDHooksError, match=words):
        kd(images, labels, indices=indices)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (torch.zeros(3), r"must be a floating point matrix \(n e\).* shape \(3,\)"),
        (torch.zeros(3, 4, dtype=torch.long), r"dtype (torch\.)?int64"),
        (torch.zeros(0, 4), r"shape \(0, 4\)"),
    ],
)
@pytest.mark.parametrize("kind", ["npy", "pt", ""])
def test_a_tensor_that_is_no_table_is_refused(
    rows: Tensor, words: str, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(KDHooksError, match=words):
        EmbeddingTable(written(tmp_path, kind, rows) if kind else rows)


def test_a_file_with_more_than_the_table_is_refused(tmp_path: Path) -> None:
    torch.save({"rows": torch.zeros(3, 4), "labels": torch.zeros(3)}, tmp_path / "two.pt")
    with pytest.raises(KDHooksError, match=r"only tensor in its file; found 2 .*\(rows, labels\)"):
        EmbeddingTable(tmp_path / "two.pt")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
    with pytest.raises(KDHooksError, match=r"objects\.npy' can't be read"):
        EmbeddingTable(tmp_path / "objects.npy")


def test_a_recipe_in_python_takes_the_object_itself() -> None:
    images, labels, rows = data()
    net = student()
    kd = build({"teacher": EmbeddingTable(rows), "methods": ["fcd"], "input_shape": SMALL}, net)
    assert kd.by_index
    net(images)
    assert kd(images, labels, indices=torch.arange(len(images)))["fcd"].isfinite()
    turned = {"module": EmbeddingTable(rows), "input": {"order": "bgr"}}
    with pytest.raises(KDHooksError, match="found the arguments transform, which apply to"):
        build({"teacher": turned, "methods": ["fcd"], "input_shape": SMALL}, net)


@pytest.mark.parametrize("by_name", [True, False])
def test_hosts_without_indices_refuse_it(by_name: bool, tmp_path: Path) -> None:
    _, _, rows = data()
    file = {"embeddings": str(written(tmp_path, "npy", rows))}
    table = file if by_name else {"module": EmbeddingTable(rows)}
    recipe = Recipe.read({"teacher": table, "methods": ["fcd"]})
    said = r"arcface_torch: teacher\.embeddings must be a folder, .*kdhooks cache build"
    with pytest.raises(KDHooksError, match=said):
        arcface_torch.install(recipe, {})
    net, head = student(), torch.nn.Linear(12, 6)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    with pytest.raises(KDHooksError, match=said):
        arcface_torch.attach(net, head, optimizer, schedule, recipe)
    assert not net._forward_hooks


def test_a_table_has_no_class_means() -> None:
    images, labels, rows = data()
    with pytest.raises(KDHooksError, match="found a table of embeddings by index; average its"):
        class_means(Teacher(EmbeddingTable(rows)), [(images, labels)], 6)
