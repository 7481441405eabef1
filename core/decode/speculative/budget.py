"""How much to draft: as much as makes tokens come faster on this engine, which may be nothing.

Checking ``n`` drafted tokens costs one call of ``1 + n`` positions. What that takes is measured on
the run itself, per model and width; how likely drafts are to be accepted is learned from what
became of earlier ones, those that were drafted but not asked about included. The width that
promises the most tokens per second wins, and plain decoding wins ties.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from weakref import WeakKeyDictionary

from ...model import Model

WIDTHS = (2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
"""Positions per call that are worth telling apart (the last confirmed token is one of them)."""

_SAMPLES = 9  # times that a width's median is taken over
_OPTIMISM = 0.1  # cost of a further position, in single steps, before anything is known
_FEARED = 0.5  # the same where the question is what a draft may lose
_FIRST = 4  # width of the first probe: wide enough to tell a slope from a fixed cost
_MARGIN = 1.02  # a draft must promise this much more than plain decoding
_STALE = 64  # drafting rounds after which a plain one refreshes what it costs
_SHARE = 0.02  # share of the time so far that speculation may have lost against plain decoding
_GRACE = 1.5  # plain steps that it may lose before any time has passed
_CAP = 1.25  # a call of n positions takes at most this much longer than n calls: all else is noise
_GAP = 8  # rounds until a width that looked too dear is tried again, at first; then twice as many
_HOPE = (
    1.3  # tokens per plain step that must be possible for that, if the engine is as quick as can be
)


class CostCurve:
    """Median seconds of a call by its number of positions. Safe to share between threads."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[float]] = {}
        self._points: tuple[tuple[int, float], ...] | None = None
        self._lock = threading.Lock()
        self._wait = self._gap = _GAP

    def observe(self, width: int, seconds: float) -> float:
        """Note that a call of ``width`` positions took ``seconds``, and return what counts of it.

        On a busy machine a single call may take many times its share; such outliers are cut.
        """
        plain = self.seconds(1)
        if width > 1 and plain is not None:
            seconds = min(seconds, _CAP * width * plain)
        with self._lock:
            self._wait -= 1
            self._samples.setdefault(width, deque(maxlen=_SAMPLES)).append(seconds)
            self._points = None
        return seconds

    def try_again(self) -> bool:
        """Return whether it is time to look again at what did not pay; more and more rarely."""
        with self._lock:
            if self._wait > 0:
                return False
            self._gap = min(2 * self._gap, 1024)
            self._wait = self._gap
            return True

    @property
    def widest(self) -> int:
        """The largest width measured so far; 0 when there is none."""
        return self.points[-1][0] if self.points else 0

    @property
    def points(self) -> tuple[tuple[int, float], ...]:
        """Measured widths and their seconds, made to rise with the width."""
        with self._lock:
            if self._points is None:
                high, points = 0.0, []
                for width in sorted(self._samples):
                    high = max(high, statistics.median_low(self._samples[width]))
                    points.append((width, high))
                self._points = tuple(points)
            return self._points

    def seconds(self, width: int) -> float | None:
        """Return what a call of ``width`` positions takes, None before anything is known.

        Between measured widths on the line through them, beyond the last on that of the last two.
        """
        points = self.points
        if not points:
            return None
        if len(points) == 1:
            only, cost = points[0]
            return cost * (1 + _OPTIMISM * (width - 1)) / (1 + _OPTIMISM * (only - 1))
        right = next((i for i, (w, _) in enumerate(points) if w >= width), len(points) - 1)
        (w0, c0), (w1, c1) = points[max(right, 1) - 1], points[max(right, 1)]
        return max(c0 + (c1 - c0) * (width - w0) / (w1 - w0), points[0][1])


_CURVES: WeakKeyDictionary[Model, dict[Hashable, CostCurve]] = WeakKeyDictionary()
_CURVES_LOCK = threading.Lock()


def curve_of(model: Model, kind: Hashable) -> CostCurve:
    """Return the curve of ``model`` in this process; it goes when the model does.

    ``kind`` tells calls apart that the engine treats differently (chains and trees).
    """
    with _CURVES_LOCK:
        return _CURVES.setdefault(model, {}).setdefault(kind, CostCurve())


