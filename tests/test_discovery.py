"""Methods are found by entry point and imported lazily; errors name the method."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kdhooks import EmbeddingTap, KDHooksError, hookimpl, methods
from kdhooks.discovery import MethodInfo, create, load
from kdhooks_plugins.fcd import FCD
from tests.distributions import write_distribution

SOURCE = '''"""A Paper, Author et al., Venue 2020.

More about it.
"""
class Method:
    def __init__(self, *, size: int, weight: float = 1.0) -> None:
        self.size, self.weight = size, weight

not_a_class = 3
'''


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on sys.path; modules imported from it, all fake_…, are forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("fake_")]:
        del sys.modules[name]


def info(name: str) -> MethodInfo:
    return next(info for info in methods() if info.name == name)


def test_the_docstring_is_read_without_an_import(path: Path) -> None:
    write_distribution(path, "fake_paper", {"fake": "fake_paper:Method"}, SOURCE)
    assert info("fake") == MethodInfo(
        "fake", "A Paper, Author et al., Venue 2020.", "fake_paper 1.0"
    )
    assert "fake_paper" not in sys.modules
    assert load("fake").__name__ == "Method"
    assert "fake_paper" in sys.modules


def test_no_parent_package_is_imported_either(path: Path) -> None:
    write_distribution(path, "fake_outer", {"fake": "fake_tree.branch.leaf:Method"})
    leaf = path / "fake_tree" / "branch"
    leaf.mkdir(parents=True)
    for package in (leaf.parent, leaf):
        (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (leaf / "leaf.py").write_text(SOURCE)
    assert info("fake").paper == "A Paper, Author et al., Venue 2020."
    assert not [name for name in sys.modules if name.startswith("fake_tree")]


@pytest.mark.parametrize("source", ["", "class Method: ...", "def broken(:"])
def test_a_module_without_a_readable_docstring_is_listed(path: Path, source: str) -> None:
    write_distribution(path, "fake_bare", {"fake": "fake_bare:Method"}, source)
    assert info("fake") == MethodInfo("fake", "", "fake_bare 1.0")


def test_a_module_that_is_not_there_is_listed(path: Path) -> None:
    write_distribution(path, "fake_gone", {"fake": "fake_absent.inner:Method"})
    assert info("fake") == MethodInfo("fake", "", "fake_gone 1.0")
    with pytest.raises(KDHooksError, match=r"can't be imported from 'fake_absent\.inner:Method'"):
        load("fake")


def test_our_own_methods_are_listed_in_order() -> None:
    names = [info.name for info in methods()]
    assert {"coupleface", "fcd", "proxylesskd"} <= set(names)
    assert names == sorted(names)
    assert all(info.paper.endswith(".") for info in methods() if info.package[:8] == "kdhooks ")


def test_an_unknown_name_gets_its_near_miss() -> None:
    with pytest.raises(
        KDHooksError,
        match=r"no method 'couplefase' is installed; did you mean 'coupleface'\? installed: .*fcd",
    ):
        load("couplefase")


def test_a_name_unlike_any_gets_only_the_list() -> None:
    with pytest.raises(KDHooksError, match="no method 'zzz' is installed; installed: "):
        load("zzz")


def test_an_unknown_option_gets_its_near_miss() -> None:
    with pytest.raises(
        KDHooksError,
        match=r"fcd has no option 'distanse'; did you mean 'distance'\? its options are: weight",
    ):
        create({"name": "fcd", "distanse": "l2"})


def test_a_missing_required_option_is_named(path: Path) -> None:
    write_distribution(path, "fake_paper", {"fake": "fake_paper:Method"}, SOURCE)
    with pytest.raises(KDHooksError, match="fake needs its option 'size'"):
        create("fake")
    made = create({"name": "fake", "size": 3})
    assert (getattr(made, "size", None), getattr(made, "weight", None)) == (3, 1.0)


def test_an_entry_point_must_name_a_class(path: Path) -> None:
    write_distribution(path, "fake_paper", {"fake": "fake_paper:not_a_class"}, SOURCE)
    with pytest.raises(
        KDHooksError, match="entry point must name a class; 'fake_paper:not_a_class' is int"
    ):
        load("fake")


def test_an_attribute_that_is_not_there_is_named(path: Path) -> None:
    write_distribution(path, "fake_paper", {"fake": "fake_paper:Methood"}, SOURCE)
    with pytest.raises(KDHooksError, match=r"'fake' of fake_paper 1\.0 .*AttributeError.*Methood"):
        load("fake")


def test_a_broken_plugin_does_not_affect_others(path: Path) -> None:
    source = '"""Broken, 2021."""\nimport fake_dependency'
    write_distribution(path, "fake_broken", {"broken": "fake_broken:Method"}, source)
    assert info("broken").paper == "Broken, 2021."
    assert load("fcd") is FCD
    with pytest.raises(
        KDHooksError,
        match=(
            r"method 'broken' of fake_broken 1\.0 can't be imported from 'fake_broken:Method': "
            "ModuleNotFoundError: No module named 'fake_dependency'"
        ),
    ):
        load("broken")


def test_two_distributions_of_one_name_are_refused_by_both_names(path: Path) -> None:
    for name in ("fake_left", "fake_right"):
        write_distribution(path, name, {"fake": f"{name}:Method"}, SOURCE)
    assert [i.package for i in methods() if i.name == "fake"] == ["fake_left 1.0", "fake_right 1.0"]
    with pytest.raises(KDHooksError, match=r"'fake' is declared twice, by .*; uninstall one") as e:
        load("fake")
    assert "fake_left 1.0 (fake_left:Method)" in str(e.value)
    assert "fake_right 1.0 (fake_right:Method)" in str(e.value)


def test_nobody_takes_the_name_of_a_built_in_method(path: Path) -> None:
    write_distribution(path, "fake_paper", {"fcd": "fake_paper:Method"}, SOURCE)
    with pytest.raises(KDHooksError, match=r"'fcd' is declared twice, by .*kdhooks_plugins\.fcd"):
        load("fcd")


def test_a_class_is_refused_as_a_method() -> None:
    with pytest.raises(KDHooksError, match=r"found the class FCD; write FCD\(…\)"):
        create(FCD)


@pytest.mark.parametrize("table", [{}, {"weight": 1.0}, {"name": 3}])
def test_a_table_needs_a_name(table: dict[str, object]) -> None:
    with pytest.raises(KDHooksError, match=r"the table of a method needs a 'name'; found \{"):
        create(table)


def test_an_object_is_a_method_already() -> None:
    class Local:
        @hookimpl
        def embedding_tap(self) -> EmbeddingTap | None:
            return None

    local = Local()
    assert create(local) is local


def test_a_table_is_left_as_it_was() -> None:
    table = {"name": "fcd", "weight": 2.0}
    create(table)
    assert table == {"name": "fcd", "weight": 2.0}


def test_a_signature_with_a_number_as_weight_takes_a_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = "class M:\n    def __init__(self, *, weight: float = 1.0):\n        self.weight = weight"
    write_distribution(tmp_path, "fake_weight", {"fake": "fake_weight:M"}, code)
    monkeypatch.syspath_prepend(tmp_path)
    made = create({"name": "fake", "weight": {"value": 2.0, "warmup": 4}})
    assert made.weight(2) == 1.0  # type: ignore[attr-defined]
    with pytest.raises(KDHooksError, match="fake: weight: value must be a number; found 'x'"):
        create({"name": "fake", "weight": {"value": "x"}})
