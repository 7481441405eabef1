"""What every check works with: a model, tokens to feed, and answers to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ..array import to_numpy
from ..errors import SteersmanError
from ..model import PAD, Capability, Forward, IntArray, Model, Output, Session
from .report import Floats, Measure, Meter

TEXT = """\
The lighthouse on the northern point was built in 1871, after three ships were lost in a single
winter. Its keeper climbed 142 steps every evening to wind the clockwork, trim the wick and write
the weather into a heavy book: wind, visibility, the names of passing vessels. When electricity came
the steps were still climbed, although less often, and the book grew thinner. Today a computer in a
town forty kilometres away switches the lamp on and off, and nobody has written anything down since
the last keeper retired. Yet on clear nights people walk out along the wall, sit on the warm stones,
and count the seconds between two flashes, as their grandparents did: one, two, three, four, five.
"""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """A check before it is run.

    Attributes
    ----------
    name, title : str
        As in :class:`~.report.Check`.
    needs : Capability
        Skipped unless the model offers all of these.
    run : callable
        Feeds the model and reports to a meter.
    measure : Measure
        What the check's figure is.
    invariance : bool
        As in :func:`~.report.bound_for`.
    """

    name: str
    title: str
    needs: Capability
    run: Callable[[Probe, Meter], None]
    measure: Measure = "logits"
    invariance: bool = True


class Probe:
    """A model under test with a fixed text.

    Parameters
    ----------
    model : Model
    text : str
        Real text; where the tokenizer has no ids for it, fixed random ids stand in.
    length : int
        Tokens of the longest probe; the others take a dozen of them.
    """

    def __init__(self, model: Model, text: str, length: int) -> None:
        self.model = model
        self.length = min(length, model.info.context - 16)
        rng = np.random.default_rng(0)
        tokenizer = model.tokenizer
        special = tokenizer.special_ids
        plain = [i for i in range(min(model.info.vocab_size, 60000)) if i not in special]
        try:
            tokens = tokenizer.encode(text)
        except SteersmanError:  # a vocabulary that does not cover the text
            tokens = []
        if tokenizer.add_bos and tokenizer.bos_id is not None:
            tokens = [tokenizer.bos_id, *tokens]
        missing = max(0, self.length - len(tokens))
        tokens = tokens + [int(i) for i in rng.choice(plain, missing)]
        self.tokens: list[int] = [int(t) for t in tokens[: self.length]]
        # Tokens that do not continue the text: wrong drafts, other branches. Words of the text in
        # disorder, since after ids drawn from the whole vocabulary quantised models are all noise.
        words = sorted(set(self.tokens) - special)
        more = [int(i) for i in rng.choice(plain, 32)]
        self.other: list[int] = [*(int(i) for i in rng.permutation(words)), *more][:32]
        self.short = self.tokens[:12]
        everything = Capability.ALL_LOGITS in model.capabilities
        self.want: Literal["last", "all"] = "all" if everything else "last"
        self._fresh: dict[Any, Floats] = {}

    def open(
        self, needs: Capability = Capability.NONE, *, rows: int = 1, context: int | None = None
    ) -> Session:
        """Open a session with room for the longest probe."""
        room = min(self.length + 32, self.model.info.context)
        return self.model.session(max_rows=rows, needs=needs, context=context or room)

    def host(self, x: Any) -> Floats:
        """Return an owned copy on the host."""
        return np.array(to_numpy(x))

    def answers(self, out: Output, counts: Sequence[int]) -> list[Floats]:
        """Return the logits of each row: all of its new positions, or the last one."""
        logits = self.host(out.logits)
        if logits.ndim == 3:
            return [logits[b, :n] for b, n in enumerate(counts)]
        return [logits[b : b + 1] if n else logits[:0] for b, n in enumerate(counts)]

    def feed(
        self, session: Session, keep: Any, new: Sequence[Sequence[int]], **fields: Any
    ) -> list[Floats]:
        """Append ``new`` (ragged) after ``keep`` and return the logits of each row."""
        out = session.forward(
            Forward(keep=keep, tokens=pad(new), logits=self.want, **fields),
        )
        return self.answers(out, [len(row) for row in new])

    def fresh(
        self, tokens: Sequence[int], count: int, needs: Capability = Capability.NONE
    ) -> Floats:
        """Return the logits of the last ``count`` positions of ``tokens``, computed anew."""
        key = (tuple(tokens), count, needs)
        if key not in self._fresh:
            room = max(len(tokens), min(self.length + 32, self.model.info.context))
            with self.open(needs, context=room) as session:
                answer = self.feed(session, 0, [tokens])[0]
            self._fresh[key] = answer[len(answer) - min(count, len(answer)) :].copy()
        return self._fresh[key]

    def forget(self) -> None:
        """Drop remembered answers (they are large)."""
        self._fresh.clear()


def pad(rows: Sequence[Sequence[int]]) -> IntArray:
    """Return ragged rows as an int array (B, n), right-padded with -1."""
    width = max((len(row) for row in rows), default=0)
    out = np.full((len(rows), width), PAD, np.int64)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
