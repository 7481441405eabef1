"""Counting what a trace tells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .format import is_whole
from .reader import Line, read_trace

RANKS = (1, 2, 5, 10, 100)  # upper ends of the classes of ranks; one more holds the rest
RULES = 1000  # different rules that are counted apart
BINS = 60  # points of the curve over the text


@dataclass
class _Mean:
    """A running mean."""

    total: float = 0.0
    count: int = 0

    def add(self, value: float | None) -> None:
        if value is not None and math.isfinite(value):
            self.total += value
            self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _Stage:
    """What one stage did over all tokens."""

    tokens: int = 0
    before: _Mean = field(default_factory=_Mean)
    after: _Mean = field(default_factory=_Mean)
    left: _Mean = field(default_factory=_Mean)
    removed: _Mean = field(default_factory=_Mean)
    tv: _Mean = field(default_factory=_Mean)
    kl: _Mean = field(default_factory=_Mean)
    argmax_changed: int = 0

    def take(self, stage: Mapping[str, Any], entropy_before: float) -> None:
        self.tokens += 1
        self.before.add(entropy_before)
        self.after.add(stage["entropy"])
        for name in ("left", "removed", "tv", "kl"):
            getattr(self, name).add(stage[name])
        self.argmax_changed += stage["argmax_changed"]

    def record(self, name: str) -> dict[str, Any]:
        before, after = self.before.value or 0.0, self.after.value or 0.0
        return {
            "name": name,
            "tokens": self.tokens,
            "entropy_before": before,
            "entropy_after": after,
            "entropy_change": after - before,
            "left": self.left.value,
            "removed": self.removed.value,
            "tv": self.tv.value,
            "kl": self.kl.value,
            "argmax_changed": self.argmax_changed / self.tokens,
        }


def summarise(path: str | Path) -> dict[str, Any]:
    """Return counts and means over a whole trace.

    Returns
    -------
    dict of JSON values
        ``requests``, ``finished`` (by reason), ``failed``, ``full``; ``tokens`` (all that were
        ever shown), ``kept``, ``withdrawn``, ``rewinds``; ``rules`` (rewinds by rule),
        ``suppressed``; ``drafted``, ``accepted``, ``acceptance`` (share), ``rounds``; ``routed``
        (tokens by role) and ``routing_score`` (mean); ``blocks`` and ``passes`` (mean);
        ``entropy`` (mean of the model's distribution, nats), ``surprise`` (mean of -log p under
        it) and ``curve`` (that by place in the text, in up to 60 classes of tokens); ``ranks``
        (tokens by rank); ``stages`` in the order met; ``tokens_per_second``.

    Raises
    ------
    MissingFile, InvalidInput
        As :func:`read_trace`.
    """
    count = _Counter()
    for line in read_trace(path):
        count.take(line)
    return count.result()


class _Counter:
    def __init__(self) -> None:
        self._n: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._rules: Counter[str] = Counter()
        self._routed: Counter[str] = Counter()
        self._ranks: Counter[int] = Counter()
        self._score, self._passes = _Mean(), _Mean()
        self._entropy, self._surprise = _Mean(), _Mean()
        self._stages: dict[str, _Stage] = {}
        self._curve: dict[int, _Mean] = {}
        self._seconds = 0.0

    def take(self, line: Line) -> None:
        """Count one line."""
        data = line.data
        if line.event == "started":
            self._n["requests"] += 1
        elif line.event == "token":
            self._token(data)
        elif line.event == "withdrawn":
            self._n["rewinds"] += 1
            self._n["withdrawn"] += data["tokens"]
        elif line.event == "note":
            self._note(data["values"])
        elif line.event == "finished":
            self._reasons[data["reason"][:100]] += 1
            timings = data.get("timings", {})
            seconds, tokens = timings.get("decode_s"), timings.get("generated_tokens")
            if isinstance(seconds, int | float) and is_whole(tokens) and 0 < seconds < 1e12:
                self._seconds += seconds
                self._n["timed"] += tokens
        else:
            self._n[line.event] += 1

    def _token(self, data: Mapping[str, Any]) -> None:
        self._n["tokens"] += 1
        raw, logprob = data.get("raw"), data.get("raw_logprob")
        if raw is not None:
            self._entropy.add(raw["entropy"])
            if "rank" in raw:
                self._ranks[next((r for r in RANKS if raw["rank"] <= r), 0)] += 1
            if logprob is None and raw.get("p"):
                logprob = math.log(min(raw["p"], 1.0))
            entropy = raw["entropy"]
            seen: Counter[str] = Counter()
            for stage in data.get("stages", ()):
                seen[stage["name"]] += 1
                twice = f" ({seen[stage['name']]})" if seen[stage["name"]] > 1 else ""
                name = stage["name"][:100] + twice
                if name in self._stages or len(self._stages) < RULES:
                    self._stages.setdefault(name, _Stage()).take(stage, entropy)
                entropy = stage["entropy"]
        if logprob is not None:
            self._surprise.add(-logprob)
            self._curve.setdefault(data["index"], _Mean()).add(-logprob)

    def _note(self, values: Mapping[str, Any]) -> None:
        rewind = values.get("rewind")
        if isinstance(rewind, dict):
            rule = str(rewind.get("rule", "without a rule"))[:100]
            if rule in self._rules or len(self._rules) < RULES:
                self._rules[rule] += 1
        self._n["suppressed"] += "suppressed" in values
        if is_whole(values.get("drafted")) and is_whole(values.get("accepted")):
            self._n["rounds"] += 1
            self._n["drafted"] += values["drafted"]
            self._n["accepted"] += values["accepted"]
        routed, score = values.get("routed"), values.get("score")
        if isinstance(routed, str) and len(self._routed) < RULES:
            self._routed[routed[:100]] += 1
            self._score.add(score if isinstance(score, int | float) else None)
        if is_whole(values.get("block")):
            self._n["blocks"] += 1
            passes = values.get("passes")
            self._passes.add(passes if isinstance(passes, int | float) else None)

    def result(self) -> dict[str, Any]:
        """Return everything counted."""
        n = self._n
        return {
            "requests": n["requests"],
            "finished": dict(self._reasons),
            "failed": n["failed"],
            "full": bool(n["full"]),
            "tokens": n["tokens"],
            "kept": n["tokens"] - n["withdrawn"],
            "withdrawn": n["withdrawn"],
            "rewinds": n["rewinds"],
            "rules": dict(self._rules.most_common()),
            "suppressed": n["suppressed"],
            "rounds": n["rounds"],
            "drafted": n["drafted"],
            "accepted": n["accepted"],
            "acceptance": n["accepted"] / n["drafted"] if n["drafted"] else None,
            "routed": dict(self._routed),
            "routing_score": self._score.value,
            "blocks": n["blocks"],
            "passes": self._passes.value,
            "entropy": self._entropy.value,
            "surprise": self._surprise.value,
            "curve": self._over_the_text(),
            "ranks": {_rank_name(i): self._ranks[r] for i, r in enumerate((*RANKS, 0))},
            "stages": [stage.record(name) for name, stage in self._stages.items()],
            "tokens_per_second": n["timed"] / self._seconds if self._seconds else None,
        }

    def _over_the_text(self) -> list[float]:
        """Return the mean surprise by place, places gathered into at most ``BINS`` classes."""
        if not self._curve:
            return []
        size = max(self._curve) + 1
        bins = min(BINS, size)
        means = [_Mean() for _ in range(bins)]
        for place, mean in self._curve.items():
            into = means[place * bins // size]
            into.total += mean.total
            into.count += mean.count
        return [mean.value for mean in means if mean.value is not None]


def _rank_name(place: int) -> str:
    if place == len(RANKS):
        return f"> {RANKS[-1]}"
    low = RANKS[place - 1] + 1 if place else 1
    return str(low) if low == RANKS[place] else f"{low}-{RANKS[place]}"
