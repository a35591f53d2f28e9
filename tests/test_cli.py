"""The command's output and its error messages."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import entry_points, version
from pathlib import Path
from types import ModuleType

import pytest

from kdhooks import KDHooksError, methods
from kdhooks.cli import main
from tests.distributions import write_distribution

Captured = pytest.CaptureFixture[str]


def test_methods_are_listed_with_package_and_paper(capsys: Captured) -> None:
    assert main(["methods"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["name", "package", "paper"]
    assert [line.split()[0] for line in lines] == [info.name for info in methods()]
    (fcd,) = (line for line in lines if line.startswith("fcd "))
    assert f"kdhooks {version('kdhooks')}  Feature consistency (FCD)" in fcd
    assert fcd.index("kdhooks") == head.index("package")
    assert fcd.index("Feature") == head.index("paper")


def test_a_broken_package_is_listed(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_distribution(tmp_path, "fake_broken", {"fake": "fake_broken:M"}, '"""F."""\nimport no')
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["methods"]) == 0
    assert any(line.split() == ["fake", "fake_broken", "1.0", "F."] for line in lines_of(capsys))


def lines_of(capsys: Captured) -> list[str]:
    return capsys.readouterr().out.splitlines()


def python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize(
    ("name", "hooks", "needs"),
    [
        ("fcd", ["embedding_tap"], []),
        ("rkd", ["embedding_tap"], []),
        ("at", ["feature_tap"], ["feature_maps", "torch_teacher"]),
        ("coupleface", ["embedding_tap"], ["labels", "class_rows"]),
        ("proxylesskd", ["classifier_share"], ["labels", "class_rows"]),
        ("kd", ["classifier_share"], ["labels", "class_rows", "own_classifier"]),
        ("eckd", ["embedding_tap", "parameter_tap"], []),
    ],
)
def test_a_method_is_described(
    name: str, hooks: list[str], needs: list[str], capsys: Captured
) -> None:
    assert main(["methods", name, "--json"]) == 0
    captured = capsys.readouterr()
    table = json.loads(captured.out)
    assert captured.err == ""
    assert (table["name"], table["hooks"]) == (name, hooks)
    assert [need for need, needed in table["needs"].items() if needed] == needs
    assert table["paper"] == next(info.paper for info in methods() if info.name == name)
    assert main(["methods", name]) == 0
    text = capsys.readouterr().out
    assert all(need.replace("_", " ") in text for need in needs)
    assert all(hook in text for hook in hooks)


def test_the_options_of_a_method_are_described(capsys: Captured) -> None:
    assert main(["methods", "kd", "--json"]) == 0
    options = json.loads(capsys.readouterr().out)["options"]
    assert options["temperature"] == {
        "type": "a number", "required": False, "default": 4.0, "range": "above 0", "unit": "",
        "schedule": True, "meaning": options["temperature"]["meaning"],
    }  # fmt: skip
    assert main(["methods", "kd"]) == 0
    lines = [line.strip() for line in lines_of(capsys)]
    assert "temperature = 4.0  (a number, above 0, or a schedule)" in lines
    assert options["temperature"]["meaning"] in lines


def test_a_method_that_needs_options_is_described(
    capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
from kdhooks import hookimpl
class M:
    def __init__(self, *, size: int): ...
    @hookimpl
    def embedding_tap(self): ...
"""
    write_distribution(tmp_path, "fake_needy", {"needy": "fake_needy:M"}, code)
    monkeypatch.syspath_prepend(tmp_path)
    assert main(["methods", "needy"]) == 0
    text = capsys.readouterr().out
    assert "needs    depends on its options: needy needs its option 'size'" in text
    assert "size  (required, a whole number)" in text


def test_the_list_of_methods_as_json(capsys: Captured) -> None:
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["paper"]) for one in listed] == [(m.name, m.paper) for m in methods()]


def test_a_pipe_that_is_closed_early_is_no_error() -> None:
    command = f"{sys.executable} -m kdhooks schema | head -c 10"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert len(done.stdout) == 10
    assert done.stderr == ""


LISTING = """
import sys
from kdhooks.cli import main
main(["methods"])
print("imported:", *[m for m in sys.modules if m.startswith("kdhooks_plugins")])
"""


