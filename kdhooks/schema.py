"""The JSON Schema (draft 2020-12) of a recipe, for editors that complete and check TOML files."""

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args, get_origin

from kdhooks.discovery import load, methods
from kdhooks.errors import KDHooksError
from kdhooks.kinds import Bounds, Option, alternatives, is_list, items_of
from kdhooks.options import REQUIRED, Options, declared_options
from kdhooks.recipe import Recipe

Schema: TypeAlias = dict[str, Any]

_SIMPLE: Mapping[Any, Schema] = {
    bool: {"type": "boolean"},
    str: {"type": "string"},
    Path: {"type": "string", "pattern": r"\S"},
    Mapping: {"type": "object"},
    dict: {"type": "object"},
    Any: {},
    object: {},
}


def recipe_schema() -> Schema:
    """Return the schema of a recipe with all installed methods, after importing each of them."""
    schema = _of_class(Recipe)
    schema["properties"]["teacher"]["anyOf"][1]["minItems"] = 1  # of the list of teachers
    names = sorted({info.name for info in methods()})
    schema["properties"]["methods"] = {
        **schema["properties"]["methods"],
        "minItems": 1,
        "items": {"anyOf": [{"enum": names}, *map(_of_method, names)]},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A kdhooks recipe",
        **schema,
    }


def _of_method(name: str) -> Schema:
    """Return the schema of a method's table; it accepts any if the method cannot be imported."""
    const = {"const": name, "description": "The name of the method."}
    try:
        schema = _of_class(load(name))
    except KDHooksError as error:
        return {"type": "object", "properties": {"name": const}, "description": str(error)}
    schema["properties"] = {"name": const, **schema["properties"]}
    schema["required"] = ["name", *schema.get("required", ())]
    return schema


def _of_class(made: type, bounds: Bounds | None = None) -> Schema:
    """Return the schema of a table. bounds: those of its option, for the numbers in `bounded`."""
    bounded = made.bounded if bounds and issubclass(made, Options) else ()
    properties, required = {}, []
    for name, option in declared_options(made).items():
        schema = _of_option(option, bounds if name in bounded else None)
        if schema is not None:
            properties[name] = schema
        if option.default is REQUIRED:
            required.append(name)
    return {
        "type": "object",
        "description": (made.__doc__ or "").split("\n", 1)[0],
        "properties": properties,
        "required": required,
        "additionalProperties": False,
        **(made.rules if issubclass(made, Options) else {}),
    }


def _of_option(option: Option, bounds: Bounds | None) -> Schema | None:
    """Return the schema of an option; None if TOML cannot express its type."""
    found = [_of_kind(kind, bounds or option.bounds) for kind in alternatives(option.kind)]
    known = [schema for schema in found if schema is not None]
    if not known:
        return None
    schema = known[0] if len(known) == 1 else {"anyOf": known}
    unit = f" In {option.unit}." if option.unit else ""
    if option.meaning:
        schema = {**schema, "description": f"{option.meaning}{unit}"}
    if isinstance(option.default, bool | int | float | str):
        schema = {**schema, "default": option.default}
    return schema


def _of_kind(kind: Any, bounds: Bounds) -> Schema | None:
    origin = get_origin(kind)
    if (origin or kind) in _SIMPLE:
        return dict(_SIMPLE[origin or kind])
    if kind in (int, float):
        return {"type": "integer" if kind is int else "number", **_of_bounds(bounds)}
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if is_list(kind):
        return _of_list(kind, bounds)
    if origin is None and isinstance(kind, type) and issubclass(kind, Options):
        return _of_class(kind, bounds)
    if kind is types.NoneType or origin is not None or isinstance(kind, type):
        return None  # an object that exists only in Python
    return {}


def _of_list(kind: Any, bounds: Bounds) -> Schema:
    inner, fixed = items_of(kind)
    items = [_of_kind(one, bounds) or {} for one in inner]
    if not fixed:
        return {"type": "array", "items": items[0]}
    count = len(items)
    return {"type": "array", "prefixItems": items, "minItems": count, "maxItems": count}


def _of_bounds(bounds: Bounds) -> Schema:
    named = {
        "minimum": bounds.least,
        "exclusiveMinimum": bounds.above,
        "maximum": bounds.most,
        "exclusiveMaximum": bounds.below,
    }
    return {key: bound for key, bound in named.items() if bound is not None}
