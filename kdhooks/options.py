"""Declares options, each in one place: its type, default, bounds, unit and meaning.

A class of options is a frozen dataclass with keyword arguments:

    class KD(Options):
        temperature: Scheduled = option(4.0, "Softens the scores of both sides.", above=0)

The declaration is the source of the checks of values, of the tables in docs/methods, of the output
of `kdhooks methods NAME`, and of the JSON Schema that `kdhooks schema` prints. For a class without
such declarations, only names and types are known, from the signature of its constructor.
"""

import inspect
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, replace
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Literal,
    Self,
    TypeGuard,
    TypeVar,
    dataclass_transform,
    get_origin,
)

from torch import Tensor

from kdhooks.errors import KDHooksError, listed, near_miss
from kdhooks.kinds import (
    Bounds,
    Option,
    OptionError,
    Table,
    alternatives,
    checked,
    is_list,
    items_of,
    shown,
)

T = TypeVar("T")
REQUIRED: Any = inspect.Parameter.empty
"""The default of an option that is required."""


def option(
    default: T,
    meaning: str,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
    unit: str = "",
) -> T:
    """Declare an option. The bounds also apply to the items of a list, and to a schedule.

    A default that is a list is stored as a tuple, like the lists that users pass.
    """
    kept: Any = tuple(default) if isinstance(default, list) else default
    bounds = Bounds(least=least, above=above, most=most, below=below)
    declared = Option(None, kept, meaning, bounds, unit)
    made: T = field(default=kept, metadata={"option": declared})
    return made


