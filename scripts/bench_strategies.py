#!/usr/bin/env python3
"""What each decoding strategy costs per accepted token, against plain sampling with its own chain.

Every profile and plain sampling with the same stages make one text each per prompt, in turn, in
this process, on caches of their own, with the same seed, for the same number of tokens (end tokens
are ignored); the ratio is the median of the pairs, above 1 where the strategy is dearer. For a
profile that is plain sampling itself the other side has no stages. The prompt's own time and
positions are not counted, except where a second model first reads it later on.

    scripts/bench_strategies.py --backend llamacpp --threads 2
    scripts/bench_strategies.py --backend torch --setting fast --only stand opera --tokens 64
    scripts/bench_strategies.py --backend mlx --json

Calls are calls to a model, positions what they computed, both per token of the finished text: a
draft of eight tokens is one call and eight positions. What a model cannot do is listed with the
reason. Strategies that no profile names run with their defaults; a draft or small model that a
profile does not name is the model itself without the middle third of its layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PROMPTS = (
    "Once upon a time, in a town by the sea, there lived a girl who",
    [{"role": "user", "content": "What makes a good teacher? Answer in a few sentences."}],
    "def mean(values):\n    total = 0\n    for value in values:\n        total += value\n",
    [{"role": "user", "content": "Tom has 3 boxes of 12 eggs and uses 5. How many are left?"}],
    "The history of navigation begins with sailors who stayed within sight of the coast. " * 4,
)


class Counted:
    """A session that counts the positions it computes; all else is the session's own."""

    def __init__(self, session: Any) -> None:
        self._session = session
        self.positions = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def forward(self, ask: Any) -> Any:
        import numpy as np

        out = self._session.forward(ask)
        if ask.tokens is not None:
            self.positions += int((np.asarray(ask.tokens) >= 0).sum())
        elif ask.embeds is not None:
            self.positions += int(ask.embeds.shape[0] * ask.embeds.shape[1])
        return out


@dataclass(frozen=True)
class Text:
    """What one text cost; calls and positions by role, per token."""

    tokens: int
    ms: float
    calls: Mapping[str, float]
    positions: Mapping[str, float]


def text(models: Mapping[str, Any], strategy: Any, prompt: Any, count: int, seed: int) -> Text:
    """Make one text on fresh caches."""
    from steersman.core.api import encode_prompt
    from steersman.core.decode.events import Finished
    from steersman.core.decode.loop import decode
    from steersman.core.decode.rng import Rng
    from steersman.core.decode.sessions import Sessions
    from steersman.core.decode.types import Request

    ids = encode_prompt(models["target"].tokenizer, prompt)
    with Sessions(models) as sessions:
        opened = sessions.prepare(strategy, name="bench")
        counted = {role: Counted(session) for role, session in opened.items()}
        request = Request(
            prompt=ids,
            models=sessions.models,
            eos_ids=frozenset(),
            max_tokens=count,
            context=sessions.context,
        )
        *_, end = decode(strategy, counted, request, Rng(seed))  # type: ignore[arg-type]
    assert isinstance(end, Finished)
    made = max(len(end.token_ids), 1)
    return Text(
        tokens=len(end.token_ids),
        ms=1000 * end.timings.decode_s / made,
        calls={role: calls / made for role, calls in sorted(end.timings.calls.items())},
        positions={
            role: max(session.positions - len(ids), 0) / made
            for role, session in sorted(counted.items())
        },
    )


def plain(profile: Any) -> Any:
    """Return what a profile is compared with."""
    from steersman.core.decode import Sample
    from steersman.core.logits import Chain

    same = type(profile.strategy) is Sample
    return Sample() if same else Sample(chain=Chain(profile.stages))


