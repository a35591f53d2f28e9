"""Creates networks by the name of a factory function: `package.module:factory`."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from torch import nn

from kdhooks.errors import KDHooksError, near_miss


def factory_named(name: str, subject: str) -> Callable[..., object]:
    """Import the function or class at `package.module:factory`."""
    module_name, _, path = name.partition(":")
    where = f"{subject} '{name}'"
    if not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise KDHooksError(f"{where} must be written as package.module:factory")
    try:
        found: Any = import_module(module_name)
    except ModuleNotFoundError as error:
        raise KDHooksError(
            f"{where} can't be imported: {error}; start in the folder that contains it, or add "
            "that folder to PYTHONPATH"
        ) from error
    except Exception as error:
        raise KDHooksError(
            f"{where} can't be imported: '{module_name}' raises {type(error).__name__}: {error}"
        ) from error
    for part in path.split("."):
        if not hasattr(found, part):
            known = [key for key in vars(found) if not key.startswith("_")]
            file = getattr(sys.modules[module_name], "__file__", None)
            raise KDHooksError(
                f"{where} can't be imported: there is no '{part}' in {file or module_name}; "
                f"{near_miss(part, known)}name a function or a class in it"
            )
        found = getattr(found, part)
    if isinstance(found, nn.Module) or not callable(found):
        raise KDHooksError(
            f"{where} must be a function or a class that creates the network; found an object of "
            f"class {type(found).__name__}"
        )
    factory: Callable[..., object] = found
    return factory


def made_by(
    factory: Callable[..., object], name: str, subject: str, **options: object
) -> nn.Module:
    """Call a factory, which returns a network with random weights."""
    try:
        network = factory(**options)
    except KDHooksError:
        raise
    except TypeError as error:
        raise KDHooksError(
            f"{subject} '{name}' must be callable without further arguments: {error}; name a "
            "function that needs none"
        ) from error
    except Exception as error:
        raise KDHooksError(
            f"{subject} '{name}' must return a network; it raises {type(error).__name__}: {error}"
        ) from error
    return as_network(network, name, subject)


def as_network(made: object, name: str, subject: str) -> nn.Module:
    """Return the result of a factory if it is a module; otherwise refuse it."""
    if not isinstance(made, nn.Module):
        raise KDHooksError(
            f"{subject} '{name}' must return an nn.Module; found {type(made).__name__}"
        )
    return made


def is_factory_name(network: object) -> bool:
    return isinstance(network, str) and ":" in network
