"""The site of the documentation: `make docs` writes it to docs-out, and any warning is an error.

The pages are ordinary Markdown, to be read without the site too. The order of the pages is that of
`NAVIGATION`, so that no page holds directives; api.md is the one exception.
"""

import os
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path[:0] = [str(ROOT / part) for part in ("", "plugins", "integrations", "demo")]

import kdhooks  # noqa: E402  # the checkout's, whichever is installed

REPOSITORY = "https://github.com/kdhooks/kdhooks"

project = "kdhooks"
author = "kdhooks developers"
copyright = "the kdhooks authors"
release = version = kdhooks.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"kdhooks {version}"
html_copy_source = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
exclude_patterns = ["results/gpu/*.json"]
myst_heading_anchors = 4
suppress_warnings = ["myst.strikethrough"]

# Docstrings hold code in single backticks.
default_role = "code"
autodoc_inherit_docstrings = False
autoclass_content = "both"  # the constructor's docstring too
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True}
python_use_unqualified_type_names = True

NAVIGATION = {
    "Trainers": ["arcface_torch", "mmengine", "lightning", "fabric", "accelerate", "own_loop"],
    "A run": ["recipe", "teacher", "teachers-and-views", "methods/index", "performance", "checks"],
    "Afterwards": ["evaluate", "phones"],
    "Extending": ["writing-a-method", "api"],
    "Looking up": ["faq", "glossary", "coming-from", "pictures", "results/index"],
}
BELOW = {
    "methods/index": sorted(
        f"methods/{p.stem}" for p in DOCS.glob("methods/*.md") if p.stem != "index"
    ),
    "results/index": [
        f"results/{page}" for page in ("papers", "lfw", "orl", "performance", "scale", "gpu/gpu")
    ],
}
LINK = re.compile(r"(?<=\]\()(?P<path>[^)\s#:]+)?(?:#(?P<anchor>[^)\s]+))?(?=\))")

log = logging.getLogger(__name__)


def toctree(pages: list[str], caption: str = "") -> str:
    lines = ["```{toctree}", ":hidden:", *([f":caption: {caption}"] if caption else [])]
    return "\n".join(["", *lines, "", *(f"/{page}" for page in pages), "```", ""])


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """Links that leave docs/ lead into the repository; the navigation is added."""
    page = Path(app.env.doc2path(docname))
    source[0] = LINK.sub(lambda link: _outside(link, page), source[0])
    if docname == "index":
        source[0] += "".join(toctree(pages, caption) for caption, pages in NAVIGATION.items())
    elif docname in BELOW:
        source[0] += toctree(BELOW[docname])


def _outside(link: re.Match[str], page: Path) -> str:
    path, anchor = link["path"], link["anchor"]
    target = Path(os.path.normpath(page.parent / path)) if path else page
    if target.is_relative_to(DOCS):
        return link[0]  # Sphinx checks these
    if not target.exists():
        log.warning("%s does not exist", target, location=page.relative_to(DOCS).as_posix())
    elif anchor and anchor not in _anchors(target.read_text(encoding="utf-8")):
        log.warning(
            "%s has no section %s", target, anchor, location=page.relative_to(DOCS).as_posix()
        )
    kind = "tree" if target.is_dir() else "blob"
    ending = f"#{anchor}" if anchor else ""
    return f"{REPOSITORY}/{kind}/main/{target.relative_to(ROOT).as_posix()}{ending}"


def _anchors(text: str) -> set[str]:
    """Those that GitHub gives to the headings of a Markdown file."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PARAMETERS = re.compile(r"(?P<names>\w+(?:, \w+)*): (?P<text>.*)")
SPECIAL = re.compile(r"(`[^`]*`)|([*|\\]|_(?=\W|$))")


def docstring(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Plain text becomes reStructuredText: docstrings have code in backticks, examples that are
    indented, and parameters as "name: …", of which a list is made.
    """
    paragraphs = "\n".join(lines).strip("\n").split("\n\n")
    lines[:] = [*"\n\n".join(_paragraph(text) for text in paragraphs).split("\n"), ""]


def _paragraph(text: str) -> str:
    if text.startswith("    "):
        return f".. code-block:: python\n\n{text}"
    plain = SPECIAL.sub(lambda found: found[1] or f"\\{found[2]}", text)
    out: list[str] = []
    fields = False
    for line in plain.split("\n"):
        parameters = PARAMETERS.fullmatch(line)
        starts = not out or fields or out[-1].endswith((".", ":"))
        if parameters and starts:
            out += ["", f"* `{parameters['names']}`: {parameters['text']}"]
            fields = True
        elif fields and not line.startswith(" "):
            # A parameter's own text is indented, or goes on from line to line without a full stop.
            fields = not out[-1].endswith(".")
            out += [f"  {line}"] if fields else ["", line]
        else:
            out.append(f"  {line.strip()}" if fields else line)
    return "\n".join(out)


def setup(app: Sphinx) -> None:
    app.connect("source-read", read)
    app.connect("autodoc-process-docstring", docstring)
