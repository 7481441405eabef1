"""Checks of what lies inside: soft tokens, hidden states, attention, the head, open blocks."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..model import Capability, Forward
from .probe import Probe, Spec, pad
from .report import Floats, Meter

C = Capability


def _embeds(probe: Probe, meter: Meter) -> None:
    model, tokens = probe.model, probe.short
    n = len(tokens)
    soft = model.embed(tokens)
    before = probe.host(soft)
    shape = (n, model.info.width)
    meter.holds(tuple(soft.shape) == shape, f"embed gives {tuple(soft.shape)}, expected {shape}")
    with probe.open(C.EMBEDS) as session:
        ask = Forward(keep=0, embeds=soft[None, ...], logits=probe.want)
        answer = probe.answers(session.forward(ask), [n])[0]
        meter.logits(answer, probe.fresh(tokens, n, C.EMBEDS), "soft tokens")
        meter.holds(bool((probe.host(soft) == before).all()), "the caller's embeddings changed")
        answer = probe.feed(session, n, [probe.other[:3]])[0]
        want = probe.fresh(tokens + probe.other[:3], 3, C.EMBEDS)
        meter.logits(answer, want, "tokens after soft tokens")
        meter.holds((session.row_tokens()[:n] == -1).all(), "soft tokens are recorded as ids")
        ask = Forward(keep=5, embeds=soft[None, 5:9, ...], logits=probe.want)
        answer = probe.answers(session.forward(ask), [4])[0]
        meter.logits(answer, probe.fresh(tokens[:9], 4, C.EMBEDS), "soft tokens in the middle")


def _head(probe: Probe, meter: Meter) -> None:
    model, tokens = probe.model, probe.short
    top = model.info.layers
    with probe.open(C.HIDDEN) as session:
        ask = Forward(keep=0, tokens=[tokens], logits="all", hidden=(top,))
        out = session.forward(ask)
        logits = probe.host(out.logits)[0]
        answer = probe.host(model.head(out.hidden[top]))
    meter.holds(answer.dtype == np.float32, f"head gives {answer.dtype}")
    meter.logits(answer[0], logits, "head of the last hidden state")


def _hidden_zero(probe: Probe, meter: Meter) -> None:
    tokens = probe.short
    with probe.open(C.HIDDEN) as session:
        ask = Forward(keep=0, tokens=[tokens], logits="none", hidden=(0,))
        hidden = probe.host(session.forward(ask).hidden[0])[0]
    meter.relative(hidden, probe.host(probe.model.embed(tokens)), "hidden state 0")


def _embedding(probe: Probe, meter: Meter) -> None:
    info = probe.model.info
    table = probe.model.embedding
    shape = (info.vocab_size, info.width)
    meter.holds(tuple(table.shape) == shape, f"embedding is {tuple(table.shape)}, not {shape}")
    for token in (0, 1, *probe.other[:3], info.vocab_size - 1):
        row = probe.host(table[token, ...])
        meter.relative(row, probe.host(probe.model.embed([token]))[0], f"token {token}")


def _hidden(probe: Probe, meter: Meter) -> None:
    tokens, info = probe.short, probe.model.info
    n, layers = len(tokens), tuple(range(info.layers + 1))

    def states(parts: list[list[int]]) -> list[Floats]:
        done, found = 0, []
        with probe.open(C.HIDDEN) as session:
            for part in parts:
                ask = Forward(keep=done, tokens=[part], logits="last", hidden=layers)
                out = session.forward(ask)
                meter.holds(set(out.hidden) == set(layers), f"layers {sorted(out.hidden)}")
                done += len(part)
                shape = (1, len(part), info.width)
                stack = [probe.host(out.hidden[i]) for i in layers]
                bad = [i for i in layers if stack[i].shape != shape]
                meter.holds(not bad, f"hidden state of layers {bad} is not {shape}")
                found.append(np.stack(stack)[:, 0])
                last = probe.host(out.logits)
                if done == n:
                    # Asking for states must not change what the model says.
                    with probe.open(C.HIDDEN) as plain:
                        whole = plain.forward(Forward(keep=0, tokens=[tokens], logits="last"))
                        gap = np.abs(last - probe.host(whole.logits)).max()
                    loose = meter.bound.logit is None
                    limit = 3.0 if loose else float(meter.bound.logit or 0)
                    meter.holds(gap <= limit, f"asking for states moved a logit by {gap:.3g}")
        return found

    whole = states([tokens])[0]
    meter.holds(bool(np.isfinite(whole).all()), "hidden states are not finite")
    meter.holds(
        all((whole[i] != whole[i + 1]).any() for i in layers[:-1]), "two layers are the same"
    )
    cut = np.concatenate(states([tokens[:7], tokens[7:8], tokens[8:]]), axis=1)
    for i in layers:
        meter.relative(cut[i], whole[i], f"layer {i}")


def _attentions(probe: Probe, meter: Meter) -> None:
    info = probe.model.info
    tokens, cut = probe.short, len(probe.short) - 6
    layers = tuple(sorted({0, info.layers // 2, info.layers - 1}))

    def weights(session: Any, keep: Any, rows: list[list[int]], **fields: Any) -> dict[int, Floats]:
        ask = Forward(keep=keep, tokens=pad(rows), logits="last", attentions=layers, **fields)
        found = {i: probe.host(w) for i, w in session.forward(ask).attentions.items()}
        meter.holds(set(found) == set(layers), f"layers {sorted(found)}")
        return found

    def check(found: dict[int, Floats], starts: list[int], counts: list[int], where: str) -> None:
        span = max(s + c for s, c in zip(starts, counts))
        shape = (len(starts), info.heads, max(counts), span)
        for layer, w in found.items():
            if w.shape != shape:
                meter.holds(False, f"{where}: weights are {w.shape}, expected {shape}")
                continue
            for b, (start, count) in enumerate(zip(starts, counts)):
                part = w[b, :, :count]
                meter.absolute(part.sum(-1), 1.0, f"{where}, sums in layer {layer}, row {b}")
                meter.holds(bool((part >= 0).all()), f"{where}: negative weights")
                seen = np.arange(span) <= start + np.arange(count)[:, None]
                meter.holds(
                    bool((part[:, ~seen] == 0).all()), f"{where}: a position sees a later one"
                )

    n = len(tokens)
    with probe.open(C.ATTENTIONS) as session:
        whole = weights(session, 0, [tokens])
        check(whole, [0], [n], "whole prompt")
    with probe.open(C.ATTENTIONS) as session:
        session.forward(Forward(keep=0, tokens=[tokens[:cut]], logits="none"))
        part = weights(session, cut, [tokens[cut:]])
        check(part, [cut], [n - cut], "second call")
        for layer in layers:
            if part[layer].shape[-1] == whole[layer].shape[-1]:
                want = whole[layer][:, :, cut:]
                meter.absolute(part[layer], want, f"layer {layer}, second call against whole")
    if probe.model.capabilities & (C.ROWS | C.FORK) == C.ROWS | C.FORK:
        with probe.open(C.ATTENTIONS | C.ROWS | C.FORK, rows=2) as session:
            rows = [tokens[:cut], tokens[2:7]]
            starts = [len(row) for row in rows]
            session.forward(Forward(keep=0, tokens=pad(rows), rows=[0, 0], logits="none"))
            new = [tokens[cut:], tokens[7:9]]
            part = weights(session, starts, new)
            check(part, starts, [len(row) for row in new], "ragged rows")
            for layer in layers:
                want = whole[layer][:, :, cut:]
                if part[layer].shape[-1] == want.shape[-1]:
                    meter.absolute(part[layer][:1], want, f"layer {layer}, row in a batch")


def _block(probe: Probe, meter: Meter) -> None:
    prefix, block = probe.short, probe.other[:6]
    n, m = len(prefix), len(block)
    with probe.open(C.BLOCK) as session:

        def denoise(tokens: list[int], causal: bool = False) -> Floats:
            ask = Forward(keep=n, tokens=[tokens], logits="all", causal=causal)
            return probe.host(session.forward(ask).logits)[0]

        probe.feed(session, 0, [prefix])
        first = denoise(block)
        changed = denoise([*block[:-1], probe.other[7]])
        again = denoise(block)
        meter.logits(again, first, "the same block again")
        want = probe.fresh(prefix + block, m, C.BLOCK)
        meter.holds(bool(np.abs(first - want)[0].max() > 1e-3), "the block equals a causal call")
        meter.holds(
            bool(np.abs(changed - first)[0].max() > 1e-3),
            "the first position of a block does not see its last",
        )
        meter.logits(denoise(block, causal=True), want, "the block fed causally")
        answer = probe.feed(session, n + m, [probe.other[8:10]])[0]
        want = probe.fresh(prefix + block + probe.other[8:10], 2, C.BLOCK)
        meter.logits(answer, want, "tokens after a committed block")
        denoise(block)
        new = probe.other[10:12]
        answer = probe.feed(session, n, [new])[0]
        want = probe.fresh(prefix + new, 2, C.BLOCK)
        meter.logits(answer, want, "tokens after a dropped block")


_L = C.LAST_LOGITS

CHECKS = (
    Spec(
        name="embeds",
        title="soft tokens made by embed equal tokens",
        needs=_L | C.EMBEDS | C.ROLLBACK,
        run=_embeds,
        invariance=False,
    ),
    Spec(
        name="embedding",
        title="the embedding matrix holds what embed returns",
        needs=C.HEAD | C.EMBEDS,
        run=_embedding,
        measure="relative",
        invariance=False,
    ),
    Spec(
        name="hidden-0",
        title="hidden state 0 is the embedding",
        needs=C.HIDDEN | C.EMBEDS,
        run=_hidden_zero,
        measure="relative",
        invariance=False,
    ),
    Spec(
        name="hidden",
        title="hidden states of every layer, the same in chunks",
        needs=_L | C.HIDDEN,
        run=_hidden,
        measure="relative",
        invariance=False,
    ),
    Spec(
        name="head",
        title="head of the last hidden state equals the logits",
        needs=C.ALL_LOGITS | C.HIDDEN | C.HEAD,
        run=_head,
        invariance=False,
    ),
    Spec(
        name="attentions",
        title="attention weights sum to 1, are causal, and the same in chunks",
        needs=_L | C.ATTENTIONS,
        run=_attentions,
        measure="absolute",
        invariance=False,
    ),
    Spec(
        name="block",
        title="an open block repeats, sees itself both ways, and commits causally",
        needs=_L | C.ALL_LOGITS | C.BLOCK | C.ROLLBACK,
        run=_block,
    ),
)
