"""YAML that is only data: strict, bounded, and every value knows its line.

Files come from other people. So there are no aliases (a few lines of them can stand for billions
of values), no tags, no duplicate keys, and limits on size, depth and number of values, all checked
on the flat event stream before anything is built.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml

from .errors import ProfileError, SteersmanError, did_you_mean
from .read_file import decoded, read_bytes

MAX_BYTES = 1 << 20
MAX_DEPTH = 12
MAX_VALUES = 20_000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# YAML 1.1 reads 1e-3 as text because the dot is missing; everyone means the number.
_EXPONENT = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+")
_TOO_DEEP = f"nested deeper than {MAX_DEPTH} levels"

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Document:
    """Values of a YAML file and where they stand.

    Attributes
    ----------
    data : dict, list, str, int, float, bool or None
    source : str
        Name for messages: the path as the person wrote it.
    lines : mapping of key path to line number (from 1)
        For mapping entries the line of the key.
    error_type : type
        Class of the errors that :meth:`error` raises.
    """

    data: Any
    source: str
    lines: Mapping[Key, int] = field(default_factory=dict)
    error_type: type[SteersmanError] = ProfileError

    def line(self, path: Key) -> int:
        """Return the line of ``path``, or of its nearest ancestor."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def error(self, path: Key, message: str) -> NoReturn:
        """Raise ``source:line: dotted.path: message``."""
        dotted = ".".join(str(part) for part in path)
        raise self.error_type(
            f"{self.source}:{self.line(path)}: {dotted + ': ' if dotted else ''}{message}"
        )

    def check_keys(self, path: Key, known: Iterable[str]) -> None:
        """Raise for the first key of the mapping at ``path`` that is not ``known``."""
        names = list(known)
        value = self.at(path)
        for key in value:
            if key not in names:
                self.error((*path, key), f"unknown key{did_you_mean(str(key), names)}")

    def at(self, path: Key) -> Any:
        """Return the value at ``path``."""
        value = self.data
        for part in path:
            value = value[part]
        return value


def read(path: str | Path, *, error_type: type[SteersmanError] = ProfileError) -> Document:
    """Read a YAML file.

    Raises
    ------
    MissingFile
        There is no such file.
    ProfileError (or ``error_type``)
        It cannot be read, is not UTF-8, is too large, or :func:`parse` refuses it.
    """
    source = str(path)
    raw = read_bytes(path, MAX_BYTES, error_type=error_type)
    text = decoded(raw, source, error_type=error_type)
    return parse(text.removeprefix("\ufeff"), source=source, error_type=error_type)


def parse(text: str, *, source: str, error_type: type[SteersmanError] = ProfileError) -> Document:
    """Read YAML text into plain values.

    Raises
    ------
    ProfileError (or ``error_type``)
        With source and line: a syntax error, several documents, an alias, an anchor, a tag, a
        duplicate or non-text key, or a limit of this module.
    """
    if len(text) > MAX_BYTES:
        raise error_type(f"{source}: larger than {MAX_BYTES} characters")
    try:
        _check_events(text, source, error_type)
        node = yaml.compose(text, Loader=_Loader)
        lines: dict[Key, int] = {}
        data = None if node is None else _build(node, (), lines, source, error_type)
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        line = mark.line + 1 if mark is not None else 1
        # From 6.0.4 on, PyYAML's parser stops at a depth of its own, often before the first event.
        if "nesting depth" in (exc.problem or ""):
            raise error_type(f"{source}:{line}: {_TOO_DEEP}") from None
        raise error_type(f"{source}:{line}: not valid YAML: {exc.problem}") from None
    except yaml.YAMLError as exc:
        said = " ".join(str(exc).split())
        raise error_type(f"{source}: not valid YAML: {said}") from None
    return Document(data, source, lines, error_type)


def _check_events(text: str, source: str, error_type: type[SteersmanError]) -> None:
    def refuse(event: Any, message: str) -> NoReturn:
        raise error_type(f"{source}:{event.start_mark.line + 1}: {message}")

    depth = values = documents = 0
    for event in yaml.parse(text, Loader=_Loader):
        if isinstance(event, yaml.AliasEvent):
            refuse(event, f"aliases (*{event.anchor}) are not allowed; write the value out")
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                refuse(event, "a second document (---) is not allowed")
        if isinstance(event, yaml.NodeEvent):
            values += 1
            if values > MAX_VALUES:
                refuse(event, f"more than {MAX_VALUES} values")
            if event.anchor is not None:
                refuse(event, f"anchors (&{event.anchor}) are not allowed; write the value out")
            tag = getattr(event, "tag", None)
            if tag is not None:
                refuse(event, f"tags ({tag}) are not allowed; write a plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                refuse(event, _TOO_DEEP)
        if isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _build(
    node: Any, path: Key, lines: dict[Key, int], source: str, error_type: type[SteersmanError]
) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if isinstance(node, yaml.SequenceNode):
        return [
            _build(child, (*path, i), lines, source, error_type)
            for i, child in enumerate(node.value)
        ]
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            at = key_node.start_mark.line + 1
            # The written text is the key, so that `no:` or `1:` never turn into something else.
            if not isinstance(key_node, yaml.ScalarNode):
                raise error_type(f"{source}:{at}: a key must be plain text")
            key = key_node.value
            if key_node.tag == "tag:yaml.org,2002:merge":
                raise error_type(f"{source}:{at}: merge keys (<<) are not allowed")
            if key in result:
                dotted = ".".join(str(p) for p in (*path, key))
                first = lines[(*path, key)]
                raise error_type(f"{source}:{at}: {dotted}: given twice (first on line {first})")
            lines[(*path, key)] = at
            result[key] = _build(value_node, (*path, key), lines, source, error_type)
        return result
    value = _scalar(node.value, node.tag, f"{source}:{line}", error_type)
    return number(value) if isinstance(value, str) and not node.style else value


def _scalar(text: str, tag: str, where: str, error_type: type[SteersmanError]) -> Any:
    # ``tag`` is what YAML resolved the scalar to; a quoted one is always text.
    kind = tag.rsplit(":", 1)[-1]
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() in ("yes", "true", "on")
    try:
        if kind == "int":
            return int(text.replace("_", ""), 0) if not re.match(r"[-+]?0\d", text) else int(text)
        if kind == "float":
            plain = text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan")
            value = float(plain)
            if math.isnan(value):
                raise error_type(f"{where}: {text}: not a number is not allowed")
            return value
    except ValueError:
        return text  # 1:30 and the like: YAML 1.1 reads base 60, a person reads text
    return text


def parse_scalar(text: str, *, source: str) -> Any:
    """Return the value of one setting written on the command line (``0.5``, ``true``, ``[a, b]``).

    Text that is no valid YAML is taken as text.
    """
    try:
        return parse(text, source=source).data
    except ProfileError:
        return text


def number(text: str) -> str | float:
    """Return ``1e-3`` and the like as a float; other text as it is."""
    return float(text) if _EXPONENT.fullmatch(text) else text
