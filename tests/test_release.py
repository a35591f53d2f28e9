"""A release has one version, and its files agree on the versions of tools and dependencies."""

import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import pytest

import kdhooks

ROOT = Path(__file__).parents[1]


def read(name: str) -> str:
    """Return a file of the repository; the copy that tests the wheel has only some of them."""
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not here")
    return path.read_text(encoding="utf-8")


def test_the_installed_package_has_the_version_of_the_module() -> None:
    assert metadata("kdhooks")["Version"] == kdhooks.__version__


def test_every_link_works_where_a_package_index_shows_the_readme() -> None:
    """Links are absolute there, and lead to files of the repository, or to sites of others."""
    text = metadata("kdhooks").json["description"]
    links = re.findall(r"\]\(([^)]+)\)", str(text))
    ours = re.compile(
        r"https://(?:github|raw\.githubusercontent)\.com/kdhooks/kdhooks/(?:blob/)?main/"
    )
    paths = [ours.sub("", link) for link in links if ours.match(link)]
    headings = re.findall(r"^#+ (.+)$", str(text), re.MULTILINE)
    anchors = {f"#{heading.lower().replace(' ', '-')}" for heading in headings}
    assert [link for link in links if not link.startswith("https://") and link not in anchors] == []
    assert "docs/step.svg" in paths
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path.partition("#")[0]).exists()] == []


def test_changelog_and_citation_have_the_version_of_the_module() -> None:
    first = re.search(r"^## \[([^]]+)\]", read("CHANGELOG.md"), re.MULTILINE)
    cited = re.search(r"^version: (.+)$", read("CITATION.cff"), re.MULTILINE)
    assert first is not None
    assert cited is not None
    assert {first[1], cited[1]} == {kdhooks.__version__}


def test_pre_commit_runs_the_ruff_of_the_constraints() -> None:
    pinned = re.search(r"^ruff==(.+)$", read("constraints.txt"), re.MULTILINE)
    hook = re.search(
        r"ruff-pre-commit\n +rev: v(.+)$", read(".pre-commit-config.yaml"), re.MULTILINE
    )
    assert pinned is not None
    assert hook is not None
    assert hook[1] == pinned[1]


def test_ci_runs_each_promised_python() -> None:
    classifiers = tomllib.loads(read("pyproject.toml"))["project"]["classifiers"]
    promised = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    tried = re.findall(r'\{ python: "([\d.]+)"', read(".github/workflows/ci.yml"))
    assert set(promised) == set(tried)


def test_ci_runs_the_oldest_allowed_versions() -> None:
    allowed = dict(
        re.findall(
            r'^    "(torch|pluggy|numpy|einops)>=([\d.]+)",$', read("pyproject.toml"), re.MULTILINE
        )
    )
    workflow = read(".github/workflows/ci.yml")
    assert len(allowed) == 4
    for name, version in allowed.items():
        assert re.search(rf'{name}: "{re.escape(version)}', workflow), name
