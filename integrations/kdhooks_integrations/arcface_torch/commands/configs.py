"""Reads a config file of arcface_torch as its trainer does, without installing kdhooks."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kdhooks.errors import KDHooksError, near_miss
from kdhooks_integrations import arcface_torch
from kdhooks_integrations.arcface_torch import installation


def read_config(config: str, trainer: Path) -> tuple[dict[str, Any], list[str]]:
    """Return all values of a config, and the recipes that it would install.

    config: in the form that train_v2.py accepts, configs/NAME or configs/NAME.py, in the folder
        `trainer`, whose modules must be importable.
    """
    name = _name(config, trainer)
    with _not_installing() as recipes:
        try:
            found = _merged(name)
            values = dict(found) if isinstance(found, Mapping) else dict(vars(found))
        except (Exception, SystemExit) as error:  # of any kind, since the file contains code
            raise KDHooksError(
                f"--config: '{config}' must be a config that train_v2.py can read; found "
                f"{type(error).__name__}: {error}; {_way_out(error)}"
            ) from error
    return values, recipes


def _name(config: str, trainer: Path) -> str:
    """Return the config's name in the folder `configs`; the trainer reads no other folder."""
    folder = (trainer / "configs").resolve()
    given = Path(config)
    if folder not in ((trainer / given).parent.resolve(), given.parent.resolve()):
        raise KDHooksError(
            f"--config must be a file in the trainer's folder configs, the only one that "
            f"train_v2.py reads; found '{config}', which is not in '{folder}'; move it there, or "
            "specify --trainer FOLDER"
        )
    name = os.path.splitext(given.name)[0]  # as the trainer splits it
    if not (folder / f"{name}.py").is_file():
        others = [path.stem for path in sorted(folder.glob("*.py"))]
        raise KDHooksError(
            f"--config: there is no file '{folder / name}.py'; {near_miss(name, others)}name one "
            f"of the {len(others)} files in that folder"
        )
    return name


def _merged(name: str) -> Any:
    """Return the result of the trainer's get_config; if it has none, merge the same values here."""
    try:
        get_config: Callable[[str], Any] = import_module("utils.utils_config").get_config
    except ModuleNotFoundError as error:
        if error.name not in ("utils", "utils.utils_config"):
            raise
    else:
        return get_config(f"configs/{name}.py")
    try:
        base = dict(import_module("configs.base").config)
    except ModuleNotFoundError as error:
        if error.name != "configs.base":
            raise
        base = {}
    return {**base, **import_module(f"configs.{name}").config}


@contextmanager
def _not_installing() -> Iterator[list[str]]:
    """Replace `install`, which a config may call, by a function that only records the recipe."""
    recipes: list[str] = []

    def install(recipe: object, namespace: object = None) -> SimpleNamespace:
        recipes.append(str(recipe) if isinstance(recipe, str | Path) else "written in Python")
        return SimpleNamespace(attachment=None, remove=lambda: None)

    places: tuple[Any, ...] = (arcface_torch, installation)
    original = installation.install
    for place in places:
        place.install = install
    try:
        yield recipes
    finally:
        for place in places:
            place.install = original


def _way_out(error: BaseException) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"install the package {error.name}"
    return "correct the file, or specify --network instead of --config"
