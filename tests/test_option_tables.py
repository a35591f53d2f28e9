"""The tables of options in docs/ are up to date with the declarations."""

import re
import tomllib
from pathlib import Path
from typing import Any, Literal

import pytest

from kdhooks import Options, Scheduled, option
from kdhooks.discovery import create
from kdhooks.options import declared_options
from tests.option_tables import FOOTNOTE, INDEX, NEEDS, TABLE, needs_table, pages, table, tables


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_a_page_holds_the_tables_of_its_options(page: Path) -> None:
    found = [match.group() for match in TABLE.finditer(page.read_text("utf-8"))]
    assert found == tables(page), "run python -m tests.option_tables"


def test_the_index_lists_the_needs_of_each_method() -> None:
    found = NEEDS.search(INDEX.read_text("utf-8"))
    assert found is not None
    assert found.group() == needs_table(), "run python -m tests.option_tables"


class Inner(Options):
    size: int = option(4, "The size.", least=1, unit="pixels")


class Outer(Options):
    factor: Scheduled = option(0.5, "The factor.", above=0, most=2)
    kind: Literal["a", "b"] = option("a", "a: |x|; b: x².")
    names: tuple[str, ...] = option(("*",), "The names.")
    inner: Inner = option(Inner(), "The rest.")
    bias: bool | None = option(None, "By default true.")


def test_a_table_has_groups_bounds_choices_and_marks() -> None:
    assert table(Outer) == (
        "| option | default | range | meaning |\n"
        "|---|---|---|---|\n"
        "| `factor` † | 0.5 | a number, above 0 and at most 2 | The factor. |\n"
        '| `kind` | `"a"` | `"a"`, `"b"` | `a`: \\|x\\|; `b`: x². |\n'
        '| `names` | `["*"]` | a list of strings | The names. |\n'
        "| `inner.size` | 4 | a whole number, at least 1 pixels | The size. |\n"
        "| `bias` |  | true or false | By default true. |\n"
        f"\n{FOOTNOTE}"
    )


def test_a_table_of_constants_has_no_footnote() -> None:
    assert FOOTNOTE not in table(Inner)
    assert TABLE.fullmatch(table(Inner))


METHODS = [page for page in pages() if page.parent.name == "methods"]


def examples(page: Path) -> list[dict[str, Any]]:
    """Return the methods in a page's TOML blocks, and each `option = value` in its text."""
    text = page.read_text("utf-8")
    blocks = re.findall(r"^```toml[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    tables = [method for block in blocks for method in tomllib.loads(block).get("methods", [])]
    names = "|".join(declared_options(*pages()[page]))
    spans = re.findall(rf"`((?:{names})(?:\.\w+)* = [^`]+)`", text)
    return tables + [{"name": page.stem, **tomllib.loads(span)} for span in spans]


@pytest.mark.parametrize("page", METHODS, ids=lambda page: page.stem)
def test_the_examples_of_a_page_are_accepted(page: Path) -> None:
    for example in examples(page):
        create(example)


def test_there_are_examples() -> None:
    assert sum(len(examples(page)) for page in METHODS) > 10
