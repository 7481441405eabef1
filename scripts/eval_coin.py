#!/usr/bin/env python3
"""Measure CoIn: are bills for added reasoning tokens caught, and honest ones left alone?

    scripts/eval_coin.py --backend torch
    scripts/eval_coin.py --backend torch --traces 300 --block 64 --layer 8

Traces are MATH solutions of ProcessBench (their last step is the visible answer, the others are the
hidden reasoning), and the first samples of Qwen2.5-Math's example (the last paragraph is the
answer). Questions of ProcessBench are split: 60 % train the heads, 15 % set the thresholds so that
5 % of honest traces are rejected, 25 % are reported; the second set is reported only. Tokens are
added behind the true ones: any of the vocabulary, the trace's own once more, those of other
questions, or those of the questions with the most similar answers. Every added rate is a row in
--out, so a stopped run goes on where it was; the trained heads are kept beside it. Intervals are
95 % bootstraps over traces.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import ORDER_SEED, interval, parsed, parser, show

from steersman.core import load
from steersman.core.audit import Embedder, Heads, ask, commit, faults, prove, read_heads
from steersman.core.audit.protocol import Receipt, repeated_runs
from steersman.core.audit.traces import (
    INFLATIONS,
    AuditTrace,
    Prepared,
    inflate,
    prepare,
    seen_blocks,
)
from steersman.core.backend import trainer
from steersman.core.journal import Journal, settings_key

RATES = (0.5, 1.0, 3.0)
FALSE_ALARMS = 0.05
# arm -> the scores that may each raise the alarm; smaller is more suspicious
ARMS = {
    "set network": ("honest",),
    "set network or untrained": ("honest", "cos_tokens", "cos_answer"),
    "two means": ("tokens", "answer"),
    "set network, all asked": ("honest_all",),
    "the same, or repeated runs": ("honest_all", "runs_all"),
    "untrained cosine": ("cos_tokens", "cos_answer"),
    "length alone": ("length",),
}


def processbench(data: Path) -> list[AuditTrace]:
    """Return solutions of three steps and more, shuffled."""
    rows = json.loads((data / "processbench" / "math.json").read_text("utf-8"))
    random.Random(ORDER_SEED).shuffle(rows)
    return [
        AuditTrace(reasoning="\n\n".join(r["steps"][:-1]), answer=r["steps"][-1],
                   question=r["problem"])
        for r in rows if len(r["steps"]) > 2
    ]  # fmt: skip


def samples(data: Path) -> list[AuditTrace]:
    """Return the first sampled solution of each problem."""
    lines = (data / "math_best_of_n" / "math_cot_100.jsonl").read_text("utf-8").splitlines()
    found = []
    for row in map(json.loads, lines):
        reasoning, _, answer = row["code"][0].strip().rpartition("\n\n")
        if reasoning:
            found.append(AuditTrace(reasoning=reasoning, answer=answer, question=row["question"]))
    return found


def scores(heads: Heads, prints: Any, trace: Prepared, seed: int) -> dict[str, float]:
    """Return every arm's scores of one trace as an auditor would see it."""
    receipt = Receipt(
        root=bytes(32), count=prints.count, block=prints.block, width=prints.block_vectors.shape[1],
        nonce=bytes(32), answer_hash=bytes(32), answer_tokens=0,
    )  # fmt: skip
    seen = seen_blocks(prints, ask(receipt, seed=seed))
    whole = seen_blocks(prints, ask(receipt, share=1, tokens=prints.block, seed=seed))
    trained, free = heads.judge(seen, trace.answer), Heads().judge(seen, trace.answer)
    honest_all = heads.judge(whole, trace.answer).honest
    assert trained.honest is not None
    assert honest_all is not None
    return {
        "honest": trained.honest,
        "honest_all": honest_all,
        "tokens": trained.tokens,
        "answer": trained.answer,
        "cos_tokens": free.tokens,
        "cos_answer": free.answer,
        "runs_all": -repeated_runs(np.arange(prints.count), prints.token_vectors),
        "length": -prints.count / max(trace.answer_tokens, 1),
    }


def rejected(arm: str, found: dict[str, float], limits: dict[str, dict[str, float]]) -> bool:
    """Return True when one of an arm's scores is below its threshold."""
    return any(found[name] < limits[arm][name] for name in ARMS[arm])


