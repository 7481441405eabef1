"""Portable functions with faster twins for single libraries."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar, cast

from ..array import library_of

P = ParamSpec("P")
R = TypeVar("R")


class Native(Generic[P, R]):
    """A function on arrays whose first argument chooses the implementation.

    Attributes
    ----------
    portable : callable
        The form in plain array-API code: what runs on a library without a twin, and the oracle
        that tests compare the twins with.
    twins : dict of library name to callable
        Faster forms, by the top-level module of the array type ("numpy", "torch", "mlx").
    """

    def __init__(self, portable: Callable[P, R]) -> None:
        self.portable = portable
        self.twins: dict[str, Callable[P, R]] = {}
        functools.update_wrapper(self, portable)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        twin = self.twins.get(library_of(args[0]), self.portable)
        return twin(*args, **kwargs)

    def twin(self, *libraries: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
        """Register the decorated function as the form to use on ``libraries``."""

        def register(function: Callable[P, R]) -> Callable[P, R]:
            for library in libraries:
                self.twins[library] = function
            return function

        return register


def native(portable: Callable[P, R]) -> Native[P, R]:
    """Make ``portable`` a :class:`Native` function; register twins with ``@name.twin("torch")``."""
    return cast("Any", Native(portable))
