"""Checks of the cache: cutting, going back, rows, forks."""

from __future__ import annotations

import numpy as np

from ..array import array_namespace
from ..model import Capability, Forward
from ..ops import log_softmax, token_logprobs
from .probe import Probe, Spec, pad
from .report import Meter

C = Capability


def _shapes(probe: Probe, meter: Meter) -> None:
    """Logits are float32 of the engine's library and belong to the caller."""
    model, vocab = probe.model, probe.model.info.vocab_size
    tokens, more = probe.short[:6], probe.other[:4]
    meter.holds(
        model.tokenizer.vocab_size == vocab,
        f"tokenizer has {model.tokenizer.vocab_size} ids, logits {vocab}",
    )
    with probe.open() as session:
        out = session.forward(Forward(keep=0, tokens=[tokens], logits="last"))
        before = probe.host(out.logits)
        meter.holds(before.shape == (1, vocab), f"last logits have shape {before.shape}")
        meter.holds(before.dtype == np.float32, f"logits are {before.dtype}")
        xp = array_namespace(out.logits)
        # A library and its array-API wrapper ("numpy", "array_api_compat.numpy") are the same one.
        names = [space.__name__.rpartition(".")[2] for space in (xp, model.xp)]
        meter.holds(names[0] == names[1], f"logits belong to {names[0]}, model.xp is {names[1]}")
        again = session.forward(Forward(keep=len(tokens), tokens=[more], logits=probe.want))
        shape = tuple(again.logits.shape)  # type: ignore[union-attr]
        want = (1, len(more), vocab) if probe.want == "all" else (1, vocab)
        meter.holds(shape == want, f"{probe.want} logits have shape {shape}")
        end = len(tokens) + len(more)
        session.forward(Forward(keep=end, tokens=[more[:1]], logits="last"))
        if not session.borrowed_logits:
            meter.holds(
                bool((probe.host(out.logits) == before).all()),
                "a later call changed logits that were handed out",
            )
        none = session.forward(Forward(keep=end + 1, tokens=[more], logits="none"))
        meter.holds(none.logits is None, "logits were returned though none were asked for")


def _last(probe: Probe, meter: Meter) -> None:
    with probe.open() as session:
        out = session.forward(Forward(keep=0, tokens=[probe.short], logits="all"))
        every = probe.host(out.logits)[0]
    with probe.open() as session:
        out = session.forward(Forward(keep=0, tokens=[probe.short], logits="last"))
        meter.logits(probe.host(out.logits)[0], every[-1], "last position")


def _chunks(probe: Probe, meter: Meter) -> None:
    tokens = probe.tokens
    whole = probe.fresh(tokens, len(tokens))
    with probe.open() as session:
        done, sizes = 0, [1, 2, 3, 5, 8, 13, 64]
        while done < len(tokens):
            size = sizes.pop(0) if sizes else len(tokens)
            part = tokens[done : done + size]
            answer = probe.feed(session, done, [part])[0]
            done += len(part)
            want = whole[done - len(part) : done] if probe.want == "all" else whole
            if probe.want == "all" or done == len(tokens):
                meter.logits(answer, want, f"chunk of {len(part)} that ends at {done}")


def _alignment(probe: Probe, meter: Meter) -> None:
    tokens = np.asarray(probe.short[:10])
    with probe.open() as session:
        out = session.forward(Forward(keep=0, tokens=tokens[None, :], logits="all"))
        every = probe.host(out.logits)
    scores = token_logprobs(every.astype(np.float64), tokens[None, :])[0]
    with probe.open() as session:
        for i in range(len(tokens) - 1):
            ask = Forward(keep=i, tokens=tokens[None, i : i + 1], logits="last")
            step = probe.host(session.forward(ask).logits)[0]
            meter.logits(every[0, i], step, f"position {i}")
            logprob = float(log_softmax(step.astype(np.float64))[tokens[i + 1]])
            limit = 1e-6 if meter.bound.logit == 0 else 2 * (meter.bound.logit or 1.0)
            meter.holds(
                abs(logprob - scores[i]) <= limit,
                f"log-probability of token {i + 1}: {scores[i]:.4f} in one call, "
                f"{logprob:.4f} step by step",
            )


