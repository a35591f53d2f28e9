"""`install` wraps names of the script, and attaches once the objects that it needs exist."""

import atexit
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.hooks import RemovableHandle

from kdhooks.errors import KDHooksError
from kdhooks.recipe import Recipe
from kdhooks_integrations.arcface_torch.attachment import Attachment, attach
from kdhooks_integrations.arcface_torch.saving import SafeTorch

HEADS = ("PartialFC_V2", "PartialFC", "PartialFCAdamW")
LOGGER = "CallBackLogging"


class Installation:
    """Wraps names of the script until `remove`: get_model, heads, schedules, logger, torch."""

    def __init__(self, recipe: Recipe, namespace: dict[str, Any]) -> None:
        self._namespace = namespace
        self._recipe = recipe
        self._backbone: nn.Module | None = None
        self._heads: list[nn.Module] = []
        self._guards: list[RemovableHandle] = []
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
        """Record a new head, and refuse to train it before it is attached."""
        self._heads.append(head)
        self._guards.append(head.register_forward_pre_hook(self._refuse_undistilled))

    def _refuse_undistilled(self, head: nn.Module, *_: object) -> None:
        if head.training and torch.is_grad_enabled():
            raise KDHooksError(
                "arcface_torch: the head runs, but distillation is not attached: the script did "
                "not create its LR schedule from a class that it had imported by name when install "
                "ran; import that class at the top of the script, or use attach"
            )

    def _made_schedule(self, schedule: LRScheduler) -> None:
        if self.attachment is None:
            self._attach(schedule)
        else:
            self.attachment.adopt(schedule)

    def _attach(self, schedule: LRScheduler) -> None:
        if self._backbone is None or not self._heads:
            raise KDHooksError(
                "arcface_torch: install expects the script to call get_model and create a "
                "PartialFC before its LR schedule; if the order differs, use attach"
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
        """Return a subclass of the trainer's logging callback that also logs the terms."""
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
    """Add distillation to train_v2.py, by one line in its config file or below its imports.

    namespace: the script's globals; by default those of the main program.
    """
    checked = Recipe.read(recipe)
    checked.refuse_tables("arcface_torch")
    if namespace is not None and not isinstance(namespace, dict):
        raise KDHooksError(
            "arcface_torch: namespace must be the globals of train_v2.py, a dict; found "
            f"{type(namespace).__name__}; leave it out, or pass globals()"
        )
    if namespace is None:
        namespace = vars(sys.modules["__main__"])
    earlier = getattr(namespace.get("get_model"), "__self__", None)
    if isinstance(earlier, Installation):
        earlier.remove()
    missing = [] if "get_model" in namespace else ["get_model"]
    missing += [] if any(name in namespace for name in HEADS) else [HEADS[0]]
    missing += [] if _schedules(namespace) else ["class of an LR schedule"]
    if missing:
        raise KDHooksError(
            f"arcface_torch: the main program has no {' and no '.join(missing)}; call install in "
            "the config file of train_v2.py, or below the imports of train_v2.py, or use attach"
        )
    return Installation(checked, namespace)


def _noticed(original: Any, notice: Callable[[Any], None]) -> Any:
    """Wrap a class or a function, so that `notice` is called with each object it creates."""
    if not isinstance(original, type):

        def make(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            notice(made)
            return made

        return make

    class Noticed(original):  # type: ignore[misc]  # the base class is known only at run time
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
