"""Writes the tables of options in docs from the declarations.

`python -m tests.option_tables` rewrites them. In a new page, write `| option |` and `|---|` first.
"""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType
from typing import Literal, get_args, get_origin

from torch import Tensor

from kdhooks import Schedule, methods
from kdhooks.described import needs_of
from kdhooks.discovery import create, load
from kdhooks.kinds import Option, alternatives, described
from kdhooks.options import REQUIRED, opened
from kdhooks.recipe import Recipe
from kdhooks.teacher.cache import CacheOptions
from kdhooks.teacher.table import TeacherTable
from kdhooks.views.student_view import KINDS, ViewTable

ROOT = Path(__file__).parents[1]
INDEX = ROOT / "docs/methods/index.md"
RECIPE_PAGE = ROOT / "docs/recipe.md"
NEEDS = re.compile(r"^\| method \|.*\n(\|.*\n)+", re.MULTILINE)
TABLE = re.compile(r"^\| option \|.*\n(\|.*\n)+(\n† .*\n)?", re.MULTILINE)
MARK = "†"
RECIPE = "../recipe.md"  # from a method's page
FOOTNOTE = (
    f"{MARK} A number, or a [schedule]({RECIPE}#schedules) such as "
    "`{ value = 1.0, warmup = 1000 }`.\n"
)


def table(made: type, recipe: str = RECIPE) -> str:
    """Return Markdown with a row for each option; options of a group have dotted names such as
    `urfm.centres`.

    recipe: the path from the page to recipe.md; empty on that page itself.
    """
    every = opened(made).items()
    rows = [
        (
            f"`{name}`{f' {MARK}' if Schedule in alternatives(option.kind) else ''}",
            _default(option.default),
            _range(option),
            _meaning(option),
        )
        for name, option in every
    ]
    head = ("option", "default", "range", "meaning")
    lines = [_row(head), "|---" * len(head) + "|", *(_row(row) for row in rows)]
    marked = any(Schedule in alternatives(option.kind) for _, option in every)
    return "\n".join(lines) + "\n" + (f"\n{FOOTNOTE.replace(RECIPE, recipe)}" if marked else "")


def _row(cells: Sequence[str]) -> str:
    escaped = (cell.replace("|", r"\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def _default(value: object) -> str:
    """Return the default as TOML writes it."""
    if value is REQUIRED:
        return "required"
    if value is None or isinstance(value, Tensor):
        return ""
    written = json.dumps(value)
    return f"`{written}`" if '"' in written else written


def _meaning(option: Option) -> str:
    """Return the meaning, with the choices that it explains as code: "`mse`: …; `kl`: …"."""
    text = option.meaning
    for kind in alternatives(option.kind):
        for choice in get_args(kind) if get_origin(kind) is Literal else ():
            text = re.sub(rf"(?<![\w`]){choice}(?=[,:])", f"`{choice}`", text)
    return text


def _range(option: Option) -> str:
    """Return the range in words, such as "a number, at least 0"."""
    kinds = [kind for kind in alternatives(option.kind) if kind is not NoneType]
    if Schedule in kinds:
        kinds = [float]
    words = [
        ", ".join(f'`"{choice}"`' for choice in get_args(kind))
        if get_origin(kind) is Literal
        else described(kind)
        for kind in kinds
    ]
    bounds = str(option.bounds)
    unit = f" {option.unit}" if option.unit and bounds else ""
    return " or ".join(words) + (f", {bounds}{unit}" if bounds else "")


def pages() -> dict[Path, Sequence[type]]:
    """Return the pages with tables and, in order, the classes whose options each page lists."""
    own = {info.name: load(info.name) for info in methods() if info.package.startswith("kdhooks ")}
    return {
        RECIPE_PAGE: [Recipe, Schedule, TeacherTable, CacheOptions, ViewTable, *KINDS.values()],
        **{ROOT / "docs/methods" / f"{name}.md": [made] for name, made in own.items()},
    }


def tables(page: Path) -> list[str]:
    """Return the tables of a page, in order."""
    recipe = "" if page == RECIPE_PAGE else RECIPE
    return [table(made, recipe) for made in pages()[page]]


def needs_table() -> str:
    """Return Markdown with a row for each of kdhooks' own methods and its requirements."""
    head = (
        "method",
        "paper",
        "labels",
        "class rows",
        "own classifier",
        "feature maps",
        "torch teacher",
    )
    lines = [_row(head), "|---|---" + "|:-:" * (len(head) - 2) + "|"]
    for info in methods():
        if info.package.startswith("kdhooks "):
            needs = vars(needs_of(create(info.name))).values()
            marks = ("x" if needed else "" for needed in needs)
            lines.append(_row((f"[`{info.name}`]({info.name}.md)", info.paper, *marks)))
    return "\n".join(lines) + "\n"


def main() -> None:
    INDEX.write_text(NEEDS.sub(lambda _: needs_table(), INDEX.read_text("utf-8")), "utf-8")
    for page in pages():
        page.write_text(_rewritten(page.read_text("utf-8"), iter(tables(page))), "utf-8")


def _rewritten(text: str, tables: Iterator[str]) -> str:
    return TABLE.sub(lambda _: next(tables), text)


if __name__ == "__main__":
    main()
