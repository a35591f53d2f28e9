"""Values of the commands' options, checked while the command line is read."""

from argparse import ArgumentTypeError
from collections.abc import Callable

import torch

from kdhooks.errors import KDHooksError


def usable_device(name: str) -> torch.device:
    """The device of that name, refused at once if torch can't put a tensor on it."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise KDHooksError(
            f"--device must be one that this machine has, like cpu, cuda or cuda:0; found '{name}' "
            f"({reason}); take --device cpu"
        ) from error
    if device.type == "meta":
        raise KDHooksError("--device must hold numbers; found 'meta'; take --device cpu")
    return device


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number of at least that."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise ArgumentTypeError(f"must be a whole number, at least {least}; found {text}")
        return value

    return number
