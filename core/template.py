"""Chat templates in a closed room: Jinja without Python's internals, and with limits on its work.

A template comes with a model file, so it is untrusted. It runs in Jinja's immutable sandbox (see
CVE-2024-34359 for what happens without), reaches only plain values and a list of harmless string
methods, and every loop, call, operator and output counts against a budget of steps, time and size,
so that a hostile one ends in an error instead of a hanging or swollen process.
"""

from __future__ import annotations

import datetime as dt
import functools
import json
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, Mapping, ValuesView
from contextvars import ContextVar
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_environment
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import InvalidInput

MAX_TEMPLATE = 1 << 17  # characters
MAX_STEPS = 200_000
MAX_SECONDS = 3.0
MAX_SIZE = 1 << 22  # characters and elements of any one value, plus 16 times what was put in
MAX_DEPTH = 60
MAX_RANGE = 10_000
MAX_BITS = 1 << 12

_STR_METHODS = frozenset(
    ["strip", "lstrip", "rstrip", "split", "rsplit", "splitlines", "partition", "rpartition"]
    + ["startswith", "endswith", "removeprefix", "removesuffix", "find", "rfind", "index"]
    + ["rindex", "count", "replace", "join", "lower", "upper", "title", "capitalize", "casefold"]
    + ["swapcase", "isalpha", "isdigit", "isdecimal", "isnumeric", "isalnum", "isspace"]
    + ["islower", "isupper", "istitle", "isascii"]
)
_CONTAINER_METHODS = {
    dict: frozenset(["items", "keys", "values", "get"]),
    list: frozenset(["index", "count"]),
    tuple: frozenset(["index", "count"]),
}
# Filters that make much out of little, or reach attributes; no chat template needs them.
_NO_FILTERS = frozenset(
    ["attr", "batch", "center", "pprint", "random", "slice", "striptags", "sum", "urlize"]
    + ["wordwrap", "xmlattr"]
)
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(?:\d{3}|\*)")


class TemplateLimit(Exception):
    """A template did too much."""


class TemplateRefusal(Exception):
    """A template called ``raise_exception``: it does not accept these messages."""


class _Budget:
    """What one rendering may still do."""

    def __init__(self, variables: Mapping[str, Any]) -> None:
        self.steps = MAX_STEPS
        self.deadline = time.monotonic() + MAX_SECONDS
        # Weighed once: a template may ask for the number of messages at every turn of its loop.
        self._variables = variables  # held, so that their ids stay theirs
        self._given: dict[int, int] = {}
        given = sum(_weigh(value, self._given, {}, 0) for value in variables.values())
        self.size = MAX_SIZE + 16 * given

    def tick(self) -> None:
        self.steps -= 1
        if self.steps < 0:
            raise TemplateLimit(f"more than {MAX_STEPS} steps")
        if time.monotonic() > self.deadline:
            raise TemplateLimit(f"longer than {MAX_SECONDS:g} s")

    def allow(self, size: int) -> None:
        if size > self.size:
            raise TemplateLimit(f"a value of more than {self.size} characters")

    def weigh(self, *values: Any) -> int:
        """Return about how many characters values make when written out, shared parts included."""
        return _weigh(values, {}, self._given, 0)

    def measure(self, *values: Any) -> None:
        """Refuse values that are too large."""
        self.allow(self.weigh(*values))


