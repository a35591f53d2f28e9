"""`kdhooks run`: it changes nothing that a script sees, and refuses scripts that do not fit."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kdhooks import KDHooksError
from kdhooks.cli import main
from kdhooks_integrations.arcface_torch.commands import compat, run
from tests.arcface_runs import install, outcome
from tests.standin import Trainer

ROOT = Path(__file__).parents[1]
SCRIPT = """'''Its docstring.'''
from __future__ import annotations
import sys
from networks import get_model
from heads import PartialFC_V2
from torch.optim.lr_scheduler import ConstantLR
seen = sorted(globals())

def main():
    print(__name__, __file__, sys.argv, sys.path[0], __doc__, sys.modules["__main__"].main is main)
    print(main.__annotations__, "hook" in str(seen), type(get_model).__name__)

if __name__ == "__main__":
    main()
"""


def toml(folder: Path, teacher: dict[str, str], methods: str) -> str:
    table = "\n".join(f"{key} = '{value}'" for key, value in teacher.items())
    file = folder / "kd.toml"
    file.write_text(f"methods = {methods}\ninput_shape = [3, 32, 32]\n[teacher]\n{table}\n")
    return str(file)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a trainer's folder with a recipe, and make it the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / "networks.py").write_text("def get_model(): ...")
    (tmp_path / "heads.py").write_text("class PartialFC_V2: ...")
    (tmp_path / "model.pt").write_text("weights")
    teacher = '[teacher]\nnetwork = "tiny"\ncheckpoint = "model.pt"\n'
    (tmp_path / "kd.toml").write_text(f'methods = ["fcd"]\n{teacher}')
    return tmp_path


@pytest.fixture(autouse=True)
def _modules_of_the_folder() -> Iterator[None]:
    yield
    for name in ("networks", "heads"):
        sys.modules.pop(name, None)


# --- in training ---------------------------------------------------------------------------------


def test_it_trains_like_the_line_in_the_script(
    one: Trainer, teacher: dict[str, str], tmp_path: Path
) -> None:
    recipe = toml(tmp_path, teacher, '[{name = "fcd", weight = 8.0}]')
    (launched,) = one.run(launch=["--recipe", recipe])
    (line,) = one.run(below_imports=install(teacher, {"name": "fcd", "weight": 8.0}))
    assert outcome(launched) == outcome(line) != outcome(one.run()[0])


def test_weight_zero_is_the_plain_run(
    one: Trainer, teacher: dict[str, str], tmp_path: Path
) -> None:
    nothing = '[{name = "fcd", weight = 0.0}, {name = "coupleface", k = 2, weight = 0.0}]'
    (launched,) = one.run(launch=["--recipe", toml(tmp_path, teacher, nothing)])
    assert outcome(launched) == outcome(one.run()[0])


def test_compat_alone_is_the_plain_run(one: Trainer) -> None:
    assert outcome(one.run(launch=["--compat"])[0]) == outcome(one.run()[0])


def test_a_line_in_the_config_counts_once(
    one: Trainer, teacher: dict[str, str], tmp_path: Path
) -> None:
    recipe = toml(tmp_path, teacher, '["fcd"]')
    (launched,) = one.run(launch=["--recipe", recipe])
    (both,) = one.run(install(teacher, "fcd"), launch=["--recipe", recipe])
    assert outcome(both) == outcome(launched)


def test_two_ranks_by_torchrun(one: Trainer, teacher: dict[str, str], tmp_path: Path) -> None:
    """The ranks end with the same student, and the methods' state is saved."""
    config = tmp_path / "job.py"
    (report,) = one.run()
    text = Path(report["config"]).read_text().replace(report["output"], str(tmp_path / "out"))
    config.write_text(text)
    lines = dict.fromkeys(("BELOW_IMPORTS", "AFTER_SCHEDULE", "BEFORE_LOOP"), "")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "kdhooks"]
    script = ["run", str(ROOT / "tests/standin/train.py"), str(config)]
    done = subprocess.run(
        [sys.executable, *command, *script, "--recipe", toml(tmp_path, teacher, '["fcd"]')],
        env={
            **os.environ,
            **lines,
            "STORE": str(tmp_path / "store"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "PYTHONPATH": str(ROOT),
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shards = [torch.load(tmp_path / "out" / f"checkpoint_gpu_{rank}.pt") for rank in range(2)]
    ours, theirs = (shard["state_dict_backbone"]["fc.weight"] for shard in shards)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert all(shard["state_optimizer"]["kdhooks"]["distiller"] for shard in shards)


def test_a_script_that_creates_no_head_is_refused(folder: Path) -> None:
    with pytest.raises(KDHooksError, match=r"'train\.py' ended, but distillation was not attached"):
        run.main(["train.py", "--recipe", "kd.toml"])


# --- the script's environment --------------------------------------------------------------------


def printed_by(*command: str) -> list[str]:
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False
    ).stdout.splitlines()


@pytest.mark.parametrize("place", ["", "trainer/"])
def test_the_script_sees_the_same_as_with_plain_python(
    place: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The script is started from its own folder, and from another one."""
    if place:
        folder.rename(folder.with_name("trainer"))
        monkeypatch.chdir(folder.parent)
    script, recipe = f"{place}train.py", f"{place}kd.toml"
    plain = printed_by(script, "configs/x", "--lr", "0.1")
    ours = ["-m", "kdhooks", "run", script, "configs/x", "--recipe", recipe, "--lr", "0.1"]
    assert plain[1] == "{} False function"
    assert printed_by(*ours) == [plain[0], "{} False method"]


@pytest.mark.parametrize(
    ("given", "ours", "own"),
    [
        ("t.py configs/x --recipe r", ("r", False), "configs/x"),
        ("--recipe r --compat t.py configs/x", ("r", True), "configs/x"),
        ("t.py --lr 0.1 configs/x --compat -h", (None, True), "--lr 0.1 configs/x -h"),
        ("t.py a --recipe=r -- --recipe s -- b", ("r", False), "a --recipe s -- b"),
        ("t.py --recip s --recipe r", ("r", False), "--recip s"),
    ],
)
def test_the_scripts_own_arguments_stay_its_own(
    given: str, ours: tuple[str | None, bool], own: str
) -> None:
    options, arguments = run._options(given.split())
    assert (options.recipe, options.compat) == ours
    assert arguments == own.split()


def test_the_process_is_restored_afterwards(folder: Path) -> None:
    before = sys.modules["__main__"], list(sys.argv), list(sys.path)
    with pytest.raises(KDHooksError, match="distillation was not attached"):
        run.main(["train.py", "x", "--recipe", "kd.toml"])
    assert (sys.modules["__main__"], sys.argv, sys.path) == before


def test_a_traceback_shows_the_scripts_own_lines(folder: Path) -> None:
    (folder / "train.py").write_text(SCRIPT.replace("    main()", "    main() / 0"))
    done = subprocess.run(
        [sys.executable, "-m", "kdhooks", "run", "train.py", "--recipe", "kd.toml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert 'train.py", line 14, in <module>\n    main() / 0\n' in done.stderr


# --- refused scripts and arguments ---------------------------------------------------------------

HEAD = "from heads import PartialFC_V2\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f():\n    from n import get_model, PartialFC_V2", "no get_model and no PartialFC_V2"),
        (HEAD + "get_net = 1", "did you mean 'get_net'? if the script is a fork"),
        ("from n import get_model\nimport h as PartialFC_V3", "did you mean 'PartialFC_V3'?"),
        (HEAD + "if __name__ == '__main__':\n    get_model = 1", "found no get_model;"),
        ("print 1", "'old.py' is not valid in this Python"),
        ("x = '\0'", "'old.py' is not valid in this Python"),
    ],
)
def test_a_script_that_does_not_fit_is_refused(source: str, said: str) -> None:
    with pytest.raises(KDHooksError) as error:
        run.prepared(source, "old.py", hooked=True)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "source",
    [
        "import sys\nfrom a import get_model as g, b as get_model\nclass PartialFC_V2: ...\nx = 1",
        "def get_model(): ...\ntry:\n    from a import PartialFC_V2\nexcept E:\n    pass\nx = 1",
        "from a import *\nPartialFC_V2 = h.PartialFC\nx = 1",
        "from a import get_model, PartialFCAdamW\nimport lr_scheduler\nx = 1",
    ],
)
def test_the_hook_is_inserted_below_the_last_name(source: str) -> None:
    tree = run.prepared(source, "t.py", hooked=True)
    calls = [type(node).__name__ for node in tree.body]
    assert calls[-2:] == ["Expr", "Assign"]
    assert calls.count("Expr") == 1


def test_without_a_recipe_any_script_runs(
    folder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compat, "REPAIRS", ())  # the repairs would outlast this test
    (folder / "other.py").write_text("import sys\nprint(sys.argv)")
    assert main(["run", "other.py", "a", "--compat"]) == 0
    assert capfd.readouterr().out == "['other.py', 'a']\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["train.py"], "run needs --recipe FILE; found none"),
        (["absent.py", "--recipe", "kd.toml"], "run: there is no script 'absent.py' in "),
        (["train.py", "--recipe", "absent.toml"], "'absent.toml' does not exist"),
        (["latin.py", "--compat"], "run: 'latin.py' can't be read as Python: "),
        (["utf8.py", "--compat"], "run: 'utf8.py' can't be read as Python: "),
        ([], "run: the following arguments are required: script"),
        (["train.py", "--recipe"], "argument --recipe: expected one argument"),
    ],
)
def test_a_command_that_cannot_start_is_refused(
    folder: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "latin.py").write_bytes(b"# caf\xe9\n")
    (folder / "utf8.py").write_bytes(b"\n\n\n" + b"x = 1\n" * 2000 + b"# caf\xe9\n")
    assert main(["run", *argv]) == 2
    assert said in capsys.readouterr().err
