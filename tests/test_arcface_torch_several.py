"""Several teachers in arcface_torch: installed, attached or launched; on several ranks; resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.arcface_runs import (
    EQUAL_ROWS,
    NOT_COMPRESSED,
    PROJECTED,
    install,
    outcome,
    resumed_as_straight,
)
from tests.standin import Trainer

Table = dict[str, str]
METHODS = '[{name = "fcd", projector = true}, "kd", "at"]'
ALL: list[dict[str, object]] = [*PROJECTED, {"name": "kd"}, {"name": "sp"}]


def toml(folder: Path, *teachers: Table) -> str:
    tables = [
        "[[teacher]]\n" + "\n".join(f"{key} = '{value}'" for key, value in table.items())
        for table in teachers
    ]
    stages = 'student.stages = ["layer3", "layer4"]\nteacher.stages = ["0.layer3", "1.layer4"]\n'
    start = f"methods = {METHODS}\ninput_shape = [3, 32, 32]\n"
    file = folder / "kd.toml"
    file.write_text("\n".join([start, *tables, f"[taps]\n{stages}"]))
    return str(file)


def several(*teachers: Table) -> Any:
    """Return teachers in place of the one teacher that `tests.arcface_runs` expects."""
    return list(teachers)


def test_a_toml_file_has_the_same_effect_wherever_it_is_named(
    one: Trainer, teacher: Table, wide: Table, tmp_path: Path
) -> None:
    file = toml(tmp_path, teacher, wide)
    start = "from kdhooks_integrations import arcface_torch\n"
    end = f"{file!r}, get_model=get_model)"
    objects = "backbone, module_partial_fc, opt, lr_scheduler"
    whole: dict[str, Any] = {"sample_rate": 1.0}  # kd compares with all rows of the head
    (installed,) = one.run(f"{start}installed = arcface_torch.install({file!r})", **whole)
    (attached,) = one.run(
        after_schedule=f"{start}attached = arcface_torch.attach({objects}, {end}", **whole
    )
    (launched,) = one.run(launch=["--recipe", file], **whole)
    assert outcome(installed) == outcome(attached) == outcome(launched)
    assert installed["losses"] != one.run(**whole)[0]["losses"]
    assert installed["losses"] != one.run(install(teacher, "kd"), **whole)[0]["losses"]


def test_weight_zero_is_the_plain_run(two: Trainer, teacher: Table, wide: Table) -> None:
    nothing = [{**method, "weight": 0.0} for method in ALL]
    whole: dict[str, Any] = {"sample_rate": 1.0}
    reports = two.run(install(several(teacher, wide), *nothing), **whole)
    for report, plain in zip(reports, two.run(**whole), strict=True):
        assert report["groups"] == [34, 2, 1], "with two projectors"
        assert outcome({**report, "groups": plain["groups"]}) == outcome(plain)


def test_two_ranks_equal_one_on_the_same_global_batch(
    one: Trainer, two: Trainer, teacher: Table, wide: Table
) -> None:
    """Each rank reads only its own classes, from both teachers."""
    line = install(several(teacher, wide), *ALL)
    same: dict[str, Any] = {"network": "frozen", "after_schedule": EQUAL_ROWS, **NOT_COMPRESSED}
    ask = {
        "rows": "list(installed.attachment.distiller.teacher_rows.rows.shape)",
        "start": "module_partial_fc.class_start",
    }
    (alone,) = one.run(below_imports=line, batch_size=24, ask=ask, **same)
    first, second = two.run(below_imports=line, batch_size=12, ask=ask, **same)
    assert alone["extra"] == {"rows": [6, 40], "start": 0}
    assert first["extra"] == {"rows": [3, 40], "start": 0}
    assert second["extra"] == {"rows": [3, 40], "start": 3}
    mean = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
    torch.testing.assert_close(mean, alone["losses"], rtol=1e-4, atol=1e-4)
    assert first["parameters"] == second["parameters"]


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_resume_equals_the_straight_run(
    request: pytest.FixtureRequest, teacher: Table, wide: Table, ranks: str
) -> None:
    trainer: Trainer = request.getfixturevalue(ranks)
    resumed_as_straight(trainer, install(several(teacher, wide), *ALL))


def test_the_head_takes_the_joined_rows_over(one: Trainer, teacher: Table, wide: Table) -> None:
    """The student is as wide as both teachers together."""
    line = install(several(teacher, wide), {"name": "proxylesskd"})
    ask = {
        "lengths": "module_partial_fc.weight.norm(dim=1).tolist()",
        "frozen": "not module_partial_fc.weight.requires_grad",
    }
    (report,) = one.run(line, embedding_size=40, ask=ask)
    assert "error" not in report, report
    assert report["extra"]["frozen"]
    assert report["extra"]["lengths"] == pytest.approx([1.0] * 6, abs=1e-5)


def test_each_teacher_keeps_its_cache_of_the_run(
    one: Trainer, teacher: Table, wide: Table, tmp_path: Path
) -> None:
    cached = [{**table, "cache": str(tmp_path / n)} for n, table in (("a", teacher), ("b", wide))]
    line = install(several(*cached), {"name": "sp"})
    filling, repeating = (one.run(line, fresh=True)[0] for _ in range(2))
    assert outcome(filling) == outcome(repeating)
    assert [len(list((tmp_path / n).glob("*.keys"))) for n in "ab"] == [1, 1]


def test_the_teacher_whose_classes_are_in_another_order_is_named(
    one: Trainer, teacher: Table, wide: Table, tmp_path: Path
) -> None:
    shards = sorted(Path(wide["classifier"]).parent.glob("checkpoint_gpu_*.pt"))
    rows = torch.cat([torch.load(path)["state_dict_softmax_fc"]["weight"] for path in shards])
    torch.save(rows.roll(1, 0), tmp_path / "rolled.pt")
    rolled = {**wide, "classifier": str(tmp_path / "rolled.pt")}
    (report,) = one.run(install(several(teacher, rolled), {"name": "kd"}), sample_rate=1.0)
    assert report["error"] == "KDHooksError"
    assert report["message"].startswith("teacher 1 classifier: its classes must be in the order")


@pytest.mark.parametrize("ranks", ["one", "two"])
def test_a_cache_replaces_the_teacher(
    request: pytest.FixtureRequest, teacher: Table, tmp_path: Path, ranks: str
) -> None:
    """The run repeats the one that filled the cache, to the last bit."""
    trainer: Trainer = request.getfixturevalue(ranks)
    method = {"name": "fcd", "weight": 8.0}
    filled = install({**teacher, "cache": str(tmp_path / "cache")}, method)
    ask = {"closed": "installed.attachment.remove()"}  # writes the last batch
    filling = trainer.run(below_imports=filled, ask=ask)
    alone = install({"embeddings": str(tmp_path / "cache")}, method)
    assert [outcome(one) for one in trainer.run(alone)] == [outcome(one) for one in filling]
    for path in (tmp_path / "cache").glob("*.keys"):
        path.unlink()
    for report in trainer.run(alone, fresh=True):
        assert "12 of 12 images of this batch are missing" in report["message"]
        assert "kdhooks cache build" in report["message"]