class Rates:
    """How often what was expected came true, by kind of guess. Safe to share between threads.

    Older guesses count less: each new one shrinks the weight of those before by ``memory``.
    """

    def __init__(self, memory: float = 0.98) -> None:
        self._memory = memory
        self._sums: dict[Hashable, tuple[float, float]] = {}
        self._lock = threading.Lock()

    def observe(self, kind: Hashable, expected: float, happened: float) -> None:
        """Note a guess that should have come true with probability ``expected``."""
        with self._lock:
            before, came = self._sums.get(kind, (0.0, 0.0))
            self._sums[kind] = (
                before * self._memory + expected,
                came * self._memory + happened,
            )

    def rate(self, kind: Hashable, prior: float, weight: float = 2.0) -> float:
        """Return what came true per expected one; ``prior`` counts like ``weight`` of them."""
        before, came = self._sums.get(kind, (0.0, 0.0))
        return (came + prior * weight) / (before + weight)


class Budget:
    """The widths of one text, chosen round by round.

    It is not an immutable value: it holds what was learned, which changes how fast the text comes.
    Under the match rule it cannot change the text.

    Parameters
    ----------
    curve : CostCurve
    clock : callable
        Seconds; ``request.clock``.
    adaptive : bool
        False: always check the whole draft.
    """

    def __init__(
        self, curve: CostCurve, clock: Callable[[], float], *, adaptive: bool = True
    ) -> None:
        self.curve = curve
        self.adaptive = adaptive
        self._clock = clock
        self._entered: float | None = None
        self._width = 0
        self._plain_rounds = 0
        self._since_plain = 0
        self._took = 0.0
        self._elapsed = 0.0
        self._lost = 0.0

    def entered(self) -> None:
        """Note that an answer arrived; called first thing in a step.

        A round lasts from one answer to the next, so that the time a draft takes to make counts.
        """
        now = self._clock()
        self._took = 0.0
        if self._entered is not None and self._width:
            self._took = self.curve.observe(self._width, now - self._entered)
            self._elapsed += self._took
        self._entered = now

    def confirmed(self, tokens: int) -> None:
        """Note how many tokens the round confirmed that :meth:`entered` has just timed."""
        plain = self.curve.seconds(1)
        if self._width > 1 and plain is not None:
            self._lost += self._took - tokens * plain

    def asked(self, width: int) -> None:
        """Note that the next call has ``width`` positions; 0 for one that is not to be timed."""
        self._width = width
        if width == 1:
            self._plain_rounds += 1
            self._since_plain = 0
        elif width > 1:
            self._since_plain += 1

    @property
    def _slack(self) -> float:
        """Seconds that the text may still lose against plain decoding."""
        plain = self.curve.seconds(1) or 0.0
        return _SHARE * self._elapsed + _GRACE * plain - self._lost

    @property
    def floor(self) -> float:
        """The least mean probability of acceptance at which any width could pay; 1 if none can."""
        plain = self.curve.seconds(1)
        if not self.adaptive or plain is None:
            return 0.0
        if self.curve.widest <= 1:
            return _OPTIMISM
        if (self._relative(2, plain) - 1) * plain > self._slack:
            return 1.0
        widths = [w for w in WIDTHS if w <= max(_FIRST, 2 * self.curve.widest)]
        return min((self._relative(w, plain) - 1) / (w - 1) for w in widths)

    def choose(self, gains: Sequence[float]) -> int:
        """Return how many of the drafted tokens to check.

        Parameters
        ----------
        gains : sequence of float
            Probability that each drafted token will be accepted, in the order in which they would
            be asked about.
        """
        if not gains or not self.adaptive:
            return len(gains)
        plain = self.curve.seconds(1)
        if plain is None or self._plain_rounds < 2 or self._since_plain >= _STALE:
            return 0
        reach = max(_FIRST, 2 * self.curve.widest)
        slack = self._slack
        best, most, hopeful, hope = 0, _MARGIN, 0, _HOPE
        total, at, dear = 1.0, 0, False
        for width in sorted({*WIDTHS, len(gains) + 1}):
            if width > min(reach, len(gains) + 1):
                break
            total += sum(gains[at : width - 1])
            at = width - 1
            relative = self._relative(width, plain)
            # Were nothing accepted, the text would fall behind plain decoding by more than it may.
            feared = relative if self.curve.widest > 1 else 1 + _FEARED * (width - 1)
            dear = dear or (feared - 1) * plain > slack
            if not dear and total / relative > most:
                best, most = width - 1, total / relative
            guess = total / (1 + _OPTIMISM * (width - 1))
            if width <= _FIRST and guess > hope:
                hopeful, hope = width - 1, guess
        # What was measured may be out of date or an accident.
        if not best and hopeful and slack > plain and self.curve.try_again():
            return hopeful
        return best

    def _relative(self, width: int, plain: float) -> float:
        return (self.curve.seconds(width) or plain) / plain
