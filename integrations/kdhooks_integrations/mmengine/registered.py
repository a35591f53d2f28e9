"""The names that a config can use: `Distill`, `DistillHook` and `ResumeHook`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper, OptimWrapperDict
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from kdhooks.errors import KDHooksError
from kdhooks.registry import HOOKS, MODELS
from kdhooks_integrations.mmengine.checkpoints import history
from kdhooks_integrations.mmengine.models import built
from kdhooks_integrations.mmengine.options import Options
from kdhooks_integrations.mmengine.resume import complete
from kdhooks_integrations.mmengine.student import Distillation, attach

_MIXED = (
    "a model that replaces that of a base config needs _delete_=True, otherwise the keys of both "
    "are merged; "
)
_ITS_OWN = "the hook uses the runner's model as the student; "


def Distill(
    student: Mapping[str, Any] | nn.Module | None = None,
    recipe: str | Path | None = None,
    data_preprocessor: Mapping[str, Any] | nn.Module | None = None,
    **table: Any,
) -> nn.Module:
    """Build the student, and add the methods' losses to its own.

    recipe: a TOML file; alternatively, its keys are arguments: teacher, methods, taps, seed, …
    data_preprocessor: the student's, if its config has none. MMEngine's runners pass the one from
        the config's top level. It is ignored if the student is already built.
    The other arguments are those of `Options`.
    """
    options = Options.read(recipe, table, _MIXED)
    if isinstance(student, dict) and data_preprocessor is not None:
        student = {"data_preprocessor": data_preprocessor, **student}
    model = student if isinstance(student, nn.Module) else built(student, "student")
    attach(model, options)
    return model


MODELS.register_module(module=Distill)  # pyright: ignore[reportArgumentType]  # accepts functions


@HOOKS.register_module()
class DistillHook(Hook):  # type: ignore[misc]  # mmengine has no types
    """Adds the methods' losses to a model that the runner has already built and wrapped."""

    priority = "VERY_HIGH"  # before EMAHook copies the model

    def __init__(self, recipe: str | Path | None = None, **table: Any) -> None:
        """See `Distill`."""
        self._options = Options.read(recipe, table, _ITS_OWN)
        self._distillation: Distillation | None = None

    def before_run(self, runner: Any) -> None:
        trains = isinstance(runner.optim_wrapper, OptimWrapper | OptimWrapperDict)
        if self._distillation is not None or not trains:
            return
        wrapped = is_model_wrapper(runner.model)
        distillation = attach(runner.model.module if wrapped else runner.model, self._options)
        trained = distillation.trained()
        if trained:
            if wrapped and not isinstance(runner.model, DistributedDataParallel):
                _refuse(f"the model is wrapped in {type(runner.model).__name__}")
            _optimise(runner.optim_wrapper, trained)
        self._distillation = distillation

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        self.before_run(runner)  # FlexibleRunner loads before it calls before_run
        complete(runner, checkpoint)


@HOOKS.register_module()
class ResumeHook(Hook):  # type: ignore[misc]  # mmengine has no types
    """Calls `allow_resume`, and lets a distilled run resume from a plain run's checkpoint."""

    priority = "VERY_HIGH"  # before EMAHook reads the checkpoint

    def __init__(self) -> None:
        allow_resume()

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        complete(runner, checkpoint)


def _optimise(wrapper: OptimWrapper | OptimWrapperDict, parameters: list[nn.Parameter]) -> None:
    """Append them to the only group, where they would be if the model had had them before."""
    if isinstance(wrapper, OptimWrapperDict):
        _refuse("there is more than one optimizer")
    if isinstance(wrapper.optimizer, ZeroRedundancyOptimizer):
        _refuse("ZeroRedundancyOptimizer has already distributed its parameters")
    groups = wrapper.optimizer.param_groups
    if len(groups) > 1:
        _refuse(f"the optimizer has {len(groups)} groups, so it is unknown which one to use")
    groups[0]["params"].extend(parameters)


def _refuse(why: str) -> None:
    raise KDHooksError(
        f"mmengine: these methods train weights of their own, and {why}; use kdhooks.Distill, "
        "which adds them before the optimizer is built: model = dict(type='kdhooks.Distill', "
        "student=…, …)"
    )


def allow_resume() -> None:
    """Let torch 2.6 and newer read MMEngine's own checkpoints, for resume and load_from.

    Besides the weights, these hold the log's history; its classes are registered as safe in this
    process.
    """
    torch.serialization.add_safe_globals(history())
