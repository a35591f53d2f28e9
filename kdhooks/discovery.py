"""Finds the installed methods: entry points of the group `kdhooks`, imported only when used."""

import ast
import inspect
import reprlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.options import Options, read
from kdhooks.schedules import Schedule

GROUP = "kdhooks"


@dataclass(frozen=True)
class MethodInfo:
    """An installed method, as `kdhooks methods` lists it. Its module need not be imported."""

    name: str
    paper: str  # the first line of its module's docstring
    package: str  # "distribution version"


def methods() -> list[MethodInfo]:
    """List the installed methods, sorted by name, without importing them."""
    return sorted(
        (MethodInfo(e.name, _paper(e), _package(e)) for e in entry_points(group=GROUP)),
        key=lambda info: (info.name, info.package),
    )


def load(name: str) -> type:
    """Import the class of an installed method."""
    found = [e for e in entry_points(group=GROUP) if e.name == name]
    if not found:
        installed = sorted({e.name for e in entry_points(group=GROUP)})
        raise KDHooksError(
            f"no method '{name}' is installed; {near_miss(name, installed)}"
            f"installed: {listed(installed)}"
        )
    if len({(e.value, _package(e)) for e in found}) > 1:
        owners = " and ".join(f"{_package(e)} ({e.value})" for e in found)
        raise KDHooksError(f"method '{name}' is declared twice, by {owners}; uninstall one")
    try:
        method = found[0].load()
    except Exception as error:
        raise KDHooksError(
            f"method '{name}' of {_package(found[0])} can't be imported from "
            f"'{found[0].value}': {type(error).__name__}: {error}"
        ) from error
    if not inspect.isclass(method):
        raise KDHooksError(
            f"method '{name}': its entry point must name a class; '{found[0].value}' is "
            f"{type(method).__name__}"
        )
    return method


def create(method: object) -> object:
    """Create a method from its name or a table {"name": …, options}; return an object as it is."""
    if isinstance(method, str):
        return create({"name": method})
    if inspect.isclass(method):
        raise KDHooksError(
            f"a method must be an object; found the class {method.__name__}; write "
            f"{method.__name__}(…)"
        )
    if not isinstance(method, Mapping):
        if method is None or isinstance(method, bool | int | float | Sequence):
            raise KDHooksError(
                "a method must be a name, a table with a 'name', or an object with hooks; found "
                f"{reprlib.repr(method)}"
            )
        return method
    options = dict(method)
    name = options.pop("name", None)
    if not isinstance(name, str):
        way_out = "; write name instead of type" if name is None and "type" in method else ""
        raise KDHooksError(f"the table of a method needs a 'name'; found {dict(method)}{way_out}")
    made = load(name)
    if isinstance(options.get("weight"), Mapping) and not issubclass(made, Options):
        options["weight"] = Schedule.read(options["weight"], f"{name}: weight")
    return read(made, options, name)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "unknown"


def _paper(entry: EntryPoint) -> str:
    """Read the first line of the module's docstring from its source file."""
    source = _source(entry.module)
    if source is None:
        return ""
    try:
        doc = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8")))
    except (SyntaxError, OSError):
        return ""
    return (doc or "").split("\n", 1)[0]


def _source(module: str) -> Path | None:
    """Find a module's source file. Unlike importlib.util.find_spec, import no parent package."""
    locations = None
    spec = None
    for end in range(1, module.count(".") + 2):
        name = ".".join(module.split(".")[:end])
        spec = next(
            (s for f in sys.meta_path if (s := f.find_spec(name, locations)) is not None), None
        )
        if spec is None:
            return None
        locations = spec.submodule_search_locations
    return Path(spec.origin) if spec is not None and spec.origin else None
