"""Declared options of every installed method and every type refuse wrong values."""

import enum
from collections.abc import Callable, Sequence
from math import inf, nan
from pathlib import Path
from typing import Any, Literal, NewType

import numpy as np
import pytest
import torch
from torch import Tensor

from kdhooks import EmbeddingTap, KDHooksError, Options, Scheduled, hookimpl, methods, option
from kdhooks.discovery import create, load
from kdhooks.kinds import Bounds, Option, OptionError, alternatives
from kdhooks.options import declared_options, opened, read
from kdhooks.schedules import Schedule
from kdhooks.testing import TinyFaceNet
from kdhooks_plugins.fcd import EmbeddingDistance

NAMES = [info.name for info in methods()]


class Inner(Options, subject="sample: inner"):
    """A table inside of another."""

    share: float = option(0.5, "A share.", least=0, most=1)
    step: int = option(1, "A count.", least=1)

    def check(self) -> None:
        if self.share and self.step > 5:
            raise self.refused("step", f"must be at most 5 beside a share; found {self.step}")


class Sample(Options):
    """One option of each kind."""

    flag: bool = option(False, "A flag.")
    count: int | None = option(None, "A count.", least=1)
    angle: Scheduled = option(0.5, "An angle.", least=0, most=3.2, unit="rad")
    kind: Literal["plain", "fancy"] = option("plain", "A choice.")
    mode: bool | Literal["fast"] = option(False, "A flag or a word.")
    names: Sequence[str] = option((), "Names.")
    sizes: Sequence[int] = option((4, 2), "Sizes.", least=2)
    point: tuple[float, float] = option((0.0, 1.0), "A point.")
    file: Path | None = option(None, "A file.")
    rows: Tensor | Path | None = option(None, "Rows.")
    inner: Inner = option(Inner(), "A table.")


class Words(enum.StrEnum):
    FANCY = "fancy"


