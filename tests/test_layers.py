"""Imports go only to lower floors of the table in CONTRIBUTING.md, and only the modules that own an
optional package import it.
"""

import ast
import fnmatch
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import kdhooks
import kdhooks_demo
import kdhooks_integrations
import kdhooks_plugins

ROOT = Path(__file__).parents[1]

EVERYWHERE = {"torch", "pluggy", "numpy", "einops", "kdhooks"}
OWNERS = {  # an optional package -> patterns of the modules that may import it, split by spaces
    "onnx": "kdhooks.onnx.*",
    "onnxruntime": "kdhooks.onnx.*",
    "PIL": "kdhooks.pictures",
    "matplotlib": "kdhooks_demo.* kdhooks_integrations.arcface_torch.commands.results",
    "tqdm": "kdhooks_demo.*",
    "backbones": "kdhooks_integrations.arcface_torch.networks",
    "mmengine": "kdhooks.registry kdhooks_integrations.mmengine.*",
    "lightning": "kdhooks_integrations.lightning.*",
    "pytorch_lightning": "kdhooks_integrations.lightning.*",
}
CLASSES = ("chunked_sums", "cosines", "per_class", "ranks", "relations", "rows", "shards", "splits")
FILES = ("arguments", "progress", "tensor_files")
FOR_PLUGINS = {
    "declarations",
    "stages",
    "hookspecs",
    "errors",
    "kinds",
    "options",
    "schedules",
    *FILES,
    *(f"classes.{name}" for name in CLASSES),
}
NAMESPACES = {  # packages whose __init__.py holds only a docstring or re-exports
    "kdhooks", "kdhooks.classes", "kdhooks.evaluation", "kdhooks.onnx", "kdhooks.teacher",
    "kdhooks.views", "kdhooks_plugins",
    "kdhooks_integrations",
}  # fmt: skip
OPTIONAL = (
    "onnx", "onnxruntime", "mmengine", "lightning", "pytorch_lightning", "insightface",
    "matplotlib", "PIL",
)  # fmt: skip


# --- the graph of imports --------------------------------------------------------------------


def sources() -> dict[str, Path]:
    """Return the file of each module of the four packages."""
    found = {}
    for package in (kdhooks, kdhooks_plugins, kdhooks_integrations, kdhooks_demo):
        folder = Path(package.__path__[0])
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            name = ".".join([package.__name__, *(part for part in parts if part != "__init__")])
            found[name] = path
    return found


def imported(source: str, modules: Mapping[str, object]) -> Iterator[str]:
    """Yield the modules that a source imports, inside of functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module is not None
            assert not node.level, "absolute imports only"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else origin(node.module, alias.name)


def origin(module: str, name: str) -> str:
    """Return the module that defines a name, because kdhooks/__init__.py only re-exports."""
    if module != "kdhooks":
        return module
    return public().get(name, "kdhooks")


def public() -> dict[str, str]:
    """Return the module that each public name comes from."""
    tree = ast.parse(sources()["kdhooks"].read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def graph() -> dict[str, set[str]]:
    files = sources()
    return {
        name: set(imported(path.read_text(encoding="utf-8"), files)) - {name}
        for name, path in files.items()
    }


def floors(text: str) -> list[tuple[str, int]]:
    """Return the patterns of module names with their floor, from the table in CONTRIBUTING.md."""
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", text, re.MULTILINE)
    return [(name, int(floor)) for floor, cell in rows for name in re.findall(r"`([^`]+)`", cell)]


def floor_of(module: str, table: list[tuple[str, int]]) -> int | None:
    """Return the floor of a module; the table omits the prefix `kdhooks.` of core modules."""
    short = module.removeprefix("kdhooks.")
    found = [floor for pattern, floor in table if fnmatch.fnmatchcase(short, pattern)]
    return found[0] if len(found) == 1 else None


def packages_of(table: list[tuple[str, int]]) -> list[str]:
    """Return the patterns of whole packages, whose modules may import one another."""
    return [pattern for pattern, _ in table if pattern.startswith("kdhooks_")]


def upward(imports: Mapping[str, set[str]], table: list[tuple[str, int]]) -> list[str]:
    """Return the imports of modules that are not on a lower floor."""
    found = []
    for importer, targets in imports.items():
        for target in sorted(targets & imports.keys() - NAMESPACES):
            here, there = floor_of(importer, table), floor_of(target, table)
            together = any(
                fnmatch.fnmatchcase(importer, package) and fnmatch.fnmatchcase(target, package)
                for package in packages_of(table)
            )
            if here is not None and there is not None and there >= here and not together:
                found.append(f"{importer} (floor {here}) imports {target} (floor {there})")
    return found


def too_high(imports: Mapping[str, set[str]], table: list[tuple[str, int]]) -> list[str]:
    """Return the core modules that could be on a lower floor."""
    found = []
    for module, targets in imports.items():
        inner = targets & imports.keys() - NAMESPACES
        below = [floor_of(target, table) or 0 for target in inner]
        here = floor_of(module, table)
        core = module.startswith("kdhooks.") and module not in NAMESPACES
        if core and here is not None and here > max(below, default=0) + 1:
            found.append(f"{module} (floor {here}) needs floor {max(below, default=0) + 1}")
    return found


def cycles(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the modules that import themselves, directly or through others."""
    found = []
    for start in imports:
        seen: set[str] = set()
        rest = list(imports[start] & imports.keys())
        while rest:
            module = rest.pop()
            if module not in seen:
                seen.add(module)
                rest.extend(imports[module] & imports.keys())
        if start in seen:
            found.append(start)
    return found


