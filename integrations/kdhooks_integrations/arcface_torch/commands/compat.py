"""Repairs incompatibilities of arcface_torch, last changed in 2023, with current packages.

Each repair is a function of the script's source. It makes a change only if that is needed, and then
returns a sentence that describes it.
"""

import inspect
import logging
import re
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import torch

from kdhooks_integrations.arcface_torch.commands.recordio import stand_in_for_mxnet

log = logging.getLogger("kdhooks")

_ALIASES: dict[str, type] = {"float": float, "int": int, "bool": bool, "object": object}


def repair(source: str) -> list[str]:
    """Apply all repairs for the rest of the process, log each, and return their descriptions."""
    said = [sentence for step in REPAIRS if (sentence := step(source))]
    for sentence in said:
        log.warning("compat: %s", sentence)
    return said


def scheduler_verbose(source: str) -> str | None:
    """`PolynomialLRWarmup` passes verbose= to its base class, which no longer accepts it."""
    base = torch.optim.lr_scheduler.LRScheduler
    plain = base.__init__
    if "verbose" in inspect.signature(plain).parameters:
        return None

    def with_verbose(self: Any, *args: Any, verbose: object = None, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)

    base.__init__ = with_verbose  # type: ignore[method-assign]
    return "torch's LR schedules accept the argument verbose again, and ignore it"


def repeated_abscissae(source: str) -> str | None:
    """Verification interpolates FAR curves, which have steps; scipy's spline refuses these.

    Between two different abscissae, 'linear' and 'slinear' give the same line.
    """
    try:
        interpolate = import_module("scipy.interpolate")
    except ImportError:
        return None  # the trainer itself reports that scipy is missing
    plain: Any = interpolate.interp1d
    try:
        plain([0.0, 0.0, 1.0], [0.0, 1.0, 2.0], kind="slinear")
    except ValueError:
        pass
    else:
        return None

    class interp1d(plain):  # type: ignore[misc]  # the base class is known only at run time
        def __init__(self, x: Any, y: Any, kind: Any = "linear", *args: Any, **kwargs: Any) -> None:
            super().__init__(x, y, "linear" if kind == "slinear" else kind, *args, **kwargs)

    interpolate.interp1d = interp1d  # type: ignore[attr-defined]
    return "scipy.interpolate.interp1d(kind='slinear') accepts repeated abscissae again"


def numpy_aliases(source: str) -> str | None:
    """torch2onnx.py uses np.float, which numpy 1.24 removed."""
    used = set(re.findall(r"\bnp\.(float|int|bool|object)\b", source))
    gone = sorted(name for name in used if name not in vars(np))
    for name in gone:
        setattr(np, name, _ALIASES[name])
    if not gone:
        return None
    return f"numpy again has the names that the script uses: {', '.join(gone)}"


def mxnet(source: str) -> str | None:
    """mxnet's last release, 1.9.1 of 2022, fails to import with numpy 1.24 and later."""
    try:
        import_module("mxnet")
    except Exception:  # ImportError if it is missing, AttributeError if numpy is too new
        stand_in_for_mxnet()
        return "mxnet can't be imported; kdhooks reads train.rec and *.bin instead"
    return None


REPAIRS: tuple[Callable[[str], str | None], ...] = (
    scheduler_verbose,
    repeated_abscissae,
    numpy_aliases,
    mxnet,
)