def _rollback(probe: Probe, meter: Meter) -> None:
    tokens, prefix, wrong = probe.tokens, probe.short, probe.other[:7]
    n = len(prefix)
    with probe.open(C.ROLLBACK) as session:
        probe.feed(session, 0, [[*prefix, *wrong]])
        for depth in (0, 1, 5, n - 1, n):
            keep = n - depth
            if depth == 1:  # going back and appending as two calls
                session.forward(Forward(keep=keep, logits="none"))
            part = tokens[keep : keep + 5]
            answer = probe.feed(session, keep, [part])[0]
            want = probe.fresh(tokens[: keep + len(part)], len(part))
            meter.logits(answer, want, f"{depth} tokens back from {n}")
            # The next depth starts behind wrong tokens again.
            probe.feed(session, keep, [[*prefix[keep:], *wrong]])
        meter.holds(session.row_tokens().tolist() == [*prefix, *wrong], "recorded tokens are wrong")


def _rows(probe: Probe, meter: Meter) -> None:
    t, needs = probe.tokens, C.ROWS | C.FORK | C.ROLLBACK
    rows: list[list[int]] = [[], [], [], []]
    calls: list[tuple[list[int], list[list[int]]]] = [
        ([0, 0, 0, 0], [t[:5], t[3:14], t[8:9], []]),  # the last row stays empty
        ([5, 11, 1, 0], [t[5:7], [], t[9:13], t[2:5]]),  # the second row appends nothing
        ([3, 11, 2, 0], [probe.other[:4], t[14:15], [], t[1:4]]),  # each row goes back by itself
        ([7, 12, 2, 3], [[t[7]], [t[15]], [t[10]], [t[4]]]),
    ]
    with probe.open(needs, rows=4) as session:
        for step, (keep, new) in enumerate(calls):
            source = [0, 0, 0, 0] if step == 0 else None
            # Half of the calls ask for the last logits of rows that end in different columns.
            want = "last" if step % 2 else probe.want
            out = session.forward(Forward(keep=keep, tokens=pad(new), rows=source, logits=want))
            meter.holds(
                bool(np.isfinite(probe.host(out.logits)).all()),
                f"call {step}: entries of padded positions are not finite",
            )
            for b, answer in enumerate(probe.answers(out, [len(x) for x in new])):
                rows[b] = rows[b][: keep[b]] + new[b]
                if new[b]:
                    alone = probe.fresh(rows[b], len(answer))
                    meter.logits(answer, alone, f"call {step}, row {b}")
        lengths = [len(row) for row in rows]
        meter.holds(session.lengths.tolist() == lengths, f"lengths {session.lengths.tolist()}")


def _fork(probe: Probe, meter: Meter) -> None:
    prefix, other, t = probe.short, probe.other, probe.tokens
    n = len(prefix)
    tails = [[other[0]], [other[1]], [t[n]]]
    with probe.open(C.FORK | C.ROWS, rows=3) as session:
        probe.feed(session, 0, [prefix])
        answers = probe.feed(session, n, tails, rows=[0, 0, 0])
        for b, answer in enumerate(answers):
            meter.logits(answer, probe.fresh(prefix + tails[b], 1), f"fork {b}")
        # Only the middle fork writes; the others must not notice.
        tails[1] = tails[1] + other[2:6]
        middle = probe.feed(session, [n + 1] * 3, [[], other[2:6], []])[1]
        meter.logits(middle, probe.fresh(prefix + tails[1], 4), "a fork that grew")
        new = [other[7:9], other[9:10], t[n + 1 : n + 3]]
        lengths = [n + len(tail) for tail in tails]
        for b, answer in enumerate(probe.feed(session, lengths, new)):
            tails[b] = tails[b] + new[b]
            want = probe.fresh(prefix + tails[b], len(new[b]))
            meter.logits(answer, want, f"fork {b} after its sibling grew")


