"""`kdhooks doctor --config` uses the student, the head and the step of the training."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kdhooks import KDHooksError
from kdhooks.cli import main
from kdhooks_integrations import arcface_torch
from kdhooks_integrations.arcface_torch import installation
from kdhooks_integrations.arcface_torch.commands.configs import read_config
from kdhooks_integrations.arcface_torch.commands.networks import enter_trainer
from tests.trainer_folder import CLASSES, imports_undone, write_config, write_teacher, write_trainer

Captured = pytest.CaptureFixture[str]
RECIPE = 'methods = ["fcd"]\n[teacher]\nnetwork = "tiny"\ncheckpoint = "model.pt"\n'
TRAINING: dict[str, Any] = {
    "network": "wide", "embedding_size": 16, "num_classes": CLASSES, "batch_size": 12,
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    write_teacher(write_trainer(tmp_path))
    Path("kd.toml").write_text(RECIPE)
    with imports_undone():
        yield tmp_path


def report(capsys: Captured, *options: str, status: int = 0) -> dict[str, Any]:
    assert main(["doctor", "--recipe", "kd.toml", "--json", *options]) == status
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def refusal(capsys: Captured, *options: str) -> str:
    assert main(["doctor", "--recipe", "kd.toml", *options]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "Traceback" not in printed.err
    return printed.err


def checks(found: dict[str, Any]) -> dict[str, tuple[str, str]]:
    return {check["name"]: (check["status"], check["text"]) for check in found["checks"]}


@pytest.mark.parametrize("named", ["configs/x", "configs/x.py", "./configs/x"])
def test_the_config_decides_and_its_base_fills_in(named: str, capsys: Captured) -> None:
    write_config(Path(), "x", **TRAINING, margin_list=[1.0, 0.0, 0.4], sample_rate=0.5)
    found = report(capsys, "--config", named)
    settings = {name: one["value"] for name, one in found["settings"].items()}
    assert settings == {
        **TRAINING, "margin_list": [1.0, 0.0, 0.4], "sample_rate": 0.5, "fp16": False,
        "interclass_filtering_threshold": 0, "gradient_acc": 1, "optimizer": "sgd", "lr": 0.1,
        "weight_decay": 5e-4,
    }  # fmt: skip
    assert {one["source"] for one in found["settings"].values()} == {named}
    said = checks(found)
    assert said["student"][1].endswith("embedding 16")
    assert said["images"][1].startswith("12 random images")
    assert said["settings"][0] == "ok"


def test_an_option_overrides_the_config_and_is_reported(capsys: Captured) -> None:
    write_config(Path(), "x", **TRAINING, fp16=True)
    options = ("--network", "tiny", "--batch-size", "4", "--num-classes", "7", "--no-fp16")
    found = report(capsys, "--config", "configs/x", *options)
    sources = {name: one["source"] for name, one in found["settings"].items()}
    given = {name for name, source in sources.items() if source.startswith("--")}
    assert given == {"network", "batch_size", "num_classes", "fp16"}
    assert found["settings"]["fp16"] == {"value": False, "source": "--fp16"}
    text = checks(found)["settings"][1]
    assert "from configs/x: embedding_size 16" in text
    assert "from the command line: network tiny, num_classes 7, batch_size 4, fp16 False" in text


def test_a_folder_without_get_config_is_merged_in_the_same_way(capsys: Captured) -> None:
    write_config(Path(), "x", **TRAINING, lr=0.02)
    enter_trainer(".")
    (whole, _) = read_config("configs/x", Path())
    for name in [name for name in sys.modules if name.startswith(("configs", "utils"))]:
        del sys.modules[name]
    Path("utils/utils_config.py").unlink()
    (by_hand, _) = read_config("configs/x", Path())
    assert by_hand == whole
    assert (by_hand["lr"], by_hand["weight_decay"]) == (0.02, 5e-4)


def test_a_lone_config_reports_the_assumed_settings(capsys: Captured) -> None:
    write_config(Path(), "x", **TRAINING)
    Path("configs/base.py").unlink()
    Path("utils/utils_config.py").unlink()
    found = report(capsys, "--config", "configs/x")
    assert found["settings"]["lr"] == {"value": 0.1, "source": "assumed"}
    assert "; assumed: fp16 False, sample_rate 1.0" in checks(found)["settings"][1]


def test_a_config_of_another_folder_is_found_through_trainer(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch,
    capsys: Captured,
) -> None:  # fmt: skip
    write_config(folder, "x", **TRAINING)
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    recipe = RECIPE.replace("model.pt", str(folder / "model.pt"))
    Path("kd.toml").write_text(recipe)
    trainer = ("--trainer", str(folder))
    for named in ("configs/x", str(folder / "configs" / "x.py")):
        assert report(capsys, "--config", named, *trainer)["settings"]["lr"]["source"] == named


# --- a config that installs kdhooks --------------------------------------------------------------

INSTALLING = [
    "from kdhooks_integrations import arcface_torch\narcface_torch.install('{recipe}')",
    "from kdhooks_integrations.arcface_torch import install\nkd = install('{recipe}', globals())",
    "from kdhooks_integrations.arcface_torch.installation import install\ninstall('{recipe}')",
    "import kdhooks_integrations.arcface_torch as kd\nkd.install('{recipe}').remove()",
]


@pytest.mark.parametrize("line", INSTALLING)
def test_a_config_that_installs_kdhooks_installs_nothing(line: str, capsys: Captured) -> None:
    write_config(Path(), "x", line.format(recipe="kd.toml"), **TRAINING)
    before, names = installation.install, dict(vars(sys.modules["__main__"]))
    found = report(capsys, "--config", "configs/x")
    assert checks(found)["settings"][0] == "ok"
    assert arcface_torch.install is installation.install is before
    assert vars(sys.modules["__main__"]) == names


def test_a_config_that_installs_another_recipe_is_a_warning(capsys: Captured) -> None:
    write_config(Path(), "x", INSTALLING[0].format(recipe="other.toml"), **TRAINING)
    found = report(capsys, "--config", "configs/x")
    status, text = checks(found)["settings"]
    assert (status, found["status"]) == ("warning", "warning")
    assert text.endswith(
        "the config itself installs the recipe 'other.toml', but this report is about 'kd.toml'"
    )


def test_a_recipe_in_python_is_named_as_such(capsys: Captured) -> None:
    line = "from kdhooks_integrations import arcface_torch\narcface_torch.install({'methods': []})"
    write_config(Path(), "x", line, **TRAINING)
    text = checks(report(capsys, "--config", "configs/x"))["settings"][1]
    assert "installs the recipe 'written in Python'" in text


def test_the_line_would_install_if_it_could() -> None:
    """If it could not, the tests above would prove nothing."""
    with pytest.raises(KDHooksError, match="main program has no get_mo"):
        arcface_torch.install("kd.toml")


# --- wrong configs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("config = {", "found SyntaxError: '{' was never closed"),
        ("config = unknown", "found NameError: name 'unknown' is not defined"),
        ("import easierdict", "No module named 'easierdict'; install the package easierdict"),
        ("settings = {}", "found AttributeError: module 'configs.x' has no attribute 'config'"),
        ("config = 5", "found TypeError: 'int' object is not iterable"),
        ("raise SystemExit(3)", "found SystemExit: 3; correct the file, or specify --network"),
        ("1 / 0", "found ZeroDivisionError: division by zero"),
    ],
)
def test_a_config_that_cannot_be_read(text: str, said: str, capsys: Captured) -> None:
    Path("configs/x.py").write_text(text)
    words = refusal(capsys, "--config", "configs/x")
    assert words.startswith(
        "kdhooks: --config: 'configs/x' must be a config that train_v2.py can read;"
    )
    assert said in words


def test_a_config_that_is_no_text(capsys: Captured) -> None:
    Path("configs/x.py").write_bytes(b"config = {'\xff': 1}")
    assert "must be a config that train_v2.py can read" in refusal(capsys, "--config", "configs/x")


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("configs/baze", "baze.py'; did you mean 'base'? name one of the 1 files in"),
        ("configs", "--config must be a file in the trainer's folder configs"),
        ("kd.toml", "--config must be a file in the trainer's folder configs"),
        ("other/x.py", "which is not in '"),
        ("", "--config must be a file in the trainer's folder configs"),
    ],
)
def test_a_config_that_is_not_there(config: str, said: str, capsys: Captured) -> None:
    assert said in refusal(capsys, "--config", config)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("network", 50, "the name of a network"),
        ("embedding_size", "512", "a whole number, at least 1"),
        ("embedding_size", 0, "a whole number, at least 1"),
        ("embedding_size", True, "a whole number, at least 1"),
        ("num_classes", 1e5, "a whole number, at least 1"),
        ("num_classes", None, "a whole number, at least 1"),
        ("batch_size", 1, "a whole number, at least 2"),
        ("fp16", "no", "True or False"),
        ("sample_rate", -0.1, "a number from 0, which samples only the classes of the batch, to 1"),
        ("sample_rate", 30, "a number from 0, which samples only the classes of the batch, to 1"),
        ("margin_list", 0.5, "three numbers, (1.0, m2, 0.0) for ArcFace"),
        ("margin_list", (1.0, 0.5), "three numbers"),
        ("margin_list", (1.35, 0.5, 0.0), "three numbers"),
        ("margin_list", (1.0, float("nan"), 0.0), "three numbers"),
        ("interclass_filtering_threshold", "0.4", "a number"),
        ("gradient_acc", 0, "a whole number, at least 1"),
        ("optimizer", "lion", "'sgd' or 'adamw'"),
        ("optimizer", ["sgd"], "'sgd' or 'adamw'"),
        ("lr", -0.1, "a number above 0"),
        ("lr", 10**400, "a number above 0"),
        ("batch_size", 10**30, "a whole number, at least 2"),
        ("lr", "0.1", "a number above 0"),
        ("weight_decay", None, "a number, at least 0"),
    ],
)
def test_a_value_of_a_wrong_kind(key: str, value: object, rule: str, capsys: Captured) -> None:
    named = {**TRAINING, key: value}
    Path("configs/x.py").write_text(f"nan = float('nan')\nconfig = {named!r}\n")
    words = refusal(capsys, "--config", "configs/x")
    assert f"--config: {key} must be {rule}" in words
    assert f"found {value!r} in 'configs/x'; correct it there" in words


def test_a_config_without_classes_needs_them(capsys: Captured) -> None:
    write_config(Path(), "x", network="wide", embedding_size=16)
    words = refusal(capsys, "--config", "configs/x")
    assert "the trainer needs num_classes; found none in 'configs/x'; add it there" in words
    given = ("--num-classes", "6", "--batch-size", "4")
    assert report(capsys, "--config", "configs/x", *given)["status"] == "ok"


def test_neither_a_config_nor_a_network(capsys: Captured) -> None:
    assert "or --network NAME; found neither" in refusal(capsys)


def test_prints_of_a_config_do_not_spoil_the_json(capsys: Captured) -> None:
    write_config(Path(), "x", "print('reading x')", **TRAINING)
    assert main(["doctor", "--recipe", "kd.toml", "--json", "--config", "configs/x"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)["status"] == "ok"
    assert "reading x" in printed.err


# --- the student ---------------------------------------------------------------------------------


def test_a_network_of_another_width_than_the_head_is_a_fault(capsys: Captured) -> None:
    write_config(Path(), "x", **{**TRAINING, "embedding_size": 24})
    found = report(capsys, "--config", "configs/x", "--network", "backbones:own", status=1)
    status, text = checks(found)["student"]
    assert status == "fault"
    assert "as the head expects, embedding_size 24 (configs/x); found 16" in text


def test_a_factory_gets_the_options_of_the_command_line(capsys: Captured) -> None:
    options = ("--network", "backbones:own", "--embedding-size", "16")
    assert checks(report(capsys, *options))["student"][1].endswith("embedding 16")
    found = report(capsys, *options, "--fp16", status=1)
    assert "takes no fp16, so --fp16 can't be set" in checks(found)["student"][1]
    found = report(capsys, "--network", "backbones:own")
    assert found["settings"]["embedding_size"] == {"value": None, "source": "assumed"}


def test_the_config_of_the_training_is_the_one_that_the_trainer_merges(capsys: Captured) -> None:
    """gradient_acc reaches the Distiller, and the head has the classes of the config."""
    write_config(Path(), "x", **{**TRAINING, "num_classes": 9}, gradient_acc=4)
    found = report(capsys, "--config", "configs/x")
    assert "the trainer sums 4 batches and clips them to 5" in checks(found)["gradients"][1]
    torch.save(torch.rand(6, 16), "rows.pt")
    Path("kd.toml").write_text(RECIPE.replace('"fcd"', '"kd"') + 'classifier = "rows.pt"\n')
    found = report(capsys, "--config", "configs/x", status=1)
    assert "has 6 classes, the training 9" in checks(found)["classes"][1]
