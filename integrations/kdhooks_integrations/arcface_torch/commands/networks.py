"""Creates networks from the names that arcface_torch's get_model accepts, or from any factory."""

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from kdhooks.arguments import at_least
from kdhooks.errors import KDHooksError
from kdhooks.factories import as_network, factory_named, is_factory_name, made_by
from kdhooks_integrations.arcface_torch.commands.parsing import path

WIDTH = 512
"""The default width of the embedding."""

_NAMES = "r18, r34, r50, r100, r200, mbf, mbf_large, vit_t_dp005_mask0, vit_b"
_OPTIONS = {"num_features": "--embedding-size", "fp16": "--fp16"}


def add_trainer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trainer",
        type=path,
        default=Path(),
        metavar="FOLDER",
        help="folder of arcface_torch, with its backbones and configs (default: the working "
        "directory)",
    )


def add_network(
    parser: argparse.ArgumentParser, network: str, defaults: tuple[str, str], **more: Any
) -> None:
    """Add an option for a network, and --embedding-size.

    network: the name of the option. defaults: those of both options, for --help.
    """
    parser.add_argument(
        network,
        metavar="NETWORK",
        help="network: a name that the trainer's get_model accepts, such as r50, or "
        f"package.module:factory ({defaults[0]})",
        **more,
    )
    parser.add_argument(
        "--embedding-size",
        type=at_least(1),
        metavar="N",
        help=f"width of the network's embedding, in numbers (default: {defaults[1]})",
    )


def add_weights(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights",
        default="",
        metavar="PLACE",
        help="key of the weights in a checkpoint, if several sets fit (default: the only one that "
        "fits)",
    )


def enter_trainer(folder: str | Path) -> None:
    """Make the modules in the trainer's folder importable, as for a script in that folder."""
    folder = Path(folder)
    if not folder.is_dir():
        raise KDHooksError(f"--trainer must be a folder; found '{folder}'")
    sys.path.insert(0, str(folder.resolve()))


def get_model() -> Callable[..., nn.Module]:
    """Return the trainer's own get_model."""
    try:
        factory: Callable[..., nn.Module] = import_module("backbones").get_model
    except ModuleNotFoundError as error:
        raise KDHooksError(
            f"arcface_torch's package 'backbones' can't be imported ({error}); run in the "
            "trainer's folder, or specify --trainer FOLDER"
        ) from error
    except Exception as error:  # of any kind, since importing runs the package's code
        raise KDHooksError(
            "arcface_torch's package 'backbones' must define get_model; found "
            f"{type(error).__name__}: {error}; correct that file, or specify another --trainer"
        ) from error
    return factory


def make(network: str, width: int | None = None, fp16: bool | None = None) -> nn.Module:
    """Create a network with random weights.

    width: the width of its embedding; None: the network's default.
    """
    if is_factory_name(network):
        return _by_path(network, {"num_features": width, "fp16": fp16})
    factory = get_model()
    try:
        model = factory(network, dropout=0.0, fp16=bool(fp16), num_features=width or WIDTH)
    except ValueError as error:
        raise KDHooksError(
            f"network '{network}' is unknown to the trainer's get_model, which accepts names such "
            f"as {_NAMES}; name a network of your own as package.module:factory"
        ) from error
    except Exception as error:
        raise _not_created(network, error) from error
    return as_network(model, network, "network")


def _by_path(network: str, given: Mapping[str, object]) -> nn.Module:
    factory = factory_named(network, "network")
    known = inspect.signature(factory).parameters
    options = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if key not in known:
            raise KDHooksError(
                f"network '{network}' takes no {key}, so {_OPTIONS[key]} can't be set; leave it out"
            )
    return made_by(factory, network, "network", **options)


def _not_created(network: str, error: Exception) -> KDHooksError:
    way_out = "name another network"
    if isinstance(error, ModuleNotFoundError):
        way_out = f"install the package {error.name}"
    return KDHooksError(
        f"network '{network}' can't be created: {type(error).__name__}: {error}; {way_out}"
    )