GOOD: list[tuple[str, object, object]] = [
    ("flag", True, True),
    ("count", np.int64(3), 3),
    ("angle", 1, 1),
    ("angle", np.float32(0.5), 0.5),
    ("mode", "fast", "fast"),
    ("flag", np.True_, True),
    ("kind", np.str_("fancy"), "fancy"),
    ("kind", Words.FANCY, "fancy"),
    ("names", ["a", "b"], ("a", "b")),
    ("sizes", [], ()),
    ("point", [1, 2.5], (1, 2.5)),
    ("file", "~", Path.home()),
    ("file", Path("x.pt"), Path("x.pt")),
    ("rows", "rows.pt", Path("rows.pt")),
]
BAD: list[tuple[str, object, str]] = [
    (
        "flag",
        "false",
        "sample: flag must be true or false; found 'false'; write false, without quotes",
    ),
    ("flag", 1, "sample: flag must be true or false; found 1"),
    ("flag", None, "sample: flag must be true or false; found None"),
    ("count", True, "sample: count must be a whole number; found True"),
    ("count", 2.0, "sample: count must be a whole number; found 2.0"),
    ("count", 10**30, "sample: count must be a whole number of at most 64 bits; found 10000"),
    ("count", "8", "sample: count must be a whole number; found '8'; write 8, without quotes"),
    ("count", 0, "sample: count must be at least 1; found 0"),
    ("count", "1e3", "sample: count must be a whole number; found '1e3'$"),
    ("count", torch.tensor(8), "must be a whole number; found Tensor; pass its item()"),
    ("count", torch.tensor([8, 9]), "must be a whole number; found Tensor$"),
    ("angle", "nan", "sample: angle must be a number, a table or a function; found 'nan'$"),
    ("angle", "٣", "sample: angle must be a number, a table or a function; found '٣'$"),
    ("angle", np.True_, f"found {np.True_!r}$"),  # numpy 1 writes True
    ("angle", "x", "sample: angle must be a number, a table or a function; found 'x'"),
    ("angle", True, "sample: angle must be a number, a table or a function; found True"),
    ("angle", [1.0], "sample: angle must be a number, a table or a function; found [1.0]"),
    ("angle", nan, "sample: angle must be finite; found nan"),
    ("angle", -inf, "sample: angle must be finite; found -inf"),
    ("angle", 10**400, "sample: angle must be finite; found 1000000"),
    ("angle", -0.1, "sample: angle must be at least 0 and at most 3.2 rad; found -0.1"),
    ("angle", 30, "at most 3.2 rad; found 30; 30 degrees are 0.5236 rad"),
    (
        "angle",
        Schedule,
        "sample: angle must be a number, a table or a function; found the class Schedule",
    ),
    (
        "angle",
        {"value": 9.0},
        "sample: angle.value must be at least 0 and at most 3.2 rad; found 9",
    ),
    ("angle", {"value": 1, "initial": -1, "warmup": 2}, "sample: angle.initial must be at least 0"),
    ("angle", {"valeu": 1}, "sample: angle has no option 'valeu'; did you mean 'value'?"),
    ("angle", {}, "sample: angle needs its option 'value'"),
    (
        "kind",
        "fancyy",
        "sample: kind must be one of 'plain', 'fancy'; found 'fancyy'; did you mean",
    ),
    ("kind", "FANCY", "found 'FANCY'; did you mean 'fancy'?"),
    ("kind", ["plain"], "sample: kind must be one of 'plain', 'fancy'; found ['plain']"),
    ("mode", 1, "sample: mode must be true or false or 'fast'; found 1"),
    (
        "names",
        "layer3",
        "sample: names must be a list of strings; found 'layer3'; write ['layer3']",
    ),
    ("names", ["a", 3], "sample: names[1] must be a string; found 3"),
    ("names", {"a": 1}, "sample: names must be a list of strings; found {'a': 1}"),
    ("sizes", "42", "sample: sizes must be a list of whole numbers; found '42'$"),
    ("sizes", np.array([4, 2]), "list of whole numbers; found ndarray; pass its tolist()"),
    ("rows", np.zeros((2, 3)), "found ndarray; pass torch.from_numpy(…)"),
    ("sizes", [4, 1], "sample: sizes[1] must be at least 2; found 1"),
    ("sizes", [4.5], "sample: sizes[0] must be a whole number; found 4.5"),
    ("point", [1.0], "sample: point must be a list of 2 numbers; found [1.0]"),
    ("point", "ab", "sample: point must be a list of 2 numbers; found 'ab'"),
    ("file", "", "sample: file must be a path; found ''"),
    ("file", "a\0b", "sample: file must be a path; found 'a"),
    ("file", 3, "sample: file must be a path; found 3"),
    (
        "file",
        "~nosuchuser/x",
        "sample: file must be a path on this machine; the path: '~nosuchuser",
    ),
    ("file", "https://a.b/c.pt", "is a URL; download the file, and name its path"),
    ("rows", 3, "sample: rows must be a tensor or a path; found 3"),
    ("inner", 3, "sample: inner must be a table; found 3"),
    ("inner", {"share": 2}, "sample: inner.share must be at least 0 and at most 1; found 2"),
    ("inner", {"shar": 0.2}, "sample: inner has no option 'shar'; did you mean 'share'?"),
    ("inner", {"step": 9}, "sample: inner.step must be at most 5 beside a share; found 9"),
    ("iner", {}, "sample has no option 'iner'; did you mean 'inner'?"),
]


Count = NewType("Count", int)


class Odd(Options):
    """Types that a third-party method may use."""

    anything: list = option([1], "A list of anything.")  # type: ignore[type-arg]
    pair: tuple = option((), "Another.")  # type: ignore[type-arg]
    empty: tuple[()] = option((), "Nothing.")
    table: dict[str, int] | None = option(None, "A table.")
    names: set[str] | None = option(None, "A set.")
    count: Count = option(Count(1), "A whole number.")
    single: tuple[float] | None = option(None, "A list of one.")
    left_out: None = option(None, "Nothing at all.")


class WithPath:
    def __init__(self, file: Path | None = None, nothing: tuple[()] = ()) -> None:
        self.file = file


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("anything", [1, "a"], (1, "a")),
        ("pair", [1, "a"], (1, "a")),
        ("empty", [], ()),
        ("table", {"a": 1}, {"a": 1}),
        ("names", {"a"}, {"a"}),
        ("count", 3, 3),
    ],
)
def test_a_plain_python_type_is_checked_as_far_as_it_is_known(
    name: str, value: object, kept: object
) -> None:
    assert getattr(Odd.read({name: value}), name) == kept


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("anything", "a", "odd: anything must be a list; found 'a'; write ['a']"),
        (
            "anything",
            {"a": 1},
            "odd: anything must be a list; found {'a': 1}; put it between [ and ]",
        ),
        ("empty", [1], "odd: empty must be a list; found [1]"),
        ("table", 3, "odd: table must be a table; found 3"),
        ("names", ["a"], "odd: names must be an object of class set; found ['a']"),
        ("count", "3", "odd: count must be a whole number; found '3'; write 3, without quotes"),
        ("single", 3, "odd: single must be a list of a number; found 3"),
        ("left_out", 3, "odd: left_out must be left out; found 3"),
    ],
)
def test_a_wrong_value_of_a_plain_python_type_is_refused(
    name: str, value: object, words: str
) -> None:
    with pytest.raises(KDHooksError) as error:
        Odd.read({name: value})
    assert str(error.value) == words


