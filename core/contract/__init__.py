"""The checks that every model on every engine must pass, and the comparison of two engines.

A check opens sessions of its own on a loaded model, asks the same thing in two ways, and measures
how far the answers differ: in one call or in pieces, alone or in a batch, as a draft tree or as
chains. How far they may differ is in one table (:mod:`.report`). Nothing here knows an engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from ..errors import UsageError, did_you_mean
from ..model import Model
from . import cache, safety, tokens, trees, whitebox
from .parity import Parity, compare_models, parity_checks
from .probe import TEXT, Probe, Spec
from .report import Bound, Check, Meter, bound_for

__all__ = [
    "CHECKS",
    "TEXT",
    "Bound",
    "Check",
    "Parity",
    "bound_for",
    "compare_models",
    "parity_checks",
    "run_contract",
]

CHECKS: dict[str, Spec] = {
    spec.name: spec
    for spec in (
        *cache.CHECKS,
        *trees.CHECKS,
        *whitebox.CHECKS,
        *tokens.CHECKS,
        *safety.CHECKS,
    )
}


def run_contract(
    model: Model,
    *,
    text: str = TEXT,
    length: int = 96,
    only: Collection[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Check]:
    """Check a loaded model against the contract of :mod:`steersman.core.model`.

    Parameters
    ----------
    model : Model
        Left open; sessions opened on it are closed again.
    text : str
        What to feed; some 100 tokens of plain prose.
    length : int
        Tokens of the longest probe, 32 or more.
    only : collection of str, optional
        Names of the checks to run; all if None.
    progress : callable, optional
        Called before each check with its title, its index and the number of checks.

    Returns
    -------
    list of Check
        One per check, in a fixed order; skipped where the model lacks the capability. An exception
        inside a check is a failure of that check.

    Raises
    ------
    UsageError
        A name in ``only`` is unknown, or ``length`` is too small.
    """
    if length < 32:
        raise UsageError(f"run_contract: length must be at least 32, got {length}")
    names = list(CHECKS) if only is None else list(only)
    for name in names:
        if name not in CHECKS:
            raise UsageError(f"check {name!r}: unknown{did_you_mean(name, CHECKS)}")
    probe = Probe(model, text, length)
    found = []
    for i, name in enumerate(names):
        if progress:
            progress(CHECKS[name].title, i, len(names))
        found.append(_run(CHECKS[name], probe))
    return found


def _run(spec: Spec, probe: Probe) -> Check:
    about = {"name": spec.name, "title": spec.title, "capability": spec.needs}
    missing = spec.needs & ~probe.model.capabilities
    if missing:
        lacks = f"the model does not offer {', '.join(missing.names())}"
        return Check(**about, result="skipped", detail=lacks)  # type: ignore[arg-type]
    meter = Meter(bound_for(probe.model.info, invariance=spec.invariance), spec.measure)
    begin = time.perf_counter()
    try:
        spec.run(probe, meter)
    except Exception as error:  # whatever an adapter raises is the check's finding
        meter.holds(False, f"{type(error).__name__}: {error}")
    finally:
        probe.forget()
    seconds = time.perf_counter() - begin
    return Check(**about, **meter.verdict(), seconds=seconds)  # type: ignore[arg-type]
