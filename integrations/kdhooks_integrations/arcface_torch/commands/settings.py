"""The settings of a training step: from a config file, from the command line, or assumed."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kdhooks.errors import KDHooksError
from kdhooks.factories import is_factory_name

_LARGEST = 2**63
"""Settings must be smaller than this, since torch refuses larger whole numbers."""


def _whole(least: int) -> tuple[str, Callable[[Any], bool]]:
    return f"a whole number, at least {least}", lambda v: type(v) is int and least <= v < _LARGEST


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return type(value) is int and abs(value) < _LARGEST


def _margins_fit(value: object) -> bool:
    """Whether CombinedMarginLoss accepts them; otherwise its exception has no message."""
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_is_number, value)):
        return False
    return bool((value[0] == 1 and value[2] == 0) or value[2] > 0)


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "network": ("the name of a network", lambda v: isinstance(v, str) and v != ""),
    "embedding_size": _whole(1),
    "num_classes": _whole(1),
    "batch_size": _whole(2),
    "fp16": ("True or False", lambda v: isinstance(v, bool)),
    "sample_rate": (
        "a number from 0, which samples only the classes of the batch, to 1",
        lambda v: _is_number(v) and 0 <= v <= 1,
    ),
    "margin_list": (
        "three numbers, (1.0, m2, 0.0) for ArcFace or (m1, m2, m3) with m3 above 0 for CosFace",
        _margins_fit,
    ),
    "interclass_filtering_threshold": ("a number", _is_number),
    "gradient_acc": _whole(1),
    "optimizer": ("'sgd' or 'adamw'", lambda v: isinstance(v, str) and v in ("sgd", "adamw")),
    "lr": ("a number above 0", lambda v: _is_number(v) and v > 0),
    "weight_decay": ("a number, at least 0", lambda v: _is_number(v) and v >= 0),
}
_NEEDED = ("network", "num_classes")
"""Keys that a config must have, since there is no usual value."""

ASSUMED = "assumed"


@dataclass(frozen=True)
class Settings:
    """The settings, with their names in a config of arcface_torch.

    Without a config, the defaults are used. Except for the batch size, they are those of the
    trainer's configs/base.py.
    """

    network: str
    sources: Mapping[str, str]  # the source of each value: the config, an option, or `ASSUMED`
    embedding_size: int | None = 512  # None: the network's default
    num_classes: int | None = None  # None: the number of the teacher's classes
    batch_size: int = 8
    fp16: bool = False
    sample_rate: float = 1.0
    margin_list: tuple[float, float, float] = (1.0, 0.5, 0.0)
    interclass_filtering_threshold: float = 0.0
    gradient_acc: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4

    def asked(self, name: str) -> Any:
        """Return a value to create the network with; for a factory, only from the command line."""
        if is_factory_name(self.network) and not self.sources[name].startswith("--"):
            return None
        return getattr(self, name)

    def values(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _RULES}

    def described(self) -> str:
        """Return all values that are set, grouped by their source."""
        by_source: dict[str, list[str]] = {}
        for name, value in self.values().items():
            if value is not None:
                source = self.sources[name]
                kind = "the command line" if source.startswith("--") else source
                by_source.setdefault(kind, []).append(f"{name} {value}")
        assumed = by_source.pop(ASSUMED, [])
        parts = [f"from {source}: {', '.join(found)}" for source, found in by_source.items()]
        parts += [f"assumed: {', '.join(assumed)}"] if assumed else []
        return "; ".join(parts)


def settle(written: Mapping[str, Any], config: str | None, given: Mapping[str, object]) -> Settings:
    """Combine all settings: options override the config, and the config overrides the defaults.

    written: all values of the config.
    given: the values from the command line, by their names in a config.
    """
    values: dict[str, Any] = {}
    sources = dict.fromkeys(_RULES, ASSUMED)
    for name, (rule, fits) in _RULES.items():
        if name in written and not fits(written[name]):
            raise KDHooksError(
                f"--config: {name} must be {rule}; found {written[name]!r} in '{config}'; "
                "correct it there"
            )
        option = f"--{name.replace('_', '-')}"
        if name in given:
            values[name], sources[name] = given[name], option
        elif name in written:
            values[name], sources[name] = written[name], str(config)
        elif config is not None and name in _NEEDED:
            raise KDHooksError(
                f"--config: the trainer needs {name}; found none in '{config}'; add it there, or "
                f"specify {option}"
            )
    if "network" not in values:
        raise KDHooksError(
            "doctor needs --config FILE, the config of the training, or --network NAME; found "
            "neither; specify one of them"
        )
    if "margin_list" in values:
        values["margin_list"] = tuple(map(float, values["margin_list"]))
    if is_factory_name(values["network"]):
        values.setdefault("embedding_size", None)
    return Settings(sources=sources, **values)
