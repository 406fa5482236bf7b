"""Converts frozen dataclasses to JSON and back; checks name and type of every field."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from typing import Any, Literal

Kinds = dict[str, type]


def require(condition: bool, name: str, must: str, got: object, remedy: str = "") -> None:
    """Raises ValueError("<name> must be <must>, got <got>") unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} must be {must}, got {got!r:.300}" + (f"; {remedy}" if remedy else ""))


def require_fraction(owner: object, *names: str) -> None:
    """Raises ValueError unless the named fields of a dataclass are in [0, 1]."""
    for name in names:
        value = getattr(owner, name)
        require(0.0 <= value <= 1.0, f"{type(owner).__name__}: {name}", "a fraction of the run in [0, 1]", value)


def encode(value: Any, kinds: Kinds) -> Any:
    """A dataclass as JSON types.

    Args:
        value: dataclass, list, tuple or JSON value.
        kinds: kind -> dataclass, for dataclasses whose JSON has a key "kind".
    """
    if dataclasses.is_dataclass(value):
        tag = [("kind", name) for name, kind in kinds.items() if type(value) is kind]
        return dict(tag) | {item.name: encode(getattr(value, item.name), kinds) for item in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item, kinds) for item in value]
    return value


def decode(annotation: Any, value: Any, where: str, kinds: Kinds) -> Any:
    """The inverse of `encode`, checked against a type annotation.

    Args:
        annotation: type to build.
        value: JSON value.
        where: dotted name of the field, for messages.
        kinds: as in `encode`.
    Raises: ValueError.
    """
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(typing.get_args(annotation), value, where, kinds)
    choices = {name: kind for name, kind in kinds.items() if _is_below(kind, annotation)}
    if choices and annotation not in kinds.values():
        known = isinstance(value, dict) and value.get("kind") in choices
        require(known, where, f"a method, kind one of {list(choices)}", value, "a user's own must be imported first")
        return _decode_dataclass(choices[value["kind"]], value, where, kinds)
    if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
        return _decode_dataclass(annotation, value, where, kinds)
    if origin is tuple:
        require(isinstance(value, (list, tuple)), where, "a list", value)
        arguments = typing.get_args(annotation)
        items = arguments[:1] * len(value) if arguments[-1:] == (...,) else arguments
        require(len(items) == len(value), where, f"a list of {len(items)}", value)
        return tuple(decode(kind, item, f"{where}[{i}]", kinds) for i, (kind, item) in enumerate(zip(items, value)))
    if origin is Literal:
        require(value in typing.get_args(annotation), where, f"one of {typing.get_args(annotation)}", value)
        return value
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) <= sys.float_info.max, where, "a number below 2e308", f"{value.bit_length()} bits")
        return float(value)
    if isinstance(annotation, type):
        right = isinstance(value, annotation) and not (isinstance(value, bool) and annotation is not bool)
        require(right, where, annotation.__name__, value)
    return value


def _is_below(kind: type, annotation: Any) -> bool:
    return isinstance(annotation, type) and kind is not annotation and issubclass(kind, annotation)


def _decode_union(choices: tuple, value: Any, where: str, kinds: Kinds) -> Any:
    if value is None:
        require(type(None) in choices, where, "given", value)
        return None
    present = [choice for choice in choices if choice is not type(None)]
    for choice in present[:-1]:
        try:
            return decode(choice, value, where, kinds)
        except ValueError:
            continue
    return decode(present[-1], value, where, kinds)


def _decode_dataclass(kind: type, values: Any, where: str, kinds: Kinds) -> Any:
    require(isinstance(values, dict), where, "an object", values)
    if kind in kinds.values() and kinds.get(values.get("kind")) is kind:  # the JSON has a key "kind"
        values = {key: value for key, value in values.items() if key != "kind"}
    hints = typing.get_type_hints(kind)
    names = [item.name for item in dataclasses.fields(kind)]
    unknown = sorted(set(values) - set(names))
    require(not unknown, where, f"made of the fields of {kind.__name__}", unknown, "written by another version?")
    missing = sorted(set(names) - set(values))
    require(not missing, where, f"complete, with {missing}", sorted(values), "written by another version?")
    return kind(**{name: decode(hints[name], values[name], f"{where}.{name}", kinds) for name in names})
