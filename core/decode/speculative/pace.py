"""How many drafts a draft model makes, and how long: what this engine's speed makes worthwhile.

A round of ``k`` drafts of ``n`` tokens costs ``n`` calls of the draft model and one call of the
target. What rounds take is measured on the run itself, per pair of models, ``k`` and ``n``, with
plain decoding as ``n = 0`` (:mod:`.budget`). How far drafts get is learned from the probability of
acceptance, which the rule knows at every position it decides, also for a single draft.
"""

from __future__ import annotations

from collections.abc import Callable

from ...model import Model
from .budget import Rates, curve_of

_PRIOR = 0.7  # probability of acceptance before anything is known
_DEEP = 8  # positions of a draft that are told apart
_MARGIN = 1.02  # a draft must promise this much more than plain decoding
_STALE = 64  # drafting rounds after which a plain one refreshes what it costs
_SHARE = 0.02  # share of the time so far that drafting may have lost against plain decoding
_GRACE = 1.5  # plain steps that it may lose before any time has passed
_NEAR = 3  # tokens that the draft model has not read at the usual beginning of a round, at most


class Pace:
    """The drafts of one text, chosen round by round.

    Like :class:`.budget.Budget` it holds what was learned, and is no immutable value. Lengths are
    tried from short to long, each time at most twice the longest so far.

    Parameters
    ----------
    target, draft : Model
    clock : callable
        Seconds; ``request.clock``.
    drafts, length : int
        Most drafts per round, and most tokens per draft.
    adaptive : bool
        False: always as many and as long as may be.
    """

    def __init__(
        self,
        target: Model,
        draft: Model,
        clock: Callable[[], float],
        *,
        drafts: int,
        length: int,
        adaptive: bool,
    ) -> None:
        self.drafts = drafts
        self.length = length
        self.adaptive = adaptive
        self._clock = clock
        info = draft.info
        pair = (info.name, info.backend, info.dtype, info.layers, info.fingerprint)
        self._rates = Rates()
        self._curves = {k: curve_of(target, ("draft", *pair, k)) for k in sorted({1, drafts})}
        self._feeding = curve_of(draft, "feed")
        self._behind = 1
        self._entered: float | None = None
        self._round = (1, -1)  # drafts and length of the round that goes on; -1: not to be timed
        self._took = 0.0
        self._plain_rounds = 0
        self._since_plain = 0
        self._elapsed = 0.0
        self._lost = 0.0

    def answered(self) -> None:
        """Note that the target's answer arrived; called first thing in a step."""
        now = self._clock()
        drafts, length = self._round
        if self._entered is not None and length >= 0:
            self._took = now - self._entered
            self._elapsed += self._took
            for k, curve in self._curves.items():
                if length == 0 or (k == drafts and self._behind <= _NEAR):
                    curve.observe(1 + length, self._took)
        self._entered = now

    def fed(self) -> None:
        """Note that the draft model has read what it had not seen of the text."""
        if self._entered is not None:
            self._feeding.observe(self._behind, self._clock() - self._entered)

    def confirmed(self, tokens: int) -> None:
        """Note how many tokens the round confirmed that has just ended."""
        plain = self._curves[1].seconds(1)
        if self._round[1] > 0 and plain is not None:
            self._lost += self._took - tokens * plain

    def saw(self, drafts: int, depth: int, chance: float, single: float) -> None:
        """Note one decision among drafts.

        Parameters
        ----------
        drafts : int
            Drafts of the round; fewer may still have been alive.
        depth : int
            Place of the token in the drafts, from 0.
        chance, single : float
            Probability that one of the drafts, and that a single one, is accepted here.
        """
        if drafts > 1:
            self._rates.observe((drafts, min(depth, _DEEP)), 1.0, chance)
        self._rates.observe(1, 1.0, single)

    def choose(self, *, nodes: int, depth: int, behind: int) -> tuple[int, int]:
        """Return how many drafts to make and how long; a length of 0 is plain decoding.

        Parameters
        ----------
        nodes : int
            Most drafted tokens in all: what the context leaves.
        depth : int
            Most tokens of one draft: what is still wanted of the text.
        behind : int
            Tokens of the text that the draft model has not read. After plain rounds there are
            many, and reading them costs time before the first token is drafted.
        """
        self._behind = behind
        if not self.adaptive:
            return self.drafts, min(self.length, depth, nodes // self.drafts)
        plain = self._curves[1].seconds(1)
        if plain is None or self._plain_rounds < 2 or self._since_plain >= _STALE:
            return 1, 0
        slack = _SHARE * self._elapsed + _GRACE * plain - self._lost - self._catching_up(plain)
        best, most = (1, 0), _MARGIN
        for k, curve in self._curves.items():
            if k > 1 and self._curves[1].widest <= 1:
                break  # the cheapest way to learn what drafts cost comes first
            reach = min(self.length, depth, nodes // k, max(1, 2 * (curve.widest - 1)))
            chance, total = 1.0, 1.0
            for n in range(1, reach + 1):
                kind = 1 if k == 1 else (k, min(n - 1, _DEEP))
                chance *= self._rates.rate(kind, _PRIOR)
                total += chance
                cost = self._cost(k, n, plain)
                # Were nothing accepted, the text would fall behind plain decoding by this much.
                if (cost - 1) * plain > slack:
                    break
                if total / cost > most:
                    best, most = (k, n), total / cost
        if best[1] or not min(depth, nodes):
            return best
        # What was measured may be out of date or an accident.
        curve = self._curves[1]
        known = curve.seconds(2) or plain
        return (1, 1) if slack > max(plain, known - plain) and curve.try_again() else best

    def _cost(self, drafts: int, length: int, plain: float) -> float:
        """Return what a round costs, in plain steps."""
        curve = self._curves[drafts]
        if curve.widest > 1 or drafts == 1:
            return (curve.seconds(1 + length) or plain) / plain
        # Not tried yet: as if nothing were gained by doing it at once.
        single = (self._curves[1].seconds(1 + length) or plain) / plain
        return 1 + drafts * (single - 1)

    def _catching_up(self, plain: float) -> float:
        """Return the seconds that a round takes longer because the draft model is behind."""
        near = min(self._behind, _NEAR - 1)
        then, now = self._feeding.seconds(self._behind), self._feeding.seconds(near)
        if then is None or now is None or self._feeding.widest <= 1:
            return plain * (self._behind - near)  # as if it were as slow as the target
        return max(then - now, 0.0)

    def asked(self, drafts: int, length: int) -> None:
        """Note what the next round does; a length below 0 is a round that is not to be timed."""
        self._round = (drafts, length)
        if length == 0:
            self._plain_rounds += 1
            self._since_plain = 0
        elif length > 0:
            self._since_plain += 1
