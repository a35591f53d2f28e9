"""The logged accuracy is the share of a batch's images whose class the teacher recognises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kdhooks
from kdhooks import ClassShard, KDHooksError, Teacher
from kdhooks.classes.chunked_sums import NUMBERS
from kdhooks.classes.ranks import gather
from kdhooks.classes.rows import Rows
from kdhooks.testing import tiny_batch, tiny_teacher
from tests.maps import normal
from tests.ranks import Results, group, here, mine, on_two_ranks
from tests.small_distiller import SMALL, distil, student, teacher_network

KEY = "teacher/accuracy"


def measured(
    labels: Tensor | None = None, steps: int = 1, **options: Any
) -> list[dict[str, Tensor]]:
    """Return the metrics of each step."""
    net, found = student(), []
    kd = distil("margindistillation", net=net, **options)
    images, own = tiny_batch()
    for _ in range(steps):
        net(images)
        kd(images, own if labels is None else labels)
        found.append(dict(kd.metrics))
    return found


def expected(labels: Tensor) -> float:
    """Return the accuracy over samples with a class, computed in plain torch."""
    teacher, (images, _) = tiny_teacher(), tiny_batch()
    assert teacher.classifier is not None
    with torch.no_grad():
        embedding = teacher_network()(images)
    unit = nn.functional.normalize(embedding)
    nearest = (unit @ nn.functional.normalize(teacher.classifier.slice(0, 6)).T).argmax(dim=1)
    return float((nearest == labels)[labels >= 0].float().mean())


def test_it_is_the_share_of_images_nearest_to_their_own_row() -> None:
    _, labels = tiny_batch()
    other = labels.clone()
    other[:3] = (other[:3] + 1) % 6
    other[3] = -1  # without a class
    assert 0.5 < expected(other) < 1
    (metrics,) = measured(other)
    assert float(metrics[KEY]) == pytest.approx(expected(other))
    assert not metrics[KEY].requires_grad


def test_samples_without_a_class_do_not_count() -> None:
    (metrics,) = measured(torch.full((len(tiny_batch()[1]),), -1))
    assert float(metrics[KEY]) == 0


def test_it_is_measured_every_n_steps_and_not_repeated_in_between() -> None:
    found = [KEY in metrics for metrics in measured(steps=5, log_teacher_accuracy=2)]
    assert found == [True, False, True, False, True]
    assert [KEY in metrics for metrics in measured(steps=3)] == [True, False, False]
    assert [KEY in metrics for metrics in measured(steps=2, log_teacher_accuracy=0)] == [False] * 2
    assert [KEY in metrics for metrics in measured(steps=2, log_teacher_accuracy=1)] == [True] * 2


def test_nothing_is_measured_if_no_term_uses_the_rows() -> None:
    net = student()
    kd = distil("fcd", net=net, log_teacher_accuracy=1)
    images, labels = tiny_batch()
    net(images)
    kd(images, labels)
    assert set(kd.metrics) == {"fcd"}


def test_a_teacher_that_does_not_run_is_not_measured() -> None:
    """After the first step, proxylesskd needs only the rows."""
    net = student()
    kd = distil({"name": "proxylesskd", "head": "own"}, net=net, log_teacher_accuracy=1)
    images, labels = tiny_batch()
    for _ in range(2):
        net(images)
        kd(images, labels)
        assert KEY not in kd.metrics


def test_it_changes_no_term_and_no_gradient() -> None:
    outcomes = []
    for every in (0, 1):
        net = student()
        kd = distil("margindistillation", net=net, log_teacher_accuracy=every)
        images, labels = tiny_batch()
        net(images)
        (term,) = kd(images, labels).values()
        term.backward()
        outcomes.append([term.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert all(torch.equal(one, other) for one, other in zip(*outcomes, strict=True))


def test_a_recipe_has_the_option() -> None:
    recipe: dict[str, Any] = {
        "teacher": {"module": teacher_network(), "classifier": tiny_teacher().classifier},
        "methods": ["margindistillation"],
        "input_shape": list(SMALL),
        "log_teacher_accuracy": 0,
    }
    net, (images, labels) = student(), tiny_batch()
    kd = kdhooks.build(recipe, net)
    net(images)
    kd(images, labels)
    assert KEY not in kd.metrics
    with pytest.raises(KDHooksError, match="log_teacher_accuracy must be at least 0 steps; found"):
        kdhooks.build({**recipe, "log_teacher_accuracy": -1}, student())
    with pytest.raises(KDHooksError, match=r"log_teacher_accuracy must be a whole number; found 1"):
        measured(log_teacher_accuracy=1.5)


# --- over shards ---------------------------------------------------------------------------------


@pytest.mark.parametrize("numbers", [1 << 20, 8])  # in one chunk, and in chunks of one class
def test_the_nearest_class_is_that_of_all_rows(
    numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(NUMBERS, "cpu", numbers)
    rows, x = normal(1, 20, 8), normal(2, 15, 8)
    rows[7] = rows[3]  # the first of equal rows counts
    x[0] = rows[3]
    shard = ClassShard(rows, 100, 200)
    found = shard.nearest(x)
    assert torch.equal(found - 100, Rows.open(rows).nearest(x)[1])
    assert found[0] == 103


def _over_ranks() -> dict[str, Results]:
    rank, size = here()
    rows, x = normal(1, 7, 4), normal(2, 12, 4)
    rows[6] = rows[1]  # the equal row is on the other rank
    x[0] = rows[1]
    start, stop = (0, 7) if size == 1 else ((0, 4), (4, 7))[rank]
    shard = ClassShard(rows[start:stop], start, 7, group())
    net, teacher = student(), Teacher(teacher_network(), classifier=tiny_teacher().classifier)
    bounds = (0, 6) if size == 1 else ((0, 3), (3, 6))[rank]
    head = nn.Parameter(torch.randn(bounds[1] - bounds[0], 12))
    kd = distil(
        "margindistillation",
        net=net,
        teacher=teacher,
        head=ClassShard(head, bounds[0], 6, group()),
    )
    images, labels = tiny_batch()
    labels = labels.clone()
    labels[[0, 1, 6, 7]] = (labels[[0, 1, 6, 7]] + 1) % 6  # two wrong labels on each rank
    net(mine(images))
    kd(mine(images), mine(labels))
    return {
        "found": {"nearest": shard.nearest(gather(mine(x), group())), KEY: kd.metrics[KEY]},
        "expected": {KEY: torch.tensor(expected(labels))},
    }


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    alone = _over_ranks()
    torch.testing.assert_close(alone["found"][KEY], alone["expected"][KEY])
    assert 0.5 < float(alone["found"][KEY]) < 0.8
    assert alone["found"]["nearest"][0] == 1
    for rank in on_two_ranks(_over_ranks, tmp_path):
        assert torch.equal(rank["found"]["nearest"], alone["found"]["nearest"])
        assert torch.equal(rank["found"][KEY], alone["found"][KEY])


def _differing() -> dict[str, Results]:
    """Ranks that measure in different steps would wait for each other."""
    rank, _ = here()
    try:
        measured(log_teacher_accuracy=1 + rank)
    except KDHooksError as error:
        return {"said": {"error": str(error)}}
    return {"said": {"error": ""}}


def test_ranks_that_measure_in_different_steps_are_refused(tmp_path: Path) -> None:
    for rank in on_two_ranks(_differing, tmp_path):
        assert "only rank 1 has: teacher/accuracy every 2 steps" in rank["said"]["error"]
