"""The line in InsightFace's real train_v2.py, on a CPU.

KDHOOKS_ARCFACE_TORCH names a checkout of it, and KDHOOKS_ARCFACE_RUNNER a script that runs the
checkout as `RUNNER CHECKOUT --steps N --report FILE …`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

CHECKOUT = os.environ.get("KDHOOKS_ARCFACE_TORCH", "")
RUNNER = os.environ.get("KDHOOKS_ARCFACE_RUNNER", "")
METHODS: dict[str, dict[str, object]] = {
    "fcd": {"name": "fcd", "weight": 8.0},
    "coupleface": {"name": "coupleface", "k": 4},
    "proxylesskd": {"name": "proxylesskd"},
}
OTHERS = ("acsr", "aird", "cakd", "cc", "eckd", "ekd", "fitnet", "fskd", "icdface")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHECKOUT and RUNNER),
        reason="KDHOOKS_ARCFACE_TORCH and KDHOOKS_ARCFACE_RUNNER name no checkout and no runner",
    ),
]


def run(folder: Path, *options: str, steps: int = 3, line: str = "") -> dict[str, Any]:
    """Run the real script; return its report, with the keys of its model.pt."""
    output = folder / "output"
    command = [sys.executable, RUNNER, CHECKOUT, "--steps", str(steps), "--output", str(output)]
    command += ["--report", str(folder / "report.json"), *options]
    if line:
        command += ["--patch-imports", line]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    report: dict[str, Any] = json.loads((folder / "report.json").read_text())
    report["keys"] = set(torch.load(output / "model.pt"))
    report["log"] = done.stdout + done.stderr
    return report


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    run(folder, "--lr", "0.05", "--save-states", steps=20)
    return folder / "output"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(tmp_path_factory.mktemp("plain"), "--val-every", "2")


def install(teacher: Path, *methods: dict[str, object]) -> str:
    recipe = {
        "teacher": {
            "network": "r_tiny",
            "checkpoint": str(teacher / "model.pt"),
            "classifier": str(teacher / "checkpoint_gpu_*.pt"),
        },
        "methods": list(methods),
    }
    return f"from kdhooks_integrations import arcface_torch; arcface_torch.install({recipe!r})"


@pytest.mark.parametrize("way", ["--patch-imports", "--config-line"])
def test_weight_zero_is_the_plain_run(
    tmp_path: Path, teacher: Path, plain: dict[str, Any], way: str
) -> None:
    """Losses and weights are bit-identical, with verification in between."""
    line = install(teacher, *({**method, "weight": 0.0} for method in METHODS.values()))
    report = run(tmp_path, "--val-every", "2", way, line)
    for what in ("losses", "param_groups", "keys"):
        assert report[what] == plain[what]
    weights = [key for key in plain if "digest" in key]
    assert weights
    for what in weights:
        assert report[what] == plain[what]


@pytest.mark.parametrize("name", [*METHODS, *OTHERS])
def test_a_method_trains(tmp_path: Path, teacher: Path, plain: dict[str, Any], name: str) -> None:
    method = METHODS.get(name, {"name": name})
    report = run(tmp_path, "--val-every", "2", line=install(teacher, method))
    assert report["losses"] != plain["losses"]
    assert report["keys"] == plain["keys"]
    assert len(report["losses"]) == 3


def test_a_teacher_of_another_network(tmp_path: Path, teacher: Path) -> None:
    (plain_folder, folder) = (tmp_path / "plain", tmp_path / "distilled")
    plain_folder.mkdir()
    folder.mkdir()
    student = ("--network", "mbf")
    without = run(plain_folder, *student)
    report = run(folder, *student, line=install(teacher, *METHODS.values()))
    assert report["keys"] == without["keys"]
    assert report["losses"] != without["losses"]


def test_a_narrower_student_learns_a_projector(tmp_path: Path, teacher: Path) -> None:
    line = install(teacher, {**METHODS["fcd"], "projector": True})
    report = run(tmp_path, "--network", "mbf", "--embedding-size", "128", line=line)
    assert report["param_groups"][1:] == [1, 1]
    assert not any("kdhooks" in key for key in report["keys"])


def test_two_ranks_with_half_precision_sampling_and_accumulation(
    tmp_path: Path, teacher: Path
) -> None:
    """The ranks end with the same auxiliary weights and the same backbone."""
    line = install(teacher, {**METHODS["fcd"], "projector": True}, METHODS["coupleface"])
    everything = ["--nproc", "2", "--amp", "bf16", "--sample-rate", "0.6"]
    everything += ["--gradient-acc", "2", "--val-every", "2"]
    same = (
        "import torch.distributed as dist; "
        "parts = [None] * world_size; "
        "both = [*L['backbone'].parameters(), *L['opt'].param_groups[1]['params']]; "
        "dist.all_gather_object(parts, [p.detach() for p in both]); "
        "assert all(torch.equal(a, b) for a, b in zip(*parts))"
    )
    report = run(tmp_path, *everything, "--check", same, steps=4, line=line)
    assert report["param_groups"][1:] == [1, 1]