def _weigh(value: Any, known: dict[int, int], given: Mapping[int, int], depth: int) -> int:
    if isinstance(value, str):
        return len(value) + 1
    if isinstance(value, int):
        if value.bit_length() > MAX_BITS:
            raise TemplateLimit(f"a number of more than {MAX_BITS} bits")
        return 1 + value.bit_length() // 3
    key = id(value)  # lasting: whatever is weighed here is held by a variable or an argument
    if isinstance(value, Namespace):
        value = value._Namespace__attrs
    parts: Iterable[Any]
    if isinstance(value, (Mapping, ItemsView)):
        pairs = value.items() if isinstance(value, Mapping) else value
        parts = (part for pair in pairs for part in pair)
    elif isinstance(value, (list, tuple, set, frozenset, KeysView, ValuesView)):
        parts = value
    else:
        return 1
    if key in given:
        return given[key]
    if key not in known:
        if depth > MAX_DEPTH:
            raise TemplateLimit(f"values nested deeper than {MAX_DEPTH}")
        known[key] = -1
        known[key] = 1 + sum(_weigh(part, known, given, depth + 1) for part in parts)
    elif known[key] < 0:
        raise TemplateLimit("a value that contains itself")
    return known[key]


_budget: ContextVar[_Budget] = ContextVar("budget")


def _spend(*values: Any) -> _Budget:
    budget = _budget.get()
    budget.tick()
    budget.measure(*values)
    return budget


def _check_replace(budget: _Budget, text: str, old: str, new: str) -> None:
    places = text.count(old) if old else len(text) + 1
    budget.allow(len(text) + places * len(new))


def _check_format(budget: _Budget, form: str) -> None:
    if _WIDE_FORMAT.search(form):
        raise TemplateLimit("a format of more than 99 characters")


def _concat(parts: Iterable[Any]) -> str:
    budget = _budget.get()
    out, size = [], 0
    for part in parts:
        size += len(part)
        budget.allow(size)
        out.append(part)
    return "".join(out)


class _Guards(NodeTransformer):
    """Puts a check into every loop and macro, and around every concatenation and literal."""

    def _call(self, name: str, node: nodes.Node, args: list[nodes.Expr]) -> nodes.Call:
        function = nodes.EnvironmentAttribute(name, lineno=node.lineno)
        return nodes.Call(function, args, [], None, None, lineno=node.lineno)

    def _counted(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        tick = nodes.ExprStmt(self._call("guard_step", node, []), lineno=node.lineno)
        node.body.insert(0, tick)
        return node

    visit_For = visit_Macro = visit_CallBlock = _counted

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return self._call("guard_concat", node, node.nodes)

    def _measured(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        if getattr(node, "ctx", "load") != "load":
            return node
        return self._call("guard_value", node, [node])

    visit_List = visit_Tuple = visit_Dict = _measured


class _Generation(Extension):
    """``{% generation %}``: marks what the assistant wrote; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own way to declare it

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return body


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with guards."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    concat = staticmethod(_concat)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        guarded: nodes.Template = _Guards().visit(tree)
        return guarded

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Allow public attributes of plain values only."""
        if isinstance(obj, str):
            return attr in _STR_METHODS
        for kind, methods in _CONTAINER_METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        plain = isinstance(obj, (LoopContext, Namespace, Macro, jinja2.Undefined))
        return plain and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Leave ``str.format`` to ``is_safe_attribute``, which refuses it: widths have no bound."""

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = _spend(*args, *kwargs.values())
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(owner, str):
            if name == "replace" and len(args) > 1:
                _check_replace(budget, owner, str(args[0]), str(args[1]))
            elif name == "join" and args:
                parts = list(args[0])
                budget.measure(parts)
                budget.allow(len(owner) * len(parts))
                args = (parts,)
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right`` unless the result is too large."""
        budget = _spend(left, right)
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * abs(right) > MAX_BITS:
                raise TemplateLimit(f"a number of more than {MAX_BITS} bits")
        elif operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, (str, list, tuple)) and isinstance(times, int):
                    budget.allow(budget.weigh(value) * max(times, 0))
        elif operator == "%" and isinstance(left, str):
            _check_format(budget, left)
        result = super().call_binop(context, operator, left, right)
        budget.measure(result)
        return result

    # What the guards in a template call.

    def guard_step(self) -> None:
        """Count one turn of a loop or one macro call; the call itself is counted in ``call``."""

    def guard_value(self, value: Any) -> Any:
        """Measure a literal; ``call`` did it."""
        return value

    def guard_concat(self, *parts: Any) -> str:
        """Join values as ``~`` does; ``call`` measured them."""
        return "".join(map(str, parts))


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        # Filters that ask for it get the environment or the context first; those weigh nothing.
        budget = _spend(*args, *kwargs.values())
        values = [a for a in args if not isinstance(a, (jinja2.Environment, nodes.EvalContext))]
        if name == "replace" and len(values) > 2:
            _check_replace(budget, str(values[0]), str(values[1]), str(values[2]))
        elif name == "format":
            _check_format(budget, str(values[0]))
        elif name == "indent":
            width = kwargs.get("width", values[1] if len(values) > 1 else 4)
            budget.allow(len(str(width)) + len(str(values[0]).splitlines()) * _width(width))
        elif name == "join":
            glue = kwargs.get("d", values[1] if len(values) > 1 else "")
            parts = list(values[0])
            budget.measure(parts)
            budget.allow(len(str(glue)) * len(parts))
            args = tuple(parts if a is values[0] else a for a in args)
        result = function(*args, **kwargs)
        if isinstance(result, (str, list)):
            budget.measure(result)
        return result

    return run


def _width(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    return value if isinstance(value, int) and 0 <= value <= 64 else 1 << 62


def _to_json(
    value: Any,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
    ensure_ascii: bool = False,
) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateLimit("tojson with an indent beyond 16")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _refuse(message: Any) -> NoReturn:
    raise TemplateRefusal(str(message))


def _strftime_now(form: str) -> str:
    if len(form) > 100 or re.search(r"\d", form):
        raise TemplateLimit("an unusual time format")
    return dt.datetime.now().strftime(form)


@pass_environment
def _finalize(environment: Any, value: Any) -> Any:
    _spend(value)
    return value


@functools.lru_cache(maxsize=1)
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        # Constants must not be computed while compiling, where no budget counts.
        optimized=False,
        finalize=_finalize,
        cache_size=0,
    )
    for name in _NO_FILTERS:
        environment.filters.pop(name)
    environment.filters["tojson"] = _to_json
    environment.filters = {
        name: _guarded_filter(name, function) for name, function in environment.filters.items()
    }
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name)
    environment.globals["range"] = _range
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _range(*args: int) -> range:
    numbers = range(*args)
    if len(numbers) > MAX_RANGE:
        raise TemplateLimit(f"a range of more than {MAX_RANGE} numbers")
    return numbers