@dataclass_transform(kw_only_default=True, frozen_default=True, eq_default=False)
class Options(Table):
    """The base of a class of options. Creating an object checks every value, then calls `check`.

    A list becomes a tuple, and a table becomes an object of its class of options.
    subject: the start of errors; by default the class's name in lower case.
    """

    subject: ClassVar[str]
    rules: ClassVar[Mapping[str, Any]] = {}
    """Keywords of JSON Schema for rules that involve several options."""

    def __init_subclass__(cls, subject: str = "") -> None:
        cls.subject = subject or cls.__name__.lower()
        dataclass(frozen=True, kw_only=True, eq=False)(cls)

    def __post_init__(self) -> None:
        for name, declared in declared_options(type(self)).items():
            subject = type(self).subject
            value = _checked_option(subject, name, declared, getattr(self, name))
            if float in alternatives(declared.kind) and _is_function(value):
                value = Bounded(value, declared, f"{subject}: {name}")
            object.__setattr__(self, name, value)
        self.check()

    def check(self) -> None:
        """Refuse values that contradict each other, by raising `self.refused(…)`."""

    def refused(self, name: str, rule: str) -> OptionError:
        return OptionError(rule, name, subject=type(self).subject)

    def has(self, name: str) -> bool:
        """Whether the option differs from its default."""
        value: object = getattr(self, name)
        default = declared_options(type(self))[name].default
        return value is not default and (isinstance(value, Tensor) or value != default)

    def given(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {
            name: getattr(self, name) for name in declared_options(type(self)) if self.has(name)
        }

    def described(self) -> str:
        """The options that differ from their defaults; the same text on ranks with the same ones.

        It shows numbers and strings. Paths may differ between machines, and functions can't be
        compared.
        """
        return ", ".join(f"{name} = {_described(value)}" for name, value in self.given().items())

    @classmethod
    def from_table(cls, table: Mapping[str, object]) -> Self:
        return read(cls, table, "")

    @classmethod
    def read(cls, table: object, subject: str = "") -> Self:
        return read(cls, table, subject or cls.subject)


def read(made: type[T], table: object, subject: str) -> T:
    """Create an object of the class `made` from a table of its options.

    Raises:
        OptionError: an unknown or missing option, or one of a wrong type or value.
    """
    if not isinstance(table, Mapping):
        raise OptionError(f"must be a table; found {shown(table)}", subject=subject)
    known = declared_options(made)
    for name in table:
        if name not in known:
            raise OptionError(
                f"has no option '{name}'; {near_miss(str(name), known)}"
                f"its options are: {listed(known)}",
                subject=subject,
            )
    for name, declared in known.items():
        if declared.default is REQUIRED and name not in table:
            raise OptionError(f"needs its option '{name}'", subject=subject)
    given = dict(table)
    for name, value in table.items():
        kept = _checked_option(subject, name, known[name], value)
        if issubclass(made, Options) or isinstance(kept, Options | Path):
            given[name] = kept
    try:
        return made(**given)
    except OptionError as error:
        if not issubclass(made, Options) or error.subject != made.subject:
            raise
        raise OptionError(error.rule, *error.path, subject=subject) from error
    except KDHooksError:
        raise
    except Exception as error:  # from the constructor of another package
        raise KDHooksError(
            f"{subject} can't be created with {reprlib.repr(given)}; found "
            f"{type(error).__name__}: {error}"
        ) from error


def declared_options(made: type) -> Mapping[str, Option]:
    """Return the options of a class by name, in the order of their declaration."""
    if issubclass(made, Options):
        hints = typing.get_type_hints(made)
        return {
            f.name: replace(f.metadata.get("option") or _plain(f), kind=hints[f.name])
            for f in fields(made)  # type: ignore[arg-type]
        }
    try:
        hints = typing.get_type_hints(made.__init__)
    except Exception:  # an annotation of another package that can't be resolved
        hints = {}
    return {
        name: Option(
            _of_signature(name, hints.get(name, Any), parameter.default), parameter.default
        )
        for name, parameter in inspect.signature(made).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def _plain(declared: Field[Any]) -> Option:
    """Describe a field of a dataclass that was declared without `option`."""
    return Option(Any, REQUIRED if declared.default is MISSING else declared.default)


def opened(made: type) -> Mapping[str, Option]:
    """Return the declared options, those of inner tables with names such as "urfm.centres"."""
    found: dict[str, Option] = {}
    for name, declared in declared_options(made).items():
        if isinstance(declared.default, Options):
            inner = opened(type(declared.default))
            found |= {f"{name}.{key}": option for key, option in inner.items()}
        else:
            found[name] = declared
    return found


def _of_signature(name: str, hint: Any, default: object) -> Any:
    """Return a type hint if options of this type can be checked, and Any otherwise."""
    if name == "weight" and hint is float:  # a recipe may hold a schedule there
        return Any
    if default is None:  # `x: int = None` allows None
        hint = hint | None if hint is not Any else hint
    return hint if all(_understood(kind) for kind in alternatives(hint)) else Any


def _understood(kind: Any) -> bool:
    if is_list(kind):
        return all(map(_understood, items_of(kind)[0]))
    is_options = inspect.isclass(kind) and issubclass(kind, Options)
    known = (bool, int, float, str, Path, Any, types.NoneType)
    return kind in known or get_origin(kind) in (Literal, Callable) or is_options


def _checked_option(subject: str, name: str, declared: Option, value: object) -> object:
    if value is REQUIRED:
        raise OptionError(f"needs its option '{name}'", subject=subject)
    try:
        return checked(declared.kind, value, declared)
    except OptionError as error:
        raise error.inside(name, subject) from None


def check_arguments(
    subject: str, declared: Mapping[str, Option], found: Mapping[str, object]
) -> dict[str, Any]:
    """Check the arguments of a function as options, and return them in the form options store.

    found: the arguments by name, such as the function's `locals()`; others are left out.
    """
    return {
        name: _checked_option(subject, name, option, found[name])
        for name, option in declared.items()
    }


def _described(value: object) -> str:
    if isinstance(value, Options):
        return f"({value.described()})"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_described, value))}]"
    if isinstance(value, Bounded):
        return "a function"
    plain = value is None or isinstance(value, bool | int | float | str)
    return repr(value) if plain else f"a {type(value).__name__}"


def _is_function(value: object) -> TypeGuard[Callable[[int], float]]:
    """Whether the value is a function with unchecked results; a schedule is checked already."""
    return callable(value) and not isinstance(value, Table | Bounded)


@dataclass(frozen=True)
class Bounded:
    """A function from the step to a number, each result of which is checked."""

    function: Callable[[int], float]
    declared: Option
    subject: str

    def __call__(self, step: int) -> float:
        try:
            number: Any = checked(float, self.function(step), self.declared)
        except OptionError as error:
            raise OptionError(error.rule, subject=f"{self.subject} in step {step}") from None
        return float(number)
