"""docs/phones.md: its commands are understood, and its code runs where its packages are."""

import argparse
import re
import shlex
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kdhooks import Distiller
from kdhooks.onnx.lower_precision import DEFAULT_METHOD
from kdhooks_integrations.arcface_torch.commands.checked_faces import CALIBRATING
from kdhooks_integrations.arcface_torch.commands.export import _parser
from kdhooks_integrations.arcface_torch.commands.precision import LEAST_COSINE, check_precision
from tests.trainer_folder import WIDTH, faces, settled

TEXT = (Path(__file__).parents[1] / "docs" / "phones.md").read_text(encoding="utf-8")
BLOCKS: dict[str, str] = dict(
    re.findall(r"^```\w+ ([\w-]+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
)


@pytest.mark.parametrize("block", ["table", "int8", "float16"])
def test_a_command_is_understood(block: str) -> None:
    words = shlex.split(BLOCKS[block].partition("kdhooks export ")[2].replace("\\\n", ""))
    options: argparse.Namespace = _parser().parse_args(words)
    check_precision(options)
    assert options.int8 or options.float16


def test_the_limits_and_the_defaults_are_those_of_the_command() -> None:
    limits = f"below {LEAST_COSINE['int8']} (int8) or {LEAST_COSINE['float16']} (float16)"
    assert limits in TEXT
    assert f"`--calibration-images` | {CALIBRATING} by default" in TEXT
    assert f"`--calibration-method {DEFAULT_METHOD}` | The default" in TEXT


@pytest.mark.parametrize(
    ("block", "packages"),
    [("ncnn", ["pnnx", "ncnn"]), ("litert", ["litert_torch", "ai_edge_litert"])],
)
def test_a_conversion_keeps_the_embeddings(
    block: str, packages: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block itself asserts that; the packages warn of much else."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in packages:
            pytest.importorskip(package)
        exec(BLOCKS[block], {"network": settled(), "faces": faces()[0][:4]})
    assert any(path.stat().st_size > 1000 for path in Path("phone").iterdir())


# --- quantisation-aware training -----------------------------------------------------------------

EAGER = (  # what torch says of its eager mode
    "ignore:torch.ao.quantization is deprecated:DeprecationWarning",
    "ignore:Please use quant_min and quant_max:UserWarning",
    "ignore:torch.quantize_per_tensor",
)
pytestmark = [pytest.mark.filterwarnings(text) for text in EAGER]


def scope() -> dict[str, Any]:
    torch.manual_seed(0)
    images = faces()[0]
    teacher = nn.Sequential(settled(), nn.Linear(WIDTH, 128))  # as wide as the page's student
    names: dict[str, Any] = {"teacher": teacher, "faces": images, "loader": [images] * 40}
    exec(BLOCKS["qat-student"], names)
    return names


def test_a_student_is_trained_for_int8(capsys: pytest.CaptureFixture[str]) -> None:
    names = scope()
    exec(BLOCKS["qat"], names)
    assert names["kd"].step == 40
    assert isinstance(names["int8"].stages[0][0], torch.ao.nn.intrinsic.quantized.ConvReLU2d)
    assert isinstance(names["int8"].fc, torch.ao.nn.quantized.Linear)
    mean, _ = re.findall(r"[01]\.\d{4}", capsys.readouterr().out)
    assert float(mean) > 0.98


def test_a_distiller_leaves_the_observers_of_a_prepared_student_as_they_were() -> None:
    """They also record in eval mode, in which the student is probed."""
    names = scope()
    exec(BLOCKS["qat"].partition("with Distiller")[0], names)
    student = names["student"]
    before = {key: value.clone() for key, value in student.state_dict().items()}
    kd = Distiller(student, names["teacher"], ["fcd"])
    now = student.state_dict()
    for key, value in before.items():
        torch.testing.assert_close(now[key], value, rtol=0, atol=0, equal_nan=True)
    kd.remove()
    with torch.no_grad():
        student.eval()(names["faces"])
    now = student.state_dict()
    changed = [key for key, value in before.items() if not now[key].equal(value)]
    assert len(changed) > 10