def test_a_default_that_is_a_list_is_kept_as_a_tuple() -> None:
    anything: object = Odd().anything
    assert anything == (1,)


def test_a_constructor_gets_the_path_that_its_signature_asks_for() -> None:
    assert read(WithPath, {"file": "~/x"}, "m").file == Path.home() / "x"
    with pytest.raises(KDHooksError, match="m: file must be a path; found 3"):
        read(WithPath, {"file": 3}, "m")


@pytest.mark.parametrize(("name", "value", "kept"), GOOD)
def test_a_value_of_the_right_type_is_kept(name: str, value: object, kept: object) -> None:
    assert getattr(Sample.read({name: value}), name) == kept
    assert getattr(Sample(**{name: value}), name) == kept  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_a_wrong_value_is_refused_with_its_fix(name: str, value: object, words: str) -> None:
    with pytest.raises(KDHooksError) as error:
        Sample.read({name: value})
    assert words in f"{error.value}$"
    if name in declared_options(Sample):
        with pytest.raises(KDHooksError) as direct:
            Sample(**{name: value})  # type: ignore[arg-type]
        assert words in f"{direct.value}$"


def test_a_table_gets_the_name_of_its_reader() -> None:
    with pytest.raises(OptionError, match=r"^recipe: x: flag must be true"):
        Sample.read({"flag": 3}, "recipe: x")
    with pytest.raises(OptionError, match=r"^recipe: x must be a table; found 3$"):
        Sample.read(3, "recipe: x")


def test_lists_and_tables_become_objects() -> None:
    sample = Sample.read({"inner": {"step": 2}, "angle": {"value": 1.0, "warmup": 4}, "rows": "r"})
    assert sample.inner.step == 2
    assert isinstance(sample.angle, Schedule)
    assert sample.given().keys() == {"inner", "angle", "rows"}
    assert not sample.has("flag")


def test_options_are_described_for_the_comparison_of_ranks() -> None:
    assert Sample().described() == ""
    sample = Sample.read({"inner": {"step": 2}, "angle": {"value": 1.0, "warmup": 4}, "rows": "r"})
    assert sample.described() == (
        f"angle = (value = 1.0, initial = 0.0, warmup = 4), rows = a {type(Path()).__name__}, "
        "inner = (step = 2)"
    )
    assert Sample(angle=lambda step: 1.0).described() == "angle = a function"


def test_options_of_inner_tables_have_dotted_names() -> None:
    assert [name for name in opened(Sample) if "." in name] == ["inner.share", "inner.step"]


@pytest.mark.parametrize(
    ("bounds", "words", "inside", "outside"),
    [
        (Bounds(), "", [-5, 0, 5], []),
        (Bounds(least=0), "at least 0", [0, 1], [-1]),
        (Bounds(above=0, below=1), "above 0 and below 1", [0.5], [0, 1]),
        (Bounds(least=-1, most=1), "at least -1 and at most 1", [-1, 1], [-2, 2]),
    ],
)
def test_bounds(bounds: Bounds, words: str, inside: list[float], outside: list[float]) -> None:
    assert str(bounds) == words
    assert all(map(bounds.hold, inside))
    assert not any(map(bounds.hold, outside))


class Bare(Options):
    """Fields without `option`, only with types and defaults."""

    size: int
    name: str = "x"


def test_a_field_without_a_declaration_is_checked_by_its_type() -> None:
    assert Bare(size=3).name == "x"
    for table, words in [
        ({}, "bare needs its option 'size'"),
        ({"size": "3"}, "bare: size must be a whole number; found '3'"),
        ({"size": 3, "name": 4}, "bare: name must be a string; found 4"),
    ]:
        with pytest.raises(KDHooksError) as error:
            Bare.read(table)
        assert words in str(error.value)


# --- every installed method ----------------------------------------------------------------------