def measure(model: Any, profile: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Return a profile's figures.

    Raises
    ------
    SteersmanError
        The model, or one for another role, cannot do it.
    """
    from steersman.core.roles import load_roles, roles_of

    profile = profile.bind(model.tokenizer)
    layers = args.helper_layers or outer_thirds(model.info.layers)
    helpers = {
        role: {"layers": layers}
        for role in roles_of(profile.strategy)[1:]
        if role not in profile.models
    }
    mine, other = [], []
    with load_roles(profile, target=model, roles=helpers) as roles:
        both = ((mine, profile.strategy), (other, plain(profile)))
        for _, strategy in both:  # warm-up: kernels, caches of compiled code, tables of bytes
            text(roles.models, strategy, PROMPTS[0], 4, args.seed)
        for turn in range(args.pairs):
            prompt = PROMPTS[turn % len(PROMPTS)]
            # Alternate who goes first, so that a drift of the machine's load hits both.
            for found, strategy in both[:: 1 if turn % 2 else -1]:
                seed = args.seed + turn
                found.append(text(roles.models, strategy, prompt, args.tokens, seed))
    ratios = [a.ms / b.ms for a, b in zip(mine, other, strict=True)]
    return {
        "profile": profile.name,
        "strategy": profile.strategy_name,
        "ms_per_token": round(statistics.median(t.ms for t in mine), 2),
        "plain_ms_per_token": round(statistics.median(t.ms for t in other), 2),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "tokens": sum(t.tokens for t in mine),
        "calls_per_token": per_role([t.calls for t in mine]),
        "positions_per_token": per_role([t.positions for t in mine]),
    }


def outer_thirds(layers: int) -> str:
    """Return a choice of layers that leaves out the middle third."""
    third = max(layers // 3, 1)
    return f"0-{third - 1},{layers - third}-{layers - 1}"


def per_role(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every role's figures."""
    total: Counter[str] = Counter()
    for figures in found:
        total.update(figures)
    return {role: round(value / len(found), 2) for role, value in total.items()}


def candidates(only: Sequence[str] | None) -> list[Any]:
    """Return the built-in profiles, and one of defaults for every strategy that none names."""
    from steersman.core.decode import STRATEGIES
    from steersman.core.errors import UsageError
    from steersman.core.profile import builtin_folder, load_profile
    from steersman.core.profile_build import from_document
    from steersman.core.strict_yaml import parse

    found = [load_profile(path) for path in sorted(builtin_folder().glob("*.yaml"))]
    named = {profile.strategy_name for profile in found}
    for name in STRATEGIES:
        if name not in named:
            document = parse(f"strategy: {name}", source="defaults")
            found.append(from_document(document, name=f"({name})"))
    if only:
        known = {name for p in found for name in (p.name, p.strategy_name)}
        for name in only:
            if name not in known:
                raise UsageError(f"--only {name}: no such profile or strategy")
        found = [p for p in found if {p.name, p.strategy_name} & set(only)]
    return found


def by_role(figures: Mapping[str, float]) -> str:
    """Return figures of one role as a number, of several with their names."""
    if len(figures) == 1:
        return f"{next(iter(figures.values())):.2f}"
    return ", ".join(f"{role} {value:.2f}" for role, value in figures.items()) or "-"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return one row of the table."""
    if "skipped" in row:
        return [row["profile"], row["strategy"], "-", "-", f"skipped: {row['skipped']}", "-"]
    low, high = row["ratio_range"]
    return [
        row["profile"],
        row["strategy"],
        f"{row['ms_per_token']:.1f}",
        f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})",
        by_role(row["calls_per_token"]),
        by_role(row["positions_per_token"]),
    ]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--backend", default="llamacpp", choices=["llamacpp", "torch", "mlx"])
    parser.add_argument("--setting", choices=["reproducible", "fast"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="profiles or strategies")
    parser.add_argument(
        "--helper-layers",
        metavar="LAYERS",
        help="of the model itself, for roles that a profile gives no model; "
        "the middle third is left out by default",
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens per text")
    parser.add_argument("--pairs", type=int, default=5, help="texts per profile, by prompt in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for name in ("tokens", "pairs"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: must be at least 1, got {getattr(args, name)}")
    return args


def main() -> int:
    """Parse arguments, measure, print one row per profile as soon as it is there."""
    args = arguments()
    from steersman.core import load
    from steersman.core.errors import SteersmanError

    options: dict[str, Any] = {"context": 1024, "threads": args.threads}
    for name in ("dtype", "device", "setting"):
        if getattr(args, name) not in (None, "auto"):
            options[name] = getattr(args, name)
    rows = []
    with load(args.model, backend=args.backend, **options) as model:
        info = model.info
        header = [
            "profile",
            "strategy",
            "ms per token",
            "times plain sampling",
            "calls per token",
            "positions per token",
        ]
        if not args.json:
            print(
                f"{info.name} ({info.dtype}) on {info.backend}, {info.device}, threads "
                f"{info.threads}; {args.pairs} texts of {args.tokens} tokens; "
                f"medians of pairs (lowest to highest)\n"
            )
            print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", flush=True)
        for profile in candidates(args.only):
            try:
                row = measure(model, profile, args)
            except SteersmanError as error:
                row = {
                    "profile": profile.name,
                    "strategy": profile.strategy_name,
                    "skipped": str(error),
                }
            rows.append(row)
            if not args.json:
                print(f"| {' | '.join(cells(row))} |", flush=True)
    if args.json:
        facts = {
            "model": info.name,
            "fingerprint": info.fingerprint,
            "backend": info.backend,
            "dtype": info.dtype,
            "device": info.device,
            "threads": info.threads,
            "extra": dict(info.extra),
            "tokens": args.tokens,
            "pairs": args.pairs,
            "seed": args.seed,
        }
        print(json.dumps({"setup": facts, "rows": rows}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