def thresholds(honest: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """Return thresholds by arm; the alarms are shared out evenly over an arm's scores."""
    limits = {}
    for arm, names in ARMS.items():
        limits[arm] = {
            n: float(np.quantile([h[n] for h in honest], FALSE_ALARMS / len(names))) for n in names
        }
    return limits


def measured(
    name: str, traces: list[Prepared], heads: Heads, embedder: Embedder, log: Journal
) -> dict[str, list[dict[str, float]]]:
    """Return the scores of honest and inflated traces, by case; those in ``log`` are not redone."""
    held = {r["id"]: r["scores"] for r in log.records()}
    found: dict[str, list[dict[str, float]]] = {}
    cases = [("honest", 0.0), *((kind, rate) for kind in INFLATIONS for rate in RATES)]
    for number, (kind, rate) in enumerate(cases):
        case = f"{kind} {rate:g}" if rate else kind
        key = f"{name}: {case}"
        if key not in held:
            rows = []
            for place, trace in enumerate(traces):
                rng = np.random.default_rng([number, place])
                prints = trace.prints
                if rate:
                    prints = inflate(kind, rate, traces, place, embedder=embedder, rng=rng)  # type: ignore[arg-type]
                rows.append(scores(heads, prints, trace, int(rng.integers(1 << 62))))
            log.append({"id": key, "scores": rows})
            held[key] = rows
        found[case] = held[key]
    return found


def report(
    title: str, found: dict[str, list[dict[str, float]]], limits: dict[str, dict[str, float]]
) -> None:
    """Print the share of rejected traces by case and arm."""
    rows = [
        [case, *(interval([float(rejected(arm, s, limits)) for s in traces]) for arm in ARMS)]
        for case, traces in found.items()
    ]
    count = len(found["honest"])
    show(f"{title}: share rejected of {count} traces", ("added tokens", *ARMS), rows)


def quantity(traces: list[Prepared], embedder: Embedder) -> None:
    """Print how the commitment fares: honest proofs, claims of more tokens, and time."""
    passed = caught = 0
    begun = time.perf_counter()
    for trace in traces:
        options: dict[str, Any] = {"answer_tokens": trace.answer_tokens,
                                   "embedder": embedder.facts}  # fmt: skip
        receipt = commit(trace.prints, "answer", **options)
        challenge = ask(receipt, seed=0)
        proof = prove(trace.prints, receipt, challenge)
        passed += not faults(receipt, challenge, proof, "answer")
        more = replace(receipt, count=receipt.count * 2)
        same = replace(challenge, digest=more.digest)
        caught += bool(faults(more, same, replace(proof, digest=more.digest), "answer"))
    spent = (time.perf_counter() - begun) / max(len(traces), 1)
    print(
        f"\ncommit, ask, prove, check: {passed} of {len(traces)} honest ones pass, {caught} claims"
    )
    print(f"of twice the tokens are caught; {1000 * spent:.1f} ms per trace")


def main() -> None:
    made = parser(__doc__, out="eval_coin.jsonl")
    made.add_argument("--traces", type=int, default=1000, help="of ProcessBench")
    made.add_argument("--block", type=int, default=32, help="tokens per block")
    made.add_argument("--layer", type=int, default=0, help="of the embedding")
    made.add_argument("--epochs", type=int, default=3)
    made.add_argument("--centred", action="store_true", help="take the mean vector off first")
    args = parsed(made)
    with load(args.model, backend=args.backend, threads=args.threads, context=2048) as model:
        embedder = Embedder(model, args.layer)

        def ready(traces: list[AuditTrace]) -> list[Prepared]:
            return [prepare(embedder, model.tokenizer, t, block=args.block) for t in traces]

        whole = ready(processbench(args.data)[: args.traces])
        questions = sorted({t.question for t in whole})
        random.Random(ORDER_SEED).shuffle(questions)
        part = {q: i / len(questions) for i, q in enumerate(questions)}
        train = [t for t in whole if part[t.question] < 0.6]
        calibration = [t for t in whole if 0.6 <= part[t.question] < 0.75]
        test = [t for t in whole if part[t.question] >= 0.75]
        trained_on = {t.question for t in [*train, *calibration]}
        other = [t for t in ready(samples(args.data)) if t.question not in trained_on]
        settings = {
            **embedder.facts, "block": args.block, "traces": args.traces, "seed": args.seed,
            "epochs": args.epochs, "centred": args.centred, "backend": model.info.backend,
        }  # fmt: skip
        file = args.out.with_name(f"{args.out.stem}.{settings_key(settings)}.safetensors")
        if not file.exists():
            module = trainer("coin")
            chosen = module.CoinTraining(
                epochs=args.epochs, centred=args.centred, seed=42 + args.seed
            )
            module.train_coin(train, embedder, chosen, threads=args.threads)[0].save(file)
        heads = read_heads(file)
        facts = {k: v for k, v in heads.facts.items() if k.startswith("auc")}
        print(f"{model.info.name} on {model.info.backend}; held-out " + json.dumps(facts))
        out = args.out.with_name(f"{args.out.stem}.{settings_key(settings)}.jsonl")
        with Journal(out, settings) as log:
            quantity(test[:50], embedder)
            base = [scores(heads, t.prints, t, 1000 + i) for i, t in enumerate(calibration)]
            limits = thresholds(base)
            for name, traces in (("ProcessBench", test), ("samples", other)):
                report(name, measured(name, traces, heads, embedder, log), limits)


if __name__ == "__main__":
    main()
