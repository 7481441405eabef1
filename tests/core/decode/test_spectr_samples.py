"""Speculation with a draft model: texts drawn in large numbers follow the exact law."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from toys import TableModel

from steersman.core.decode.rng import Rng
from steersman.core.decode.speculative.kseq import KSeq
from steersman.core.decode.speculative.spectr import SpecTr
from steersman.core.decode.speculative.verify import Target, target_at
from steersman.core.logits import Chain
from steersman.core.model import Forward, Output

from .spectr_support import (
    CHAINS,
    exact,
    request,
    table,
)


class Direct:
    """Answers calls on a table model without a session, to draw many texts quickly."""

    def __init__(self, model: TableModel) -> None:
        self.model = model
        self.known: dict[int | None, np.ndarray] = {}
        self.rows: list[list[int]] = [[]]
        self.tree: list[list[int]] = []

    def forward(self, ask: Forward) -> Output:
        rows = [0] if ask.rows is None else [int(r) for r in ask.rows]
        fresh, answers = [], []
        for row, tokens in zip(rows, np.asarray(ask.tokens).tolist(), strict=True):
            kept = self.rows[row][: int(ask.keep)]
            if ask.path is not None:
                kept = kept + [self.tree[row][n] for n in ask.path[row]]
            answers.append([self.logits(token) for token in tokens])
            fresh.append((kept, tokens))
        self.rows = [kept if ask.parents is not None else kept + list(new) for kept, new in fresh]
        self.tree = [list(new) for _, new in fresh]
        logits = np.stack([np.stack(a) for a in answers])
        return Output(logits=logits if ask.logits == "all" else logits[:, -1])

    def logits(self, last: int) -> np.ndarray:
        """The next token depends on the last one alone."""
        if last not in self.known:
            self.known[last] = np.log(self.model.probs([last])).astype(np.float32)
        return self.known[last]


SAMPLES = int(os.environ.get("STEERSMAN_SAMPLES", "600"))
"""Texts per large sample; 20,000 take a minute each, and were drawn when this was written."""


@pytest.mark.parametrize("name", ["plain", "top-p", "penalty"])
def test_a_large_sample_follows_the_exact_law(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of texts of four tokens over eight letters.

    The enumerations above decide every draw themselves; here the random numbers do. The statistic
    is compared with its own standard deviation: a sound strategy exceeds four of them for about
    one seed in ten thousand, and the seeds are fixed.
    """
    remember(monkeypatch)
    chain = CHAINS[name]
    target, draft = table(8, seed=1, sharpness=1.2), table(8, seed=2, sharpness=1.2)
    strategy = SpecTr(drafts=2, length=3, chain=chain)
    asked = request({"target": target, "draft": draft})
    texts: Counter[tuple[int, ...]] = Counter()
    models = {"target": Direct(target), "draft": Direct(draft)}
    count = SAMPLES
    for seed in range(count):
        rng = Rng(seed)
        state, step = strategy.init(asked, rng)
        text: list[int] = []
        while step.finish is None:
            out = {role: models[role].forward(ask) for role, ask in step.ask.items()}
            state, step = strategy.step(state, out, rng)
            if step.edit is not None:
                text.extend(t.id for t in step.edit.tokens)
        texts[tuple(text)] += 1
    assert chi_square_excess(texts, exact(target, chain, (0,), 4), count) < 4


def remember(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute what depends on logits and text alone only once."""
    targets: dict[tuple[bytes, bytes], Target] = {}
    rules: dict[tuple[bytes, bytes, int], KSeq] = {}
    between = KSeq.between

    def known(progress: Any, chain: Chain, logits: np.ndarray, rng: Rng) -> Target:
        key = (logits.tobytes(), progress.history.tobytes())
        if key not in targets:
            targets[key] = target_at(progress, chain, logits.copy(), rng)
        return targets[key]

    def rule(p: np.ndarray, q: np.ndarray, k: int) -> KSeq:
        key = (p.tobytes(), q.tobytes(), k)
        if key not in rules:
            rules[key] = between(p, q, k)
        return rules[key]

    monkeypatch.setattr("steersman.core.decode.speculative.verify.target_at", known)
    monkeypatch.setattr("steersman.core.decode.speculative.draft_model.target_at", known)
    monkeypatch.setattr(KSeq, "between", rule)


def chi_square_excess(
    texts: Mapping[tuple[int, ...], int], law: Mapping[tuple[int, ...], float], count: int
) -> float:
    """Return how many standard deviations the statistic exceeds its mean; rare texts are pooled."""
    assert set(texts) <= {text for text, chance in law.items() if chance > 0}
    often = {text: chance for text, chance in law.items() if chance * count >= 5}
    cells = [(texts.get(text, 0), chance * count) for text, chance in often.items()]
    rest = 1 - sum(often.values())
    if rest * count >= 5:
        cells.append((count - sum(seen for seen, _ in cells), rest * count))
    statistic = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    return (statistic - freedom) / np.sqrt(2 * freedom)


def test_the_large_sample_would_notice_a_wrong_law() -> None:
    target = table(8, seed=1, sharpness=1.2)
    law, wrong = exact(target, Chain(), (0,), 4), exact(target, CHAINS["top-p"], (0,), 4)
    rng, count = np.random.default_rng(0), 20_000
    for chances, noticed in ((law, False), (wrong, True)):
        drawn = rng.multinomial(count, list(chances.values()))
        texts = {text: int(n) for text, n in zip(chances, drawn, strict=True)}
        assert (chi_square_excess(texts, law, count) > 4) == noticed
