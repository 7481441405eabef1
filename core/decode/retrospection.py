"""A beam search that can go back: its moments, and how one of them is restored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ..model import PAD, Forward
from .beams import Beams, common, edit_to
from .overtrust import FloatRow
from .types import Request, Step, Token


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A candidate that is being tried: the beam it continues, and its score before the penalty."""

    beam: int
    token: Token
    score: float


@dataclass(frozen=True, kw_only=True)
class Moment:
    """All that must be restored to choose one position again.

    Attributes
    ----------
    beams : Beams
        Live texts, that hold as many tokens as positions were chosen, and ended ones.
    columns : tuple of float64 (n,)
        Log column scores of each live text.
    history : tuple of tuples of int
        For each live text, the column that stood out at every step.
    sources : tuple of int
        Place among the moment before of the text that each live one continues.
    """

    beams: Beams
    columns: tuple[FloatRow, ...]
    history: tuple[tuple[int, ...], ...]
    sources: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Where a search stands.

    Attributes
    ----------
    moments : tuple of Moment
        One per number of tokens, the present one last.
    probes : tuple of Probe
        What the rows of the last call were, in phase "probe".
    phase : str
        What the next answer is about: the prompt, candidates that are tried, texts that were
        restored, or the tokens chosen for them.
    excluded : mapping of position to pairs (beam, token)
        Choices that were taken back.
    rewinds : mapping of position to int
    calls : int
        Calls after the prompt.
    """

    request: Request
    moments: tuple[Moment, ...]
    probes: tuple[Probe, ...] = ()
    phase: Literal["prompt", "probe", "rewound", "chosen"] = "prompt"
    shown: tuple[Token, ...] = ()
    excluded: Mapping[int, frozenset[tuple[int, int]]] = field(default_factory=dict)
    rewinds: Mapping[int, int] = field(default_factory=dict)
    calls: int = 0

    @property
    def now(self) -> Moment:
        """The present moment."""
        return self.moments[-1]

    @property
    def position(self) -> int:
        """How many tokens the live texts hold: the position being chosen."""
        return len(self.moments) - 1

    def feed(self, *, rows: Sequence[int], tokens: Sequence[int]) -> Forward:
        """Return the call that appends one token to each of ``rows``, with its attention."""
        return Forward(
            keep=len(self.request.prompt) + self.position,
            tokens=np.array(tokens, np.int64)[:, None],
            rows=np.asarray(rows, np.int64),
            attentions=(self.request.models["target"].info.layers - 1,),
        )


def inherited(
    history: Sequence[tuple[int, ...]], parents: Sequence[int], *, by_place: bool
) -> tuple[tuple[int, ...], ...]:
    """Return the histories of texts that continue ``parents``: their parents', or their places'."""
    return tuple(
        history[place if by_place and place < len(history) else parent]
        for place, parent in enumerate(parents)
    )


def rewound(search: Search, position: int) -> tuple[Search, Step]:
    """Restore the moment before ``position`` was chosen, and ask for its logits again.

    The choices made there are excluded from now on, and shown text beyond what the restored texts
    share is withdrawn.
    """
    request = search.request
    moments = search.moments[: position + 1]
    after = search.moments[position + 1]
    taken = {
        (source, beam.tokens[position].id)
        for source, beam in zip(after.sources, after.beams.live, strict=True)
    }
    row_of = {probe.beam: i for i, probe in reversed(list(enumerate(search.probes)))}
    rows, keeps, tails = [], [], []
    for beam in moments[-1].beams.live:
        # The cache holds the present texts; a restored one need not have a descendant there.
        same = [common(beam.tokens, other.tokens) for other in search.now.beams.live]
        nearest = max(row_of, key=lambda place: (same[place], -place))
        have = min(same[nearest], position - 1)
        rows.append(row_of[nearest])
        keeps.append(len(request.prompt) + have)
        tails.append([token.id for token in beam.tokens[have:position]])
    width = max(map(len, tails))
    tokens = np.array([tail + [PAD] * (width - len(tail)) for tail in tails], np.int64)
    shown = search.shown[: common(search.shown, moments[-1].beams.shared())]
    edit = edit_to(search.shown, shown)
    rejected = after.beams.live[0].tokens[position].id
    known = search.excluded.get(position, frozenset())
    search = replace(
        search,
        moments=moments,
        probes=(),
        phase="rewound",
        shown=shown,
        excluded={**search.excluded, position: known | taken},
        rewinds={**search.rewinds, position: search.rewinds.get(position, 0) + 1},
        calls=search.calls + 1,
    )
    ask = Forward(keep=keeps, tokens=tokens, rows=np.array(rows))
    note = {"rewind": {"to": position, "rule": "over-trust", "token": rejected}}
    return search, Step(ask={"target": ask}, edit=edit, note=note)
