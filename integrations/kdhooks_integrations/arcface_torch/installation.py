"""One line: the script's own names, wrapped, lead to an attachment once all its parts are made."""

import atexit
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe
from kdhooks.taps import Removable
from kdhooks_integrations.arcface_torch.attachment import Attachment, attach
from kdhooks_integrations.arcface_torch.saving import SafeTorch

HEADS = ("PartialFC_V2", "PartialFC", "PartialFCAdamW")
LOGGER = "CallBackLogging"


class Installation:
    """Names of the script, wrapped, until `remove`: get_model, heads, schedules, logger, torch."""

    def __init__(self, recipe: Recipe, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._recipe = recipe
        self._backbone: nn.Module | None = None
        self._heads: list[nn.Module] = []
        self._guards: list[Removable] = []
        self.attachment: Attachment | None = None
        wrapped: dict[str, Any] = {"get_model": self._get_model}
        for name in HEADS:
            if name in namespace:
                wrapped[name] = _noticed(namespace[name], self._made_head)
        for name in _schedules(namespace):
            wrapped[name] = _noticed(namespace[name], self._made_schedule)
        if namespace.get("torch") is torch:
            wrapped["torch"] = SafeTorch(self._check)
        if LOGGER in namespace:
            wrapped[LOGGER] = self._logger(namespace[LOGGER])
        self._originals = {name: namespace[name] for name in wrapped}
        namespace.update(wrapped)
        atexit.register(self._summary)

    def _get_model(self, *args: Any, **kwargs: Any) -> nn.Module:
        model: nn.Module = self._originals["get_model"](*args, **kwargs)
        self._backbone = self._backbone or model
        return model

    def _made_head(self, head: nn.Module) -> None:
        """Until it is attached, it trains nothing."""
        self._heads.append(head)
        self._guards.append(head.register_forward_pre_hook(self._refuse_undistilled))

    def _refuse_undistilled(self, head: nn.Module, *_: object) -> None:
        if head.training and torch.is_grad_enabled():
            raise KDHooksError(
                "arcface_torch: the head runs, and nothing distils: the schedule of the learning "
                "rate is not made by a class that the script has imported below or above the line; "
                "import its class by name, or use attach"
            )

    def _made_schedule(self, schedule: LRScheduler) -> None:
        if self.attachment is None:
            self._attach(schedule)
        else:
            self.attachment.adopt(schedule)

    def _attach(self, schedule: LRScheduler) -> None:
        if self._backbone is None or not self._heads:
            raise KDHooksError(
                "arcface_torch: install expects a get_model and a PartialFC before the schedule of "
                "the learning rate; use attach for another arrangement"
            )
        self.attachment = attach(
            self._backbone,
            self._heads,
            schedule.optimizer,
            schedule,
            self._recipe,
            get_model=self._originals["get_model"],
        )
        self._backbone, self._heads = None, []
        for guard in self._guards:
            guard.remove()

    def _logger(self, original: type) -> type:
        """The trainer's logging callback, which then logs the terms whenever it logs."""
        installation = self

        class Logger(original):  # type: ignore[misc]
            def __call__(self, global_step: int, *args: Any, **kwargs: Any) -> None:
                super().__call__(global_step, *args, **kwargs)
                due = self.rank == 0 and global_step % self.frequent == 0
                if due and installation.attachment is not None:
                    installation.attachment.report(global_step, self.writer)

        return Logger

    def _check(self) -> None:
        if self.attachment is not None:
            self.attachment.distiller.check_finite()

    def _summary(self) -> None:
        if self.attachment is not None and self.attachment.rank == 0:
            self.attachment.summary()

    def remove(self) -> None:
        atexit.unregister(self._summary)
        for guard in self._guards:
            guard.remove()
        self._namespace.update(self._originals)
        if self.attachment is not None:
            self.attachment.remove()


def install(
    recipe: "Recipe | Mapping[str, Any] | str | Path", namespace: dict[str, Any] | None = None
) -> Installation:
    """Distil in train_v2.py: a line in its config file, or below its own imports.

    namespace: the script's globals, found by themselves where it runs as the main program.
    """
    checked = Recipe.read(recipe)
    checked.refuse_tables("arcface_torch")
    if namespace is not None and not isinstance(namespace, dict):
        raise KDHooksError(
            "arcface_torch: namespace must be the globals of train_v2.py, a dict; found "
            f"{type(namespace).__name__}; leave it out, or give globals()"
        )
    if namespace is None:
        namespace = vars(sys.modules["__main__"])
    earlier = getattr(namespace.get("get_model"), "__self__", None)
    if isinstance(earlier, Installation):
        earlier.remove()
    missing = [] if "get_model" in namespace else ["get_model"]
    missing += [] if any(name in namespace for name in HEADS) else [HEADS[0]]
    missing += [] if _schedules(namespace) else ["class of a learning rate schedule"]
    if missing:
        raise KDHooksError(
            f"arcface_torch: the main program has no {' and no '.join(missing)}; put the line into "
            "the config file that train_v2.py is started with, or below its imports, or use attach"
        )
    return Installation(checked, namespace)


def _noticed(original: Any, notice: Callable[[Any], None]) -> Any:
    """A class, or a function, that tells of each object it makes."""
    if not isinstance(original, type):

        def make(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            notice(made)
            return made

        return make

    class Noticed(original):  # type: ignore[misc]  # known when this runs
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            notice(self)

    Noticed.__name__, Noticed.__qualname__ = original.__name__, original.__qualname__
    Noticed.__module__ = original.__module__
    return Noticed


def _schedules(namespace: Mapping[str, Any]) -> list[str]:
    return [
        name
        for name, value in namespace.items()
        if isinstance(value, type) and issubclass(value, LRScheduler)
    ]