def _reorder(probe: Probe, meter: Meter) -> None:
    prefix, other = probe.short[:5], probe.other
    n = len(prefix)
    rows = [prefix + other[i : i + 2 + i] for i in range(3)]
    with probe.open(C.FORK | C.ROWS, rows=3) as session:
        probe.feed(session, 0, [prefix])
        probe.feed(session, n, [row[n:] for row in rows], rows=[0, 0, 0])
        orders = ([2, 0, 1], [1, 0, 2], [1, 1, 0])
        for step, order in enumerate(orders):
            rows = [rows[source] for source in order]
            keep = [len(row) for row in rows]
            new = [[other[8 + 3 * step + b]] for b in range(3)]
            if step == 1:  # moving rows and appending as two calls
                session.forward(Forward(keep=keep, rows=order, logits="none"))
                answers = probe.feed(session, keep, new)
            else:
                answers = probe.feed(session, keep, new, rows=order)
            rows = [row + tail for row, tail in zip(rows, new)]
            for b, answer in enumerate(answers):
                meter.logits(answer, probe.fresh(rows[b], 1), f"order {order}, row {b}")


def _merge(probe: Probe, meter: Meter) -> None:
    prefix, other = probe.short[:5], probe.other
    n = len(prefix)
    tails = [other[i : i + 1 + i] for i in range(4)]
    with probe.open(C.FORK | C.ROWS, rows=4) as session:
        probe.feed(session, 0, [prefix])
        probe.feed(session, n, tails, rows=[0, 0, 0, 0])
        kept = prefix + tails[2]
        answer = probe.feed(session, len(kept), [other[9:11]], rows=[2])[0]
        kept = kept + other[9:11]
        meter.logits(answer, probe.fresh(kept, 2), "four rows to one")
        meter.holds(session.batch == 1, f"{session.batch} rows are live, expected 1")
        new = [[other[i]] for i in range(12, 16)]
        for b, answer in enumerate(probe.feed(session, len(kept), new, rows=[0, 0, 0, 0])):
            meter.logits(answer, probe.fresh(kept + new[b], 1), f"one row to four, row {b}")


CHECKS = (
    Spec(
        name="shapes",
        title="logits have the stated shape, type and owner",
        needs=C.LAST_LOGITS,
        run=_shapes,
        measure="none",
    ),
    Spec(
        name="last",
        title="last logits are the last row of all logits",
        needs=C.LAST_LOGITS | C.ALL_LOGITS,
        run=_last,
    ),
    Spec(
        name="chunks",
        title="a prompt in chunks equals the whole",
        needs=C.LAST_LOGITS,
        run=_chunks,
    ),
    Spec(
        name="alignment",
        title="the log-probability of token t comes from position t-1",
        needs=C.LAST_LOGITS | C.ALL_LOGITS,
        run=_alignment,
    ),
    Spec(
        name="rollback",
        title="going back equals a fresh prefill",
        needs=C.LAST_LOGITS | C.ROLLBACK,
        run=_rollback,
    ),
    Spec(
        name="rows",
        title="a row in a ragged batch equals the row alone",
        needs=C.LAST_LOGITS | C.ROWS | C.FORK | C.ROLLBACK,
        run=_rows,
    ),
    Spec(
        name="fork",
        title="a fork equals its parent and leaves its siblings alone",
        needs=C.LAST_LOGITS | C.FORK | C.ROWS,
        run=_fork,
    ),
    Spec(
        name="reorder",
        title="rows can be reordered in any cycle",
        needs=C.LAST_LOGITS | C.FORK | C.ROWS,
        run=_reorder,
    ),
    Spec(
        name="merge",
        title="rows can be dropped and grown again",
        needs=C.LAST_LOGITS | C.FORK | C.ROWS,
        run=_merge,
    ),
)
