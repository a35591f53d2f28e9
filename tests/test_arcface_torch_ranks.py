"""Several processes train one student, and agree with a single process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arcface_runs import (
    EQUAL_ROWS,
    METHODS,
    NOT_COMPRESSED,
    PROJECTED,
    TOGETHER,
    described,
    install,
    outcome,
    rows_of,
    trained,
)
from tests.standin import Trainer


def test_auxiliaries_stay_equal_on_two_ranks_with_uneven_classes(
    one: Trainer, two: Trainer
) -> None:
    few = described(trained(one, network="wide", embedding_size=24, num_classes=5), "wide")
    own = {"name": "proxylesskd", "head": "own", "projector": True}
    first, second = two.run(install(few, *PROJECTED, own), num_classes=5, gradient_acc=2)
    assert first["auxiliaries"] == second["auxiliaries"] != first["first_auxiliaries"]
    assert first["parameters"] == second["parameters"]


@pytest.mark.parametrize("methods", TOGETHER)
def test_every_method_stays_equal_on_two_ranks(
    two: Trainer, teacher: dict[str, str], methods: str
) -> None:
    first, second = two.run(install(teacher, *TOGETHER[methods]), gradient_acc=2)
    assert first["auxiliaries"] == second["auxiliaries"]
    assert first["parameters"] == second["parameters"]


def test_auxiliaries_start_equal_on_two_ranks(one: Trainer, two: Trainer) -> None:
    """Even if a method drew its own weights earlier, from generators that differ between ranks."""
    method = (
        "import torch\n"
        "from kdhooks import EmbeddingTap, hookimpl\n"
        "from kdhooks_plugins.fcd import EmbeddingDistance\n"
        "class Drawn:\n"
        "    @hookimpl\n"
        "    def embedding_tap(self):\n"
        "        return EmbeddingTap('drawn', loss)\n"
        "torch.manual_seed(int(__import__('os').environ['RANK']))\n"
        "loss = EmbeddingDistance(projector=torch.nn.Linear(16, 16))\n"
        "loss.projector.bias.requires_grad_(False)\n"
    )
    line = install(described(trained(one)), "METHOD").replace("'METHOD'", "Drawn()")
    first, second = two.run(method + line)
    assert first["first_auxiliaries"] == second["first_auxiliaries"]
    assert first["auxiliaries"] == second["auxiliaries"]


@pytest.mark.parametrize("classes", [5, 6])
def test_rows_are_split_again_for_two_ranks(one: Trainer, two: Trainer, classes: int) -> None:
    folder = trained(one, num_classes=classes)
    reports = two.run(install(described(folder), "proxylesskd"), num_classes=classes)
    assert torch.equal(rows_of(Path(reports[0]["output"])), rows_of(folder))


def test_rows_of_two_ranks_are_joined_for_one(one: Trainer, two: Trainer) -> None:
    folder = trained(two, num_classes=5)
    (report,) = one.run(install(described(folder), "proxylesskd"), num_classes=5)
    assert torch.equal(rows_of(Path(report["output"])), rows_of(folder))


@pytest.mark.parametrize("methods", [[], ["fcd"], ["coupleface"], ["proxylesskd"], ["own"]])
def test_two_ranks_equal_one_on_the_same_global_batch(
    one: Trainer, two: Trainer, teacher: dict[str, str], wide: dict[str, str], methods: list[str]
) -> None:
    """The network has no batch statistics, so that the trainer itself agrees. The losses are means
    over the ranks.
    """
    projected = {
        "fcd": PROJECTED[0],
        "coupleface": PROJECTED[1],
        "own": {"name": "proxylesskd", "head": "own", "margin_type": "cosface"},
        "proxylesskd": {"name": "proxylesskd"},
    }
    chosen = [projected[method] for method in methods]
    used = wide if {"fcd", "coupleface"} & set(methods) else teacher
    line = install(used, *chosen) if chosen else ""
    same = {"network": "frozen", "after_schedule": EQUAL_ROWS, **NOT_COMPRESSED}
    (alone,) = one.run(line, batch_size=24, **same)
    first, second = two.run(line, batch_size=12, **same)
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-4, atol=1e-4)
    assert first["parameters"] == second["parameters"]


def test_a_term_that_fails_on_one_rank_is_left_out_on_both(
    two: Trainer, teacher: dict[str, str]
) -> None:
    method = (
        "import os, torch\n"
        "from kdhooks import EmbeddingTap, hookimpl\n"
        "from kdhooks_plugins.fcd import EmbeddingDistance\n"
        "class Failing(EmbeddingDistance):\n"
        "    calls = 0\n"
        "    def forward(self, student, teacher, labels):\n"
        "        Failing.calls += 1\n"
        "        fails = Failing.calls == 2 and os.environ['RANK'] == '1'\n"
        "        return super().forward(student, teacher, labels) * (torch.inf if fails else 1)\n"
        "class Fails:\n"
        "    @hookimpl\n"
        "    def embedding_tap(self):\n"
        "        return EmbeddingTap('fails', Failing(projector=torch.nn.Linear(16, 16)))\n"
    )
    line = install(teacher, "METHOD", nonfinite="skip").replace("'METHOD'", "Fails()")
    ask = {"skipped": "installed.attachment.distiller.skipped"}
    first, second = two.run(below_imports=method + line, ask=ask)
    assert first["extra"] == second["extra"] == {"skipped": 1}
    assert first["parameters"] == second["parameters"]
    assert first["auxiliaries"] == second["auxiliaries"]


def test_four_ranks_equal_one(
    one: Trainer, wide: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Of the four ranks, two have two of the six classes and two have one."""
    four = Trainer(4, tmp_path_factory.mktemp("four"))
    own = {"name": "proxylesskd", "head": "own", "projector": True}
    line = install(wide, *PROJECTED, own)
    same: dict[str, Any] = {"network": "frozen", "after_schedule": EQUAL_ROWS, **NOT_COMPRESSED}
    try:
        reports = four.run(line, batch_size=6, **same)
    finally:
        four.close()
    (alone,) = one.run(line, batch_size=24, **same)
    means = [sum(losses) / 4 for losses in zip(*(r["losses"] for r in reports), strict=True)]
    torch.testing.assert_close(means, alone["losses"], rtol=1e-4, atol=1e-4)
    assert len({report["parameters"] for report in reports}) == 1
    assert len({report["auxiliaries"] for report in reports}) == 1


def test_verification_on_one_of_two_ranks_does_not_wait_for_the_other(
    two: Trainer, teacher: dict[str, str]
) -> None:
    first, second = two.run(install(teacher, *METHODS.values()), verbose=1)
    assert len(first["verified"]) == 3
    assert second["verified"] == []


def test_weight_zero_is_the_plain_run_on_two_ranks(two: Trainer, teacher: dict[str, str]) -> None:
    nothing = [{**method, "weight": 0.0} for method in METHODS.values()]
    reports = two.run(install(teacher, *nothing))
    assert [outcome(r) for r in reports] == [outcome(r) for r in two.run()]