@functools.lru_cache(maxsize=8)
def _compile(source: str) -> jinja2.Template:
    return _environment().from_string(source)


def render_template(source: str, variables: Mapping[str, Any]) -> str:
    """Render a template with ``variables``, within the limits at the top of this module.

    Raises
    ------
    InvalidInput
        The template does not parse, does too much, reaches for what it must not, fails, or
        refuses the messages.
    """
    if len(source) > MAX_TEMPLATE:
        raise InvalidInput(f"chat template: {len(source)} characters (limit {MAX_TEMPLATE})")
    token = None
    try:
        token = _budget.set(_Budget(variables))
        return _compile(source).render(variables)
    except TemplateRefusal as error:
        raise InvalidInput(f"chat template refuses these messages: {_line(error)}") from None
    except TemplateLimit as error:
        raise InvalidInput(f"chat template does too much: {_line(error)}") from None
    except SecurityError as error:
        raise InvalidInput(f"chat template reaches for Python objects: {_line(error)}") from None
    except jinja2.TemplateSyntaxError as error:
        raise InvalidInput(f"chat template, line {error.lineno}: {_line(error)}") from None
    except RecursionError:
        raise InvalidInput("chat template does too much: nested too deeply") from None
    except Exception as error:  # whatever a template's arithmetic may raise
        raise InvalidInput(f"chat template fails: {_line(error)}") from None
    finally:
        if token is not None:
            _budget.reset(token)


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"
