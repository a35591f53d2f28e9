"""Networks by the names that arcface_torch's get_model takes, or by a factory anywhere."""

import argparse
import inspect
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from kdhooks.arguments import at_least
from kdhooks.errors import KDHooksError
from kdhooks.factories import factory_named, is_factory_name, made_by

_NAMES = "r18, r34, r50, r100, r200, mbf, mbf_large, vit_t_dp005_mask0, vit_b"


def add_options(parser: argparse.ArgumentParser, network: str) -> None:
    """--trainer, --embedding-size, and the network itself under the name given."""
    needed: dict[str, Any] = {"required": True} if network.startswith("-") else {}
    parser.add_argument(
        network, help="name that get_model takes, like r50, or package.module:factory", **needed
    )
    parser.add_argument("--trainer", default=".", help="folder of arcface_torch; by default here")
    parser.add_argument(
        "--embedding-size", type=at_least(1), help="width; by default the network's own"
    )


def enter_trainer(folder: str) -> None:
    """Its modules can be imported from now on, as a script in it imports them."""
    path = Path(folder).expanduser()
    if not path.is_dir():
        raise KDHooksError(f"--trainer must be a folder; found '{folder}'")
    sys.path.insert(0, str(path.resolve()))


def get_model() -> Callable[..., nn.Module]:
    """The trainer's own."""
    try:
        module = import_module("backbones")
    except ModuleNotFoundError as error:
        raise KDHooksError(
            f"arcface_torch's package 'backbones' can't be imported ({error}); run in the "
            "trainer's folder, or give --trainer FOLDER"
        ) from error
    factory: Callable[..., nn.Module] = module.get_model
    return factory


def make(network: str, width: int | None = None, fp16: bool = False) -> nn.Module:
    """A network with random weights; width is that of its embedding."""
    if is_factory_name(network):
        return _by_path(network, width)
    try:
        return get_model()(network, dropout=0.0, fp16=fp16, num_features=width or 512)
    except ValueError as error:
        raise KDHooksError(
            f"network '{network}' is unknown to the trainer's get_model, which takes names like "
            f"{_NAMES}; a network of your own is package.module:factory"
        ) from error


def _by_path(network: str, width: int | None) -> nn.Module:
    factory = factory_named(network, "network")
    options: dict[str, int] = {}
    if width is not None:
        if "num_features" not in inspect.signature(factory).parameters:
            raise KDHooksError(
                f"network '{network}' takes no num_features, so that --embedding-size can't be "
                "set; leave it out"
            )
        options["num_features"] = width
    return made_by(factory, network, "network", **options)