def wrong_values(declared: Option) -> list[object]:
    """Return values that no option of this type accepts."""
    kinds = alternatives(declared.kind)
    wrong: list[object] = [{"no such": 1}, object()]
    if str not in kinds and Path not in kinds:
        wrong.append("surely wrong")
    if bool not in kinds:
        wrong.append(True)
    if {int, float} & set(kinds):
        wrong += [nan, inf, -inf, "1"]
        bounds = declared.bounds
        wrong += [b - 1 for b in (bounds.least, bounds.above) if b is not None]
        wrong += [b + 1 for b in (bounds.most, bounds.below) if b is not None]
        wrong += [bound for bound in (bounds.above, bounds.below) if bound is not None]
    if int in kinds and float not in kinds:
        wrong += [1.5, 2.0]
    return wrong


def every_option() -> list[tuple[str, str, object]]:
    return [
        (name, key, wrong)
        for name in NAMES
        for key, declared in opened(load(name)).items()
        for wrong in wrong_values(declared)
    ]


@pytest.mark.parametrize(("name", "key", "wrong"), every_option())
def test_every_option_of_every_method_refuses_wrong_values(
    name: str, key: str, wrong: object
) -> None:
    first, *rest = key.split(".")
    table = {first: {rest[0]: wrong} if rest else wrong}
    with pytest.raises(KDHooksError) as error:
        create({"name": name, **table})
    assert str(error.value).startswith(f"{name}: {key}")


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_every_method_has_a_meaning(name: str) -> None:
    for declared in opened(load(name)).values():
        assert declared.meaning.endswith(".")


# --- methods that declare their options by a signature -------------------------------------------


class Signed:
    """A third-party method, with an annotation that cannot be resolved."""

    def __init__(
        self,
        *,
        size: int,
        weight: float | Callable[[int], float] = 1.0,
        mode: str = "a",
        odd: "NoSuchName" = None,  # type: ignore[name-defined]  # noqa: F821
        rows: np.ndarray[Any, Any] | None = None,
    ) -> None:
        if mode == "bad":
            raise RuntimeError("a reason of its own")
        self.options = (size, weight, mode, odd, rows)

    @hookimpl
    def embedding_tap(self) -> EmbeddingTap:
        return EmbeddingTap("signed", EmbeddingDistance(), 1.0)


class Resolved:
    def __init__(
        self, *, size: int, levels: list[int] | None = None, weight: Scheduled = 1.0
    ) -> None:
        self.size, self.levels, self.weight = size, levels, weight


def test_a_signature_that_cannot_be_resolved_is_not_checked() -> None:
    assert repr(read(Signed, {"size": "8"}, "signed").options[0]) == "'8'"


def test_a_signature_declares_names_types_and_required_options() -> None:
    made = read(Resolved, {"size": 3, "levels": [1], "weight": {"value": 2.0}}, "resolved")
    assert made.size == 3
    assert made.levels == [1]  # the list itself, as the constructor expects
    assert isinstance(made.weight, Schedule)
    for table, words in [
        ({}, "resolved needs its option 'size'"),
        ({"size": 3, "leves": [1]}, "resolved has no option 'leves'; did you mean 'levels'?"),
        ({"size": "3"}, "resolved: size must be a whole number; found '3'"),
        ({"size": 3, "levels": [1.5]}, "resolved: levels[0] must be a whole number; found 1.5"),
        ({"size": 3, "weight": {"value": "x"}}, "resolved: weight.value must be a number"),
    ]:
        with pytest.raises(KDHooksError) as error:
            read(Resolved, table, "resolved")
        assert words in str(error.value)


def test_an_error_in_a_third_party_constructor_is_named() -> None:
    with pytest.raises(
        KDHooksError, match=r"signed can't be created with .* RuntimeError: a reason"
    ):
        read(Signed, {"size": 1, "mode": "bad"}, "signed")


def test_a_function_is_checked_in_every_step() -> None:
    sample = Sample(angle=lambda step: step - 1.0)
    assert callable(sample.angle)
    assert sample.angle(2) == 1.0
    with pytest.raises(
        KDHooksError, match=r"sample: angle in step 0 must be at least 0 .* found -1"
    ):
        sample.angle(0)
    words = Sample(angle=lambda step: "x")  # type: ignore[arg-type, return-value]
    assert callable(words.angle)
    with pytest.raises(KDHooksError, match="sample: angle in step 4 must be a number; found 'x'"):
        words.angle(4)


def test_a_class_is_not_accepted_as_a_function() -> None:
    with pytest.raises(KDHooksError, match="found the class TinyFaceNet"):
        Sample(angle=TinyFaceNet)  # type: ignore[arg-type]


def test_a_tensor_option_counts_as_given() -> None:
    assert Sample(rows=torch.zeros(2, 3)).has("rows")
