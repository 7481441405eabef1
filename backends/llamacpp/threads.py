"""How many CPU threads to use.

The engine's workers spin while they wait. One thread too many on a busy machine costs far more than
one too few: a starved worker holds all others up. So the default counts the physical cores that
this process may use and takes off what other programs are using right now.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil


def _busy() -> float:
    """Seconds of CPU time that the whole machine has spent on work."""
    times = psutil.cpu_times()
    return float(times.user + times.system + getattr(times, "nice", 0.0))


def _own() -> float:
    times = psutil.Process().cpu_times()
    return float(times.user + times.system)


def usable_cores() -> int:
    """Physical cores this process may use: affinity and container quotas count."""
    logical = psutil.cpu_count(logical=True) or 1
    physical = psutil.cpu_count(logical=False) or logical
    if hasattr(os, "sched_getaffinity"):
        allowed = len(os.sched_getaffinity(0))
        # Of hyper-threaded cores, the allowed logical ones count by their share.
        physical = min(physical, max(1, round(allowed * physical / logical)))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            physical = min(physical, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, physical)


@dataclass
class LoadMeter:
    """Measures how many cores other programs use between its creation and :meth:`others`."""

    _begun: float = field(default_factory=time.perf_counter)
    _machine: float = field(default_factory=_busy)
    _process: float = field(default_factory=_own)

    def others(self, *, at_least: float = 0.05) -> float:
        """Return the cores in use by other programs, on average since creation.

        Parameters
        ----------
        at_least : float
            Seconds to measure over; waits if less have passed (clock ticks are 10 ms).
        """
        left = at_least - (time.perf_counter() - self._begun)
        if left > 0:
            time.sleep(left)
        elapsed = time.perf_counter() - self._begun
        own = _own() - self._process
        return max(0.0, (_busy() - self._machine - own) / elapsed)


def choose_threads(wanted: int | None, meter: LoadMeter) -> tuple[int, str]:
    """Return the number of threads and a sentence that says why.

    ``wanted`` wins, then ``$STEERSMAN_THREADS`` (the front door reads it as well), then the
    physical cores that are free.
    """
    if wanted is not None:
        return wanted, f"{wanted}, as asked"
    value = os.environ.get("STEERSMAN_THREADS", "")
    if value.isdecimal() and int(value) > 0:
        return int(value), f"{value}, from STEERSMAN_THREADS"
    cores, others = usable_cores(), meter.others()
    chosen = max(1, cores - round(others))
    return chosen, f"{chosen}: {cores} physical cores, others use {others:.1f}"
