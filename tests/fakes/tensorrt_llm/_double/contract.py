"""Calls are checked against contract.json: unknown, missing and doubly given arguments, types, enumerations.

One checker for all classes and functions. It is stricter than the library in one way: pydantic turns "8" and True into
numbers, and plain functions look at no types at all; here only what the contract says goes through.
"""

from __future__ import annotations

import ast
import copy
import enum
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

ENTRIES: dict[str, dict[str, Any]] = json.loads((Path(__file__).parents[1] / "contract.json").read_text())
REQUIRED = "<required>"

records: dict[str, type[Record]] = {}  # the classes that a type in the contract may name
enumerations: dict[str, type[enum.Enum]] = {}


class ValidationError(ValueError):
    """Stands for pydantic's, which is a ValueError, too."""


class Parameter(NamedTuple):
    name: str
    type: str
    default: Any
    kind: str

    @property
    def is_positional(self) -> bool:
        return self.kind == "positional_or_keyword"

    def new_default(self) -> Any:
        if isinstance(self.default, str) and self.default.endswith("()"):
            made = records.get(self.default[:-2])
            return made() if made else None
        if self.type in enumerations:
            return enumerations[self.type][self.default]
        return copy.copy(self.default)


def parameters(name: str) -> dict[str, Parameter]:
    return {row[0]: Parameter(*row) for row in ENTRIES[name].get("parameters", ())}


def bind(name: str, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, defaults filled in. What the entry passes on ("extra": "keep") is among them."""
    entry, known = ENTRIES[name], parameters(name)
    error = ValidationError if entry.get("pydantic") else TypeError
    positional = [parameter.name for parameter in known.values() if parameter.is_positional]
    if len(args) > len(positional):
        raise TypeError(f"{name}() takes {len(positional)} positional arguments but {len(args)} were given")
    given = dict(zip(positional, args, strict=False))
    if twice := given.keys() & kwargs.keys():
        raise TypeError(f"{name}() got multiple values for argument {min(twice)!r}")
    given.update(kwargs)
    for unknown in sorted(given.keys() - known.keys()):
        extra = entry.get("extra")
        if extra == "ignore":
            del given[unknown]
        elif extra != "keep":
            raise error(f"{name}() got an unexpected keyword argument {unknown!r}")
    if missing := [key for key, it in known.items() if it.default == REQUIRED and key not in given]:
        raise error(f"{name}() missing required argument: {missing[0]!r}")
    for key in given.keys() & known.keys():
        if not entry.get("unchecked"):
            given[key] = coerce(given[key], known[key].type, f"{name}({key})", error)
    return {**{key: it.new_default() for key, it in known.items() if key not in given}, **given}


def checked(name: str) -> Callable:
    """A function or method whose call is checked. Extra keywords arrive as such."""

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(**bind(name, args, kwargs))

        @functools.wraps(function)
        def call_bound(owner: Any, /, *args: Any, **kwargs: Any) -> Any:
            return function(owner, **bind(name, args, kwargs))

        code = function.__code__
        return call_bound if code.co_varnames[:1] in (("self",), ("cls",)) else call

    return decorate


def coerce(value: Any, type_: str, what: str, error: type[Exception] = ValidationError) -> Any:
    """`value`, or what pydantic makes of it: an enumeration's member of its string, a record of its dict."""
    for name, made in _choices(type_):
        if _fits(value, made):
            return value
        if error is not ValidationError:
            continue  # only pydantic converts
        if isinstance(value, str) and name in enumerations:
            try:
                return enumerations[name](value)
            except ValueError:
                continue
        if type(value) is dict and name in records:
            return records[name](**value)
        if type(value) is dict and name.endswith("Config"):
            return value  # a class of the library whose fields the contract does not know
    raise error(f"{what}: {value!r} is a {type(value).__name__}, which is not {type_}")


@functools.cache
def _parsed(type_: str) -> ast.expr:
    return ast.parse(type_, mode="eval").body


def _choices(type_: str) -> Iterator[tuple[str, ast.expr]]:
    """The alternatives of a type, each with its name."""
    waiting = [_parsed(type_)]
    while waiting:
        node = waiting.pop(0)
        if isinstance(node, ast.Subscript) and node.value.id == "Union":
            waiting[:0] = node.slice.elts
        elif isinstance(node, ast.Subscript) and node.value.id == "Optional":
            waiting[:0] = [ast.Constant(None), node.slice]
        else:
            yield ast.unparse(node), node


def _fits(value: Any, node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return value is None
    if isinstance(node, ast.Subscript):
        items = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        match node.value.id:
            case "Literal":
                return any(type(value) is type(item.value) and value == item.value for item in items)
            case "Optional":
                return value is None or _fits(value, items[0])
            case "Union":
                return any(_fits(value, item) for item in items)
            case "List":
                return type(value) is list and all(_fits(item, items[0]) for item in value)
            case "Set":
                return type(value) is set and all(_fits(item, items[0]) for item in value)
            case "Dict":
                return type(value) is dict and all(_fits(k, items[0]) and _fits(v, items[1]) for k, v in value.items())
    name = node.attr if isinstance(node, ast.Attribute) else node.id
    match name:
        case "object":
            return True
        case "int" | "bool" | "str":
            # The members of a string enumeration are strings; a bool is not a number, nor is numpy's int64.
            return type(value).__name__ == name or (name == "str" and isinstance(value, str))
        case "float":
            return type(value) in (int, float)
        case "Path":
            return isinstance(value, Path)
        case "Callable":
            return callable(value)
    return any(base.__name__ == name for base in type(value).__mro__)


class Record:
    """A class of fields: pydantic model or dataclass in the library, as the entry of its name says."""

    model_fields: dict[str, SimpleNamespace]

    def __init_subclass__(cls) -> None:
        records[cls.__name__] = cls
        fields = parameters(cls.__name__).values()
        cls.model_fields = {it.name: SimpleNamespace(annotation=it.type, default=it.default) for it in fields}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        for key, value in bind(type(self).__name__, args, kwargs).items():
            object.__setattr__(self, key, value)
        self._validate()

    def _validate(self) -> None:
        """What a class checks besides types."""

    def __setattr__(self, key: str, value: Any) -> None:
        entry = ENTRIES[type(self).__name__]
        if not entry.get("unchecked"):
            if key not in self.model_fields:
                error = ValueError if entry.get("pydantic") else AttributeError
                raise error(f'"{type(self).__name__}" object has no field "{key}"')
            value = coerce(value, self.model_fields[key].annotation, f"{type(self).__name__}.{key}")
        object.__setattr__(self, key, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    __hash__ = None

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{key}={value!r}' for key, value in vars(self).items())})"

    def model_dump(self, mode: str = "python") -> dict[str, Any]:
        return {key: dump(value, mode) for key, value in vars(self).items()}


def dump(value: Any, mode: str = "json") -> Any:
    if isinstance(value, Record):
        return value.model_dump(mode)
    if isinstance(value, enum.Enum):
        return value.value if mode == "json" else value
    return copy.copy(value)


class _IgnoringCase(enum.StrEnum):
    @classmethod
    def _missing_(cls, value: object) -> Any:
        return next((member for member in cls if str(value).lower() == member.value), None)


def enumeration(name: str) -> type[enum.StrEnum]:
    """A string enumeration of the contract, under its own name."""
    values = ENTRIES[name]["values"]
    base = enum.StrEnum if isinstance(values, list) else _IgnoringCase
    made = base(name, {value: value for value in values} if isinstance(values, list) else values)
    enumerations[name] = made
    return made
