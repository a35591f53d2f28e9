"""Reads a recipe's TOML file, in which relative paths start at the file's folder."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdhooks.discovery import load
from kdhooks.errors import KDHooksError
from kdhooks.kinds import alternatives
from kdhooks.options import Options, declared_options
from kdhooks.tensor_files import user_path


def read_recipe_file(path: Path, recipe: type) -> Mapping[str, Any]:
    """Return the content of a file, with all paths resolved, also those in methods' options.

    recipe: the class whose options the file holds.
    """
    table = _paths_in_folder(recipe, _read_toml(path), path.parent, "recipe: ")
    methods = table.get("methods")
    if not isinstance(methods, list):
        return table
    return {**table, "methods": [_method_in_folder(method, path.parent) for method in methods]}


def _read_toml(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        there = "is a folder" if path.is_dir() else "is not a regular file"
        start = "" if path.is_absolute() else f" from '{Path.cwd()}'"
        what = there if path.exists() else f"does not exist{start}"
        raise KDHooksError(f"recipe must be a TOML file; '{path}' {what}")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise KDHooksError(f"recipe: '{path}' can't be read: {error.strerror}") from error
    try:
        return tomllib.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise KDHooksError(
            f"recipe: '{path}' must be UTF-8 text; found byte 0x{content[error.start]:02x} in "
            f"line {line}; save the file with UTF-8 encoding"
        ) from error
    except (ValueError, RecursionError) as error:  # TOMLDecodeError, or a number of 5000 digits
        raise KDHooksError(f"recipe: '{path}' is not TOML: {error}") from error


def _method_in_folder(method: object, folder: Path) -> object:
    name = method.get("name") if isinstance(method, Mapping) else None
    if not isinstance(method, Mapping) or not isinstance(name, str):
        return method
    return _paths_in_folder(load(name), method, folder, f"{name}: ")


def _paths_in_folder(
    made: type, table: Mapping[str, Any], folder: Path, start: str
) -> Mapping[str, Any]:
    """Resolve the relative paths of one table. start: what precedes option names in errors."""
    placed = dict(table)
    for name, declared in declared_options(made).items():
        value, kinds = table.get(name), alternatives(declared.kind)
        inner = next((k for k in kinds if isinstance(k, type) and issubclass(k, Options)), None)
        if isinstance(value, Mapping):
            if inner is not None:
                placed[name] = _paths_in_folder(inner, value, folder, f"{start}{name}.")
        elif isinstance(value, list) and inner is not None:  # a list of tables, such as [[teacher]]
            placed[name] = [
                _paths_in_folder(inner, one, folder, f"{start}{name}[{place}].")
                if isinstance(one, Mapping)
                else one
                for place, one in enumerate(value)
            ]
        elif isinstance(value, str) and value.strip() and Path in kinds and str not in kinds:
            placed[name] = str(folder / user_path(value, f"{start}{name}"))
    return placed