def astray(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the imports of optional or unknown packages outside of the modules that own them."""
    found = []
    for importer, targets in imports.items():
        for target in sorted(targets):
            top = target.split(".")[0]
            if top in sys.stdlib_module_names | EVERYWHERE or target in imports:
                continue
            owners = OWNERS.get(top, "").split()
            if not any(fnmatch.fnmatchcase(importer, owner) for owner in owners):
                found.append(f"{importer} imports {target}")
    return found


def beyond_plugins(imports: Mapping[str, set[str]]) -> list[str]:
    """Return the imports of kdhooks in method modules that go beyond the contract."""
    allowed = {f"kdhooks.{name}" for name in FOR_PLUGINS}
    return [
        f"{importer} imports {target}"
        for importer, targets in imports.items()
        for target in sorted(targets - allowed)
        if importer.startswith("kdhooks_plugins")
        and target.startswith("kdhooks")
        and not target.startswith("kdhooks_plugins")
    ]


# --- the rules -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table() -> list[tuple[str, int]]:
    return floors((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))


def test_every_module_has_one_floor(table: list[tuple[str, int]]) -> None:
    homeless = {name for name in sources() if floor_of(name, table) is None}
    assert homeless <= NAMESPACES, "give it a floor in CONTRIBUTING.md"


def test_every_floor_names_modules_that_exist(table: list[tuple[str, int]]) -> None:
    names = [name.removeprefix("kdhooks.") for name in sources()]
    assert [pattern for pattern, _ in table if not fnmatch.filter(names, pattern)] == []


def test_imports_run_downwards(table: list[tuple[str, int]]) -> None:
    assert upward(graph(), table) == []


def test_no_module_is_higher_than_necessary(table: list[tuple[str, int]]) -> None:
    assert too_high(graph(), table) == []


def test_no_imports_run_in_circles() -> None:
    imports = {name: targets for name, targets in graph().items() if name != "kdhooks"}
    assert cycles(imports) == []


def test_optional_packages_stay_with_their_owners() -> None:
    assert astray(graph()) == []


def test_methods_need_nothing_but_the_contract() -> None:
    assert beyond_plugins(graph()) == []


def test_the_public_names_are_all_re_exports() -> None:
    assert set(kdhooks.__all__) == set(public())
    tree = ast.parse(sources()["kdhooks"].read_text(encoding="utf-8"))
    kinds = [type(node) for node in tree.body]
    assert set(kinds) == {ast.Expr, ast.ImportFrom, ast.Assign}


def after(statement: str) -> set[str]:
    """Return the optional packages that a new interpreter has imported after a statement."""
    code = f"{statement}\nimport sys\nprint(*[m for m in {OPTIONAL} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_kdhooks_imports_nothing_optional() -> None:
    assert after("import kdhooks, kdhooks.cli, kdhooks_integrations.arcface_torch") == set()


# --- each of these checks can fail -----------------------------------------------------------

TABLE = [("low", 1), ("high", 2), ("kdhooks_plugins.*", 1)]


def test_optional_imports_are_noticed() -> None:
    pytest.importorskip("onnx")
    assert after("import kdhooks, onnx") == {"onnx"}


def test_an_upward_import_is_noticed() -> None:
    imports = {"kdhooks.low": {"kdhooks.high"}, "kdhooks.high": set[str]()}
    assert upward(imports, TABLE) == ["kdhooks.low (floor 1) imports kdhooks.high (floor 2)"]
    assert upward({"kdhooks.low": set(), "kdhooks.high": {"kdhooks.low"}}, TABLE) == []


def test_an_import_on_the_same_floor_is_noticed_except_within_a_package() -> None:
    table = [("one", 1), ("two", 1), ("kdhooks_plugins.*", 1)]
    imports = {"kdhooks.one": {"kdhooks.two"}, "kdhooks.two": set[str]()}
    assert upward(imports, table) == ["kdhooks.one (floor 1) imports kdhooks.two (floor 1)"]
    methods = {"kdhooks_plugins.a": {"kdhooks_plugins.b"}, "kdhooks_plugins.b": set[str]()}
    assert upward(methods, table) == []


def test_a_floor_that_is_too_high_is_noticed() -> None:
    assert too_high({"kdhooks.high": set()}, TABLE) == ["kdhooks.high (floor 2) needs floor 1"]
    assert too_high({"kdhooks.low": set(), "kdhooks.high": {"kdhooks.low"}}, TABLE) == []


def test_a_circle_is_noticed() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", ["onnxruntime", "mmengine", "requests", "backbones"])
def test_a_stray_package_is_noticed(package: str) -> None:
    assert astray({"kdhooks.low": {package}}) == [f"kdhooks.low imports {package}"]
    assert astray({"kdhooks.onnx.files": {"onnx"}, "kdhooks_demo.run": {"tqdm"}}) == []


def test_a_method_that_reaches_too_far_is_noticed() -> None:
    imports = {"kdhooks_plugins.a": {"kdhooks.taps", "kdhooks.classes.shards", "kdhooks_plugins.b"}}
    assert beyond_plugins(imports) == ["kdhooks_plugins.a imports kdhooks.taps"]


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("from kdhooks import EmbeddingTap", "kdhooks.declarations"),
        ("from kdhooks import Distiller", "kdhooks.distiller"),
        ("from kdhooks import taps", "kdhooks.taps"),
        ("def f():\n    import kdhooks.recipe", "kdhooks.recipe"),
    ],
)
def test_an_import_counts_as_one_of_the_module_behind_it(source: str, target: str) -> None:
    assert list(imported(source, sources())) == [target]
