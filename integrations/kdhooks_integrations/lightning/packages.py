"""Supports both packages of Lightning: lightning.pytorch and pytorch_lightning.

Their code is the same, but each has its own classes. A Trainer accepts only modules and callbacks
of its own package, so `Distill` is a subclass of Callback of every installed package.
"""

from types import ModuleType
from typing import TYPE_CHECKING, Any

from kdhooks.errors import KDHooksError

_FLOOR = (2, 4)


def _installed() -> list[ModuleType]:
    found: list[ModuleType] = []
    failed: list[ImportError] = []
    try:
        import lightning.pytorch

        found.append(lightning.pytorch)
    except ImportError as error:
        failed.append(error)
    try:
        import pytorch_lightning

        found.append(pytorch_lightning)
    except ImportError as error:
        failed.append(error)
    if not found:
        raise failed[0]
    return found


_PACKAGES = _installed()

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    Callback = type("Callback", tuple(package.Callback for package in _PACKAGES), {})

__all__ = ["Callback", "package_of"]


def package_of(trainer: object) -> Any:
    """Return the package that a Trainer comes from."""
    package = next(one for one in _PACKAGES if isinstance(trainer, one.Trainer))
    version: str = package.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < _FLOOR:
        raise KDHooksError(
            f"lightning: {package.__name__} must be version 2.4 or newer; found {version}; install "
            "a newer one"
        )
    return package
