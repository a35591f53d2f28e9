"""docs/phones.md: its commands are parsed, and its code runs if its packages are installed."""

import argparse
import copy
import re
import shlex
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_qat_fx

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
    """The block itself asserts this; warnings of the packages are ignored."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package in packages:
            pytest.importorskip(package)
        exec(BLOCKS[block], {"network": settled(), "faces": faces()[0][:4]})
    assert any(path.stat().st_size > 1000 for path in Path("phone").iterdir())


# --- quantisation-aware training -----------------------------------------------------------------

EAGER = (  # torch's warnings about its eager mode
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
    """Observers also record in eval mode, in which the student is probed."""
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


def prepared_eager() -> nn.Module:
    names = scope()
    exec(BLOCKS["qat"].partition("with Distiller")[0], names)
    student: nn.Module = names["student"]
    return student


def prepared_fx() -> nn.Module:
    """Prepare the same network in FX mode, which needs no stubs for its input and output."""
    student = scope()["Student"]()
    student.quant, student.dequant = nn.Identity(), nn.Identity()
    mapping = quantization.get_default_qat_qconfig_mapping(torch.backends.quantized.engine)
    prepared: nn.Module = prepare_qat_fx(student.train(), mapping, (faces()[0][:2],))
    return prepared


MODES: dict[str, tuple[Callable[[], nn.Module], Callable[..., nn.Module]]] = {
    "eager": (prepared_eager, quantization.convert),
    "fx": (prepared_fx, convert_fx),
}


def trained(
    mode: str, weight: float | None, steps: int = 4, earlier: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Return the student after `steps` on a task, and its checkpoint; `weight` is that of fcd."""
    student, teacher = MODES[mode][0](), scope()["teacher"]
    kd = (
        None if weight is None else Distiller(student, teacher, [{"name": "fcd", "weight": weight}])
    )
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9)
    if earlier is not None and kd is not None:
        student.load_state_dict(earlier["student"])
        optimizer.load_state_dict(earlier["optimizer"])
        kd.load_state_dict(earlier["kd"])
    for _ in range(steps):
        images = faces()[0]
        loss = student(images).square().mean()
        if kd is not None:
            loss = loss + sum(kd(images).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if kd is not None:
        kd.remove()
    state = student.state_dict(), optimizer.state_dict(), kd and kd.state_dict()
    return student, copy.deepcopy(dict(zip(("student", "optimizer", "kd"), state, strict=True)))


@pytest.mark.parametrize("mode", MODES)
def test_a_prepared_student_trains_and_resumes_bit_by_bit(mode: str) -> None:
    """Weight 0 equals the run without kdhooks, and a resumed run equals the uninterrupted one."""
    _, plain = trained(mode, None)
    _, zero = trained(mode, 0.0)
    student, distilled = trained(mode, 1.0)
    _, half = trained(mode, 1.0, steps=2)
    _, resumed = trained(mode, 1.0, steps=2, earlier=half)
    assert list(zero["student"]) == list(plain["student"])
    for key, value in plain["student"].items():
        torch.testing.assert_close(zero["student"][key], value, rtol=0, atol=0, equal_nan=True)
    for key, value in distilled["student"].items():
        torch.testing.assert_close(resumed["student"][key], value, rtol=0, atol=0, equal_nan=True)
    images = faces()[0]
    with torch.no_grad():
        expected = student.eval().apply(quantization.disable_observer)(images)
        assert not torch.equal(distilled["student"]["fc.weight"], plain["student"]["fc.weight"])
        found = MODES[mode][1](student)(images)
    assert nn.functional.cosine_similarity(found, expected).mean() > 0.98
