"""The blocks of docs/teachers-and-views.md on teachers run as printed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdhooks import ClassShard, Teacher, build
from kdhooks.cli import main
from kdhooks.teacher.session import TeacherSession
from kdhooks.testing import TinyFaceNet
from tests.test_several_teachers import BY_COSINES

TEXT = (Path(__file__).parents[1] / "docs" / "teachers-and-views.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)


class Small(TinyFaceNet):
    """Takes images of 112 pixels."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(F.avg_pool2d(images, 3)[:, :, :32, :32])


def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 3, 112, 112, generator=generator) * 2 - 1, torch.arange(12)


def trained(seed: int) -> Small:
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        network = Small()
    with torch.no_grad():
        for _ in range(20):
            network(images()[0])
    return network.eval()


def rows_of(network: nn.Module, bgr: bool = False) -> Tensor:
    seen, _ = images()
    with torch.no_grad():
        rows: Tensor = network(seen.flip(1) if bgr else seen)
    return rows


def student() -> Small:
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Small().train()


def network_of(name: str, state: Mapping[str, Tensor]) -> nn.Module:
    assert name in ("r100", "r50")
    return Small()


def test_the_recipe_with_several_teachers_trains(tmp_path: Path) -> None:
    (tmp_path / "kd.toml").write_text(BLOCKS["several"])
    for seed, name in enumerate(("r100", "r50")):
        folder = tmp_path / "teachers" / name
        folder.mkdir(parents=True)
        teacher = trained(seed)
        torch.save(teacher.state_dict(), folder / "model.pt")
        bgr = name == "r50"  # as in the recipe
        torch.save(rows_of(teacher, bgr), folder / "rows.pt")
    head = ClassShard(torch.randn(12, 12, requires_grad=True), 0, 12)
    net = student()
    kd = build(tmp_path / "kd.toml", net, network=network_of, head=head)
    for _ in range(2):
        net(images()[0])
        assert set(kd(*images())) == {"kd", "fcd", "at"}
    (cache,) = kd._session.caches
    assert cache.hits == 12


def test_the_list_in_python_trains() -> None:
    first, second = trained(1), trained(2)
    names: dict[str, Any] = {
        "student": student(),
        "first": first,
        "second": second,
        "rows_of_first": rows_of(first),
        "rows_of_second": rows_of(second),
    }
    exec(compile(BLOCKS["several-in-python"], "teachers-and-views.md", "exec"), names)
    names["student"](images()[0])
    assert set(names["kd"](*images())) == {"sp", "fcd"}


def test_the_methods_that_depend_only_on_cosines_are_listed() -> None:
    (line,) = re.findall(r"^- (.*?) use\s+only\s+cosines", TEXT, re.MULTILINE | re.DOTALL)
    assert re.findall(r"`(\w+)`", line) == ["cc", "ekd", "gkd", "kd", "sp", "rkd"]
    assert sorted(BY_COSINES) == sorted(re.findall(r"`(\w+)`", line))


def test_the_recipe_with_a_cache_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("kd.toml").write_text(BLOCKS["embeddings"])
    filling = Teacher(trained(1), cache="teacher/cache")
    with TeacherSession(filling, like=images()[0]) as session:
        session(images()[0])
    net = student()
    kd = build("kd.toml", net)
    net(images()[0])
    assert kd(*images())["fcd"].isfinite()


def test_the_table_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("rows.npy", rows_of(trained(1)).numpy())
    seen, labels = images()
    names: dict[str, Any] = {"student": student(), "loader": [(seen, labels, torch.arange(12))]}
    exec(compile(BLOCKS["table"], "teachers-and-views.md", "exec"), names)
    assert set(names["terms"]) == {"fcd"}


def test_the_command_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = re.findall(r"^kdhooks (cache build .*)$", TEXT, re.MULTILINE)
    assert main(line.split()) == 2
    assert "'build.toml' does not exist" in capsys.readouterr().err
