"""The types that an option may have: the values that each accepts, and its name in messages."""

import inspect
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args, get_origin

import numpy as np
import torch
from torch import Tensor, nn

from kdhooks.errors import KDHooksError, near_miss
from kdhooks.tensor_files import user_path

T = TypeVar("T")
_WHOLE = 2**63  # torch's integers are below it


class OptionError(KDHooksError):
    """A refused option. Each table around it adds its name to the path."""

    def __init__(self, rule: str, *path: str | int, subject: str = "") -> None:
        self.rule, self.path, self.subject = rule, path, subject
        where = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")
        super().__init__(f"{subject}: {where} {rule}" if where else f"{subject} {rule}")

    def inside(self, name: str | int, subject: str = "") -> "OptionError":
        """Return the error of the table around this one, unless the error has a subject already."""
        if self.subject:
            return self
        return OptionError(self.rule, name, *self.path, subject=subject)


OptionError.__module__ = "kdhooks"


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The interval that a number must lie in."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None

    def hold(self, number: float) -> bool:
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and (self.most is None or number <= self.most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        """Return a text such as "at least 0 and below 1"; "" without bounds."""
        named = (
            ("at least", self.least), ("above", self.above),
            ("at most", self.most), ("below", self.below),
        )  # fmt: skip
        return " and ".join(
            f"{word} {bound if isinstance(bound, int) else f'{bound:g}'}"
            for word, bound in named
            if bound is not None
        )


@dataclass(frozen=True)
class Option:
    """One declared option."""

    kind: Any  # its type
    default: Any
    meaning: str = ""
    bounds: Bounds = Bounds()
    unit: str = ""


class Table:
    """The base of types that are created from a table of options."""

    bounded: ClassVar[tuple[str, ...]] = ()
    """The attributes to which the bounds of an option of this type apply."""

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Self:
        raise NotImplementedError


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the members of a union, or else the type itself."""
    if get_origin(kind) in (typing.Union, types.UnionType):
        return tuple(inner for member in get_args(kind) for inner in alternatives(member))
    if isinstance(kind, typing.NewType):
        return alternatives(kind.__supertype__)
    return (kind,)


def is_list(kind: Any) -> bool:
    return (get_origin(kind) or kind) in (tuple, list, Sequence)


def items_of(kind: Any) -> tuple[tuple[Any, ...], bool]:
    """Return the types of a list's items, and whether it must have one item of each."""
    inner = get_args(kind)
    fixed = get_origin(kind) is tuple and inner[-1:] != (Ellipsis,)
    return (inner, True) if fixed else (inner[:1] or (Any,), False)


class _Other(Exception):
    """The value is of another type."""


def checked(kind: Any, value: object, declared: Option, *, advise: bool = True) -> Any:
    """Return the value in the form that options store: a list as a tuple, a path as a Path.

    advise: whether an error suggests what to write instead.

    Raises:
        OptionError: the value is of another type, or outside the bounds.
    """
    kinds = alternatives(kind)
    for one in kinds:
        try:
            return _CHECKS.get(get_origin(one) or one, _instance)(one, value, declared)
        except _Other:
            continue
    words = [described(one) for one in kinds if one is not types.NoneType] or ["left out"]
    way_out = _way_out(kinds, value, declared) if advise else ""
    rule = f"must be {', '.join(words[:-1])}{' or ' if len(words) > 1 else ''}{words[-1]}"
    raise OptionError(f"{rule}; found {shown(value)}{way_out}")


def _boolean(kind: Any, value: object, declared: Option) -> object:
    if not isinstance(value, bool | np.bool_):
        raise _Other
    return bool(value)


def _whole(kind: Any, value: object, declared: Option) -> object:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _Other
    number = _within(int(value), declared)
    if not -_WHOLE <= number < _WHOLE:
        raise OptionError(f"must be a whole number of at most 64 bits; found {shown(number)}")
    return number


def _number(kind: Any, value: object, declared: Option) -> object:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _Other
    return _within(value if isinstance(value, int) else float(value), declared)


def _within(number: T, declared: Option) -> T:
    """Return the number if it is finite and within the bounds; otherwise raise an error."""
    found: Any = number
    try:
        finite = math.isfinite(found)
    except OverflowError:  # an integer that is too large for a float
        finite = False
    if not finite:
        raise OptionError(f"must be finite; found {reprlib.repr(found)}")
    if not declared.bounds.hold(found):
        unit = f" {declared.unit}" if declared.unit else ""
        degrees = declared.unit == "rad" and found > math.pi
        way_out = f"; {found:g} degrees are {math.radians(found):.4g} rad" if degrees else ""
        raise OptionError(f"must be {declared.bounds}{unit}; found {found}{way_out}")
    return number


def _text(kind: Any, value: object, declared: Option) -> object:
    if not isinstance(value, str):
        raise _Other
    return value


def _path(kind: Any, value: object, declared: Option) -> object:
    if not isinstance(value, str | Path):
        raise _Other
    if not str(value).strip() or "\0" in str(value):
        raise OptionError(f"must be a path; found {value!r}")
    try:
        return user_path(value, "the path")
    except KDHooksError as error:
        raise OptionError(f"must be a path on this machine; {error}") from None


def _choice(kind: Any, value: object, declared: Option) -> object:
    for choice in get_args(kind):
        # 1 is not accepted for True, but subclasses of str are, such as numpy's or an enum's.
        alike = type(choice) is type(value) or (isinstance(choice, str) and isinstance(value, str))
        if alike and choice == value:
            return choice
    raise _Other


def _list(kind: Any, value: object, declared: Option) -> object:
    inner, fixed = items_of(kind)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise _Other
    if not fixed:
        inner *= len(value)
    if len(value) != len(inner):
        raise _Other
    items = []
    for place, (one, item) in enumerate(zip(inner, value, strict=True)):
        try:
            items.append(checked(one, item, declared))
        except OptionError as error:
            raise error.inside(place) from None
    return tuple(items)


def _mapping(kind: Any, value: object, declared: Option) -> object:
    if not isinstance(value, Mapping):
        raise _Other
    return value


def _nothing(kind: Any, value: object, declared: Option) -> object:
    if value is not None:
        raise _Other
    return value


def _function(kind: Any, value: object, declared: Option) -> object:
    if not callable(value) or inspect.isclass(value):
        raise _Other
    return value


def _anything(kind: Any, value: object, declared: Option) -> object:
    return value


def _instance(kind: Any, value: object, declared: Option) -> object:
    kind = get_origin(kind) or kind
    if not inspect.isclass(kind):  # such as a type variable
        return value
    if issubclass(kind, Table):
        if isinstance(value, Mapping):
            value = kind.from_table(value)
        if isinstance(value, kind):
            for name in value.bounded:
                try:
                    _within(getattr(value, name), declared)
                except OptionError as error:
                    raise error.inside(name) from None
    if not isinstance(value, kind):
        raise _Other
    return value


_CHECKS: Mapping[Any, Callable[[Any, object, Option], object]] = {
    bool: _boolean, int: _whole, float: _number, str: _text, Path: _path, Literal: _choice,
    tuple: _list, list: _list, Sequence: _list, types.NoneType: _nothing, Callable: _function,
    Mapping: _mapping, dict: _mapping, Any: _anything, object: _anything,
}  # fmt: skip


# --- words ---------------------------------------------------------------------------------------


def described(kind: Any, *, plural: bool = False) -> str:
    """Name a type: "a whole number", "one of 'mse', 'kl'", "a list of 3 numbers"."""
    if get_origin(kind) is Literal:
        return listed_choices(get_args(kind))
    if is_list(kind):
        inner, fixed = items_of(kind)
        lists = "lists" if plural else "a list"
        if not inner or inner[0] in (Any, object):
            return lists
        one_item = fixed and len(inner) == 1
        of = " or ".join(described(k, plural=not one_item) for k in alternatives(inner[0]))
        return f"{lists} of {f'{len(inner)} ' if fixed and not one_item else ''}{of}"
    one, many = _WORDS.get(get_origin(kind) or kind, ("", ""))
    if not one and inspect.isclass(kind) and issubclass(kind, Table):
        one, many = "a table", "tables"
    if not one:
        name = getattr(kind, "__name__", str(kind))
        one, many = f"an object of class {name}", f"objects of class {name}"
    return many if plural else one


_WORDS: Mapping[Any, tuple[str, str]] = {
    bool: ("true or false", "true or false"), int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"), str: ("a string", "strings"), Path: ("a path", "paths"),
    Mapping: ("a table", "tables"), Callable: ("a function", "functions"),
    Tensor: ("a tensor", "tensors"), nn.Module: ("a module", "modules"),
    dict: ("a table", "tables"), Any: ("anything", "anything"),
    object: ("anything", "anything"),
}  # fmt: skip


def listed_choices(choices: Iterable[object]) -> str:
    words = [
        f"{choice!r}" if isinstance(choice, str) else str(choice).lower() for choice in choices
    ]
    return f"one of {', '.join(words)}" if len(words) > 1 else words[0]


def shown(value: object) -> str:
    """Format a value for an error: the value itself if it is plain, else its type."""
    if inspect.isclass(value):
        return f"the class {value.__name__}"
    if isinstance(value, torch.dtype):
        return str(value)
    plain = (str, int, float, bool, list, tuple, Mapping, np.generic, types.NoneType)
    return reprlib.repr(value) if isinstance(value, plain) else type(value).__name__


def _way_out(kinds: Sequence[Any], value: object, declared: Option) -> str:
    """Suggest what to write instead of a common mistake."""
    for instead, words in _instead_of(value):
        for kind in kinds:
            with suppress(OptionError):  # `instead` is no valid value either
                checked(kind, instead, declared, advise=False)
                return f"; {words}"
    choices = [c for k in kinds if get_origin(k) is Literal for c in get_args(k)]
    texts = [choice for choice in choices if isinstance(choice, str)]
    miss = near_miss(value, texts) if isinstance(value, str) else ""
    return f"; {miss.strip()}" if miss else ""


def _instead_of(value: object) -> Iterator[tuple[object, str]]:
    """Yield the values that may have been meant, and how to write each."""
    if isinstance(value, str):
        bare = value.strip().lower()
        words = f"write {bare}, without quotes"
        if bare in ("true", "false"):
            yield bare == "true", words
        for number in (int, float):
            with suppress(ValueError):
                yield number(bare.encode("ascii", "replace")), words
        is_written = bare.startswith("[") and bare.endswith("]")
        yield [value], "write it without the quotes" if is_written else f"write [{value!r}]"
    elif isinstance(value, Mapping):
        yield [value], "put it between [ and ]"
    elif isinstance(value, torch.dtype):
        name = str(value).removeprefix("torch.")
        yield name, f"write {name!r}"
    elif isinstance(value, Tensor | np.ndarray | np.generic):
        with suppress(ValueError, RuntimeError):  # it holds several numbers
            yield value.item(), "pass its item()"
        yield value.tolist(), "pass its tolist()"
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            yield torch.from_numpy(value), "pass torch.from_numpy(…)"
