"""A third-party package, really built and installed, is found and trained, and errors name it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

from tests.distributions import write_distribution

EXAMPLE = Path(__file__).parents[1] / "examples" / "kdhooks-pkt"

LIST = """
    import sys
    import kdhooks
    listed = {i.name: [i.package, i.paper] for i in kdhooks.methods()}
    methods = ("kdhooks_pkt", "kdhooks_plugins.fcd")
    result(listed=listed, imported=[name for name in methods if name in sys.modules])
"""

TRAIN = """
    import torch
    from kdhooks import build
    from kdhooks.testing import TinyFaceNet, tiny_batch, tiny_teacher

    torch.manual_seed(0)
    student, (images, labels) = TinyFaceNet().train(), tiny_batch()
    recipe = {
        "teacher": tiny_teacher().module,
        "methods": [{"name": "pkt", "weight": 5.0}, {"name": "fcd", "weight": 1.0}],
        "input_shape": [3, 32, 32],
    }
    kd = build(recipe, student)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    history = []
    for _ in range(20):
        student(images)
        terms = kd(images, labels)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        history.append({name: term.item() for name, term in terms.items()})
    result(history=history, raw={name: value.item() for name, value in kd.metrics.items()})
"""

CONFORM = """
    from kdhooks.discovery import load
    from kdhooks.testing import check_method
    check_method(load("pkt"))
    result()
"""

REFUSE = """
    from kdhooks import KDHooksError
    from kdhooks.discovery import load
    said = {}
    for name in ("pkt", "fcd", "broken"):
        try:
            said[name] = load(name).__module__
        except KDHooksError as error:
            said[name] = str(error)
    result(said=said)
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the example's wheel with pip, and return the folder."""
    folder = tmp_path_factory.mktemp("pkt")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder)]
    subprocess.run([*pip, *build, str(EXAMPLE)], check=True)
    (wheel,) = folder.glob("*.whl")
    site = folder / "site"
    subprocess.run(
        [*pip, "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)], check=True
    )
    return site


def run(script: str, *site: Path) -> dict[str, Any]:
    """Run a script in a new interpreter with more on sys.path; return its arguments of result()."""
    code = "import json\ndef result(**values): print(json.dumps(values))\n" + dedent(script)
    paths = [*map(str, site), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_it_is_listed_and_not_imported(installed: Path) -> None:
    result = run(LIST, installed)
    package, paper = result["listed"]["pkt"]
    assert package == "kdhooks-pkt 0.1.0"
    assert paper.startswith("Probabilistic Knowledge Transfer (PKT), Passalis and Tefas, ")
    assert "fcd" in result["listed"]
    assert result["imported"] == []


def test_imported_methods_would_be_noticed(installed: Path) -> None:
    result = run("    import kdhooks_pkt, kdhooks_plugins.fcd" + LIST, installed)
    assert result["imported"] == ["kdhooks_pkt", "kdhooks_plugins.fcd"]


def test_without_the_package_it_is_not_listed() -> None:
    assert "pkt" not in run(LIST)["listed"]


def test_it_trains_as_its_own_term(installed: Path) -> None:
    result = run(TRAIN, installed)
    first, last = result["history"][0], result["history"][-1]
    assert list(first) == ["pkt", "fcd"]
    assert last["pkt"] < 0.7 * first["pkt"]
    assert last["fcd"] < 0.9 * first["fcd"]
    assert last["pkt"] == pytest.approx(5.0 * result["raw"]["pkt"])  # the recipe's option


def test_it_conforms(installed: Path) -> None:
    run(CONFORM, installed)


def test_a_broken_plugin_and_a_second_owner_are_named(installed: Path, tmp_path: Path) -> None:
    write_distribution(tmp_path, "broken_plugin", {"broken": "broken_plugin:Method"}, "import nope")
    write_distribution(tmp_path, "other_pkt", {"pkt": "other_pkt:PKT"}, "class PKT: ...")
    said = run(REFUSE, installed, tmp_path)["said"]
    assert said["fcd"] == "kdhooks_plugins.fcd"
    assert "'broken' of broken_plugin 1.0 can't be imported" in said["broken"]
    assert "No module named 'nope'" in said["broken"]
    assert "'pkt' is declared twice" in said["pkt"]
    assert "kdhooks-pkt 0.1.0 (kdhooks_pkt:PKT)" in said["pkt"]
    assert "other_pkt 1.0 (other_pkt:PKT)" in said["pkt"]


def test_a_broken_plugin_does_not_affect_the_others(installed: Path, tmp_path: Path) -> None:
    write_distribution(tmp_path, "broken_plugin", {"broken": "broken_plugin:Method"}, "import nope")
    said = run(REFUSE, installed, tmp_path)["said"]
    assert (said["pkt"], said["fcd"]) == ("kdhooks_pkt", "kdhooks_plugins.fcd")


def test_the_example_is_short() -> None:
    lines = (EXAMPLE / "kdhooks_pkt.py").read_text().splitlines()
    assert len(lines) <= 40