def test_listing_imports_no_method() -> None:
    assert python(LISTING).splitlines()[-1] == "imported:"


def test_an_imported_method_would_be_noticed() -> None:
    printed = python("import kdhooks_plugins.fcd" + LISTING)
    needed = "kdhooks_plugins kdhooks_plugins._widths kdhooks_plugins.fcd"
    assert printed.splitlines()[-1] == f"imported: {needed}"


def test_version(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"kdhooks {version('kdhooks')}\n"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "the following arguments are required: command"),
        (["methodes"], "invalid choice: 'methodes'"),
    ],
)
def test_wrong_arguments_are_refused(argv: list[str], said: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit) as end:
        main(argv)
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_an_error_is_one_line_and_status_2(capsys: Captured) -> None:
    assert main(["methods", "fdc"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kdhooks: no method 'fdc' is installed; did you mean 'fcd'?")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[list[str]], int]], None]:
    """Return a function that replaces the demonstration."""

    def replace(run: Callable[[list[str]], int]) -> None:
        module = ModuleType("kdhooks_demo.main")
        vars(module)["main"] = run
        monkeypatch.setitem(sys.modules, "kdhooks_demo.main", module)

    return replace


def test_demo_gets_its_own_options(demo: Callable[..., None]) -> None:
    seen: list[str] = []

    def run(argv: list[str]) -> int:
        seen.extend(argv)
        return 0

    demo(run)
    assert main(["demo", "--seeds", "3", "--help"]) == 0
    assert seen == ["--seeds", "3", "--help"]


def test_the_demo_lists_its_options(capsys: Captured) -> None:
    for package in ("PIL", "matplotlib", "onnxruntime", "tqdm"):
        pytest.importorskip(package)
    with pytest.raises(SystemExit) as end:
        main(["demo", "--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: kdhooks demo [-h]")


def test_an_error_of_the_demo_is_one_line(demo: Callable[..., None], capsys: Captured) -> None:
    def run(argv: list[str]) -> int:
        raise KDHooksError("demo: no faces")

    demo(run)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == "kdhooks: demo: no faces\n"


@pytest.mark.parametrize("package", ["PIL", "matplotlib.pyplot", "onnx"])
def test_demo_without_its_extra_names_it(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    lacking(monkeypatch, package)
    assert main(["demo"]) == 2
    said = capsys.readouterr().err
    way_out = "run pip install '.[demo]' in a clone of kdhooks"
    assert said == f"kdhooks: demo needs the package {package}; {way_out}\n"


def test_an_import_error_of_our_own_is_not_taken_for_a_missing_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lacking(monkeypatch, "kdhooks_demo.absent")
    with pytest.raises(ModuleNotFoundError):
        main(["demo"])


def lacking(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """Act as if the demonstration imported a package that is not installed."""

    def missing(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named '{package}'", name=package)

    monkeypatch.setattr("kdhooks.cli.import_module", missing)


def test_ctrl_c_ends_a_command_with_one_line(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise KeyboardInterrupt\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "kdhooks", "run", str(script), "--compat"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 130
    assert done.stderr.endswith("\nkdhooks: interrupted\n")
    assert "Traceback" not in done.stderr


def test_the_help_lists_every_command(capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = [line.split()[0] for line in lines_of(capsys) if line.startswith("    ")]
    assert [name for name in listed if name.isalpha()] == [
        "methods", "schema", "run", "doctor", "taps", "cache", "export", "evaluate", "demo",
    ]  # fmt: skip


def test_commands_are_imported_when_they_are_called() -> None:
    code = LISTING.replace("kdhooks_plugins", "kdhooks_integrations")
    assert python(code).splitlines()[-1] == "imported:"
    noticed = python("import kdhooks_integrations.arcface_torch.commands.taps" + code).splitlines()[
        -1
    ]
    assert "kdhooks_integrations.arcface_torch.commands.taps" in noticed


def test_the_package_is_the_command_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kdhooks", "methods", "fdc"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("kdhooks: no method 'fdc' is installed")


def test_the_command_is_installed() -> None:
    (script,) = entry_points(group="console_scripts", name="kdhooks")
    assert script.load() is main
