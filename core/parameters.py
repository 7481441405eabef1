"""Parameters of stages and strategies: which a dataclass has, and values that fit their types."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence, Set
from typing import Any


class Mismatch(Exception):
    """A value that does not fit; the message says what was expected and what came."""


def parameters(cls: type[Any]) -> dict[str, Any]:
    """Return name and type of every field a person may set.

    Left out: ``chain``, fields that are no constructor argument, and those marked
    ``metadata={"hidden": True}``.
    """
    if not dataclasses.is_dataclass(cls):
        return {}
    try:
        hints = typing.get_type_hints(cls)
    except NameError:  # a type that is imported for checking only
        hints = {}
    return {
        f.name: hints.get(f.name, Any)
        for f in dataclasses.fields(cls)
        if f.init and f.name != "chain" and not f.metadata.get("hidden")
    }


def path_parameters(cls: type[Any]) -> tuple[str, ...]:
    """Return the fields that name a file beside the profile, marked ``metadata={"path": True}``."""
    if not dataclasses.is_dataclass(cls):
        return ()
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("path"))


def nested_strategies(cls: type[Any]) -> tuple[str, ...]:
    """Return the fields that hold another strategy, marked ``metadata={"strategy": True}``."""
    if not dataclasses.is_dataclass(cls):
        return ()
    return tuple(f.name for f in dataclasses.fields(cls) if f.metadata.get("strategy"))


def convert(value: Any, hint: Any, *, finite: bool = True) -> Any:
    """Return ``value`` (from YAML) as the type ``hint``; lists become tuples.

    Parameters
    ----------
    value : object
        None, bool, int, float, str, list or dict.
    hint : type
        None, bool, int, float, str, Literal, a union, tuple, list, Sequence, set, or a mapping.
    finite : bool
        Refuse infinities. They are allowed inside mappings (a bias of -inf bans a token).

    Raises
    ------
    Mismatch
        ``expected a number, got 'x'``.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return value
    if origin is typing.Annotated:
        return convert(value, args[0], finite=finite)
    if origin in (typing.Union, types.UnionType):
        return _union(value, args, finite)
    if origin is typing.Literal:
        if value in args and any(value is a or type(value) is type(a) for a in args):
            return value
        raise Mismatch(f"expected one of {', '.join(map(repr, args))}, got {_said(value)}")
    collection = origin if isinstance(origin, type) else hint
    if isinstance(collection, type) and not issubclass(collection, str | bytes):
        if issubclass(collection, Mapping):
            return _mapping(value, args)
        if issubclass(collection, Set | Sequence):
            return _list(value, collection, args, finite)
    return _scalar(value, hint, finite)


def _scalar(value: Any, hint: Any, finite: bool) -> Any:
    if hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif hint is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            try:
                number = float(value)
            except OverflowError:
                raise Mismatch("expected a number, got one that is too large") from None
            if finite and not math.isfinite(number):
                raise Mismatch(f"expected a finite number, got {value}")
            return number
    elif hint is str:
        if isinstance(value, str):
            return value
    elif hint is None or hint is type(None):
        if value is None:
            return None
    else:
        raise Mismatch(f"cannot be set in a profile (its type is {hint!r})")
    raise Mismatch(f"expected {describe(hint)}, got {_said(value)}")


def _union(value: Any, args: tuple[Any, ...], finite: bool) -> Any:
    problems = []
    # bool before int before float, so that true stays true and 3 stays 3.
    for hint in sorted(args, key=lambda a: {bool: 0, int: 1, float: 2}.get(a, 3)):
        try:
            return convert(value, hint, finite=finite)
        except Mismatch as exc:
            problems.append((hint, str(exc)))
    chosen = [(h, p) for h, p in problems if h is not type(None)]
    if len(chosen) == 1:
        raise Mismatch(chosen[0][1])
    raise Mismatch(f"expected {' or '.join(describe(a) for a in args)}, got {_said(value)}")


def _list(value: Any, collection: type[Any], args: tuple[Any, ...], finite: bool) -> Any:
    if not isinstance(value, list | tuple):
        raise Mismatch(f"expected a list, got {_said(value)}")
    if issubclass(collection, tuple) and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise Mismatch(f"expected {len(args)} values, got {len(value)}")
        hints = list(args)
    else:
        hints = [args[0] if args else Any] * len(value)
    items = []
    for i, (item, hint) in enumerate(zip(value, hints, strict=True)):
        try:
            items.append(convert(item, hint, finite=finite))
        except Mismatch as exc:
            raise Mismatch(f"item {i + 1}: {exc}") from None
    if issubclass(collection, Set):
        return frozenset(items)
    return items if issubclass(collection, list) else tuple(items)


def _mapping(value: Any, args: tuple[Any, ...]) -> Any:
    if not isinstance(value, Mapping):
        raise Mismatch(f"expected names and values, got {_said(value)}")
    key_hint, item_hint = args or (Any, Any)
    result = {}
    for key, item in value.items():
        try:
            kept = _key(key, key_hint)
            result[kept] = convert(item, item_hint, finite=False)
        except Mismatch as exc:
            raise Mismatch(f"{key}: {exc}") from None
    return result


def _key(key: Any, hint: Any) -> Any:
    """Keys of a file are text; where a number is wanted, read it."""
    kinds = typing.get_args(hint) or (hint,)
    if int in kinds and isinstance(key, str):
        try:
            return int(key)
        except ValueError:
            if str in kinds:
                return key
            raise Mismatch("expected a whole number as key") from None
    return key if key.__class__ in kinds or Any in kinds else convert(key, hint)


def describe(hint: Any) -> str:
    """Return words for a type."""
    words = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        None: "nothing",
        type(None): "nothing",
    }
    if hint in words:
        return words[hint]
    origin = typing.get_origin(hint)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return "names and values"
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return "a list"


def _said(value: Any) -> str:
    if isinstance(value, bool):
        written = "true" if value else "false"
        return f"{written} (text needs quotes: '{written}')"
    if value is None:
        return "nothing"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
