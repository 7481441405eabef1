"""Cross-entropy of a projection without ever holding the logits of all tokens and the vocabulary.

``linear_cross_entropy(hidden, head, targets)`` is exactly the cross-entropy of
``hidden @ head.T + bias``, loss and gradients, computed in blocks of the vocabulary: the forward
pass keeps a running log-sum-exp, the backward pass computes each block of logits again.

References
----------
Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from steersman.core.errors import MissingDependency, UsageError

Reduction = Literal["mean", "sum", "none"]
Implementation = Literal["auto", "blocks", "cce", "plain"]
IGNORE = -100


def linear_cross_entropy(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    shift: int = 0,
    reduction: Reduction = "mean",
    filter_eps: float | None = None,
    sort_vocab: bool = False,
    vocab_block: int = 8192,
    token_block: int = 1024,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Any:
    """Return the cross-entropy of ``softcap(hidden @ head.T + bias)``, in nats.

    Parameters
    ----------
    hidden : float tensor (..., T, D)
    head : float tensor (V, D)
        May be the tied input embedding; its gradient is then added to the embedding's.
    targets : int tensor (..., T)
        Ids in 0..V-1, or -100 for positions that do not count.
    bias : float tensor (V,), optional
    softcap : float, optional
        Logits become ``softcap * tanh(logits / softcap)``.
    shift : int >= 0
        Position i predicts target i + shift; the first ``shift`` targets of a row do not count.
    reduction : {"mean", "sum", "none"}
        Mean over positions that count (0 if there are none); "none" gives (..., T - shift), with 0
        where nothing counts.
    filter_eps : float, optional
        Leave out blocks of the backward pass in which no probability and no error reaches this;
        None leaves nothing out. Starves rare tokens: not for pre-training.
    sort_vocab : bool
        Visit the vocabulary in the order of mean logits, so that unlikely tokens share blocks and
        filtering finds more to leave out.
    vocab_block, token_block : int
        Most entries held at once are their product.
    return_lse : bool
        Return also the log-sum-exp of every position that counts, for a z-loss; differentiable.
    implementation : {"auto", "blocks", "cce", "plain"}
        "blocks" is this module's own, on any device. "cce" is the kernels of the package
        cut-cross-entropy (CUDA with Triton; no bias, no ``return_lse``). "auto" takes "cce" where
        it is installed and can do what is asked, else "blocks". "plain" holds all logits at once,
        to compare with.

    Raises
    ------
    UsageError
        Shapes do not fit, a target is outside the vocabulary, or "cce" cannot do what is asked.
    MissingDependency
        "cce" is asked for and not usable here.
    """
    flat, wanted, shape = _flat(hidden, head, targets, shift)
    counts = wanted != IGNORE
    index = counts.nonzero()[:, 0]
    valid, ids = flat.index_select(0, index), wanted.index_select(0, index)
    if len(ids) and (int(ids.min()) < 0 or int(ids.max()) >= len(head)):
        raise UsageError(f"targets: ids must be in 0..{len(head) - 1}, or {IGNORE}")
    if vocab_block < 1 or token_block < 1:
        raise UsageError("vocab_block and token_block must be at least 1")
    chosen = _choose(implementation, valid, bias is not None or return_lse)
    kernels = _cce() if chosen == "cce" else None
    if kernels is not None:
        nll = lse = kernels(
            valid, head, ids, softcap=softcap, reduction="none", filter_eps=filter_eps
        )
    elif chosen == "plain":
        logits = _logits(valid, head, bias, softcap)
        lse = torch.logsumexp(logits, dim=1)
        nll = lse - logits.gather(1, ids[:, None])[:, 0]
    else:
        nll, lse = _Blocks.apply(
            valid, head, bias, ids, softcap, filter_eps, sort_vocab, vocab_block, token_block
        )
    if reduction == "none":
        loss = flat.new_zeros(len(flat)).index_put((index,), nll).reshape(shape)
    elif reduction == "sum":
        loss = nll.sum()
    elif reduction == "mean":
        loss = nll.sum() / max(len(ids), 1)
    else:
        raise UsageError(f"reduction must be mean, sum or none, got {reduction!r}")
    return (loss, lse) if return_lse else loss


def _choose(wanted: Implementation, hidden: Tensor, own_only: bool) -> Implementation:
    if wanted not in ("auto", "blocks", "cce", "plain"):
        raise UsageError(f"implementation must be auto, blocks, cce or plain, got {wanted!r}")
    if wanted == "auto":
        usable = hidden.is_cuda and len(hidden) > 0 and not own_only and _cce() is not None
        return "cce" if usable else "blocks"
    if wanted == "cce":
        if own_only:
            raise UsageError("implementation 'cce': knows neither bias nor return_lse")
        if _cce() is None:
            raise MissingDependency(
                "cut-cross-entropy: not usable here (it needs Triton, so a CUDA build of torch on "
                'Linux); run: pip install "steersman[train-cuda]", or use implementation "blocks"'
            )
    return wanted


@cache
def _cce() -> Callable[..., Tensor] | None:
    """Return the kernels of cut-cross-entropy; None where they are missing or have no Triton."""
    try:
        from cut_cross_entropy import linear_cross_entropy as kernels
    except ImportError:
        return None
    found: Callable[..., Tensor] = kernels
    return found


def _flat(
    hidden: Tensor, head: Tensor, targets: Tensor, shift: int
) -> tuple[Tensor, Tensor, torch.Size]:
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != head.shape[-1]:
        raise UsageError(
            f"hidden {tuple(hidden.shape)}, head {tuple(head.shape)} and targets "
            f"{tuple(targets.shape)} do not fit: expected (..., T, D), (V, D) and (..., T)"
        )
    if not 0 <= shift <= targets.shape[-1]:
        raise UsageError(f"shift must be in 0..{targets.shape[-1]}, got {shift}")
    length = targets.shape[-1] - shift
    hidden, targets = hidden[..., :length, :], targets[..., shift:]
    return hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1), targets.shape


class _Blocks(torch.autograd.Function):  # type: ignore[misc]
    """Negative log-likelihood and log-sum-exp (N,) of rows that all count."""

    @staticmethod
    def forward(
        ctx: Any,
        e: Tensor,
        c: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        softcap: float | None,
        filter_eps: float | None,
        sort_vocab: bool,
        vocab_block: int,
        token_block: int,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.float64 if e.dtype == torch.float64 else torch.float32
        lse = torch.full((len(e),), -torch.inf, dtype=wide, device=e.device)
        means = torch.zeros(len(c), dtype=wide, device=e.device)
        for vocab in _ranges(len(c), vocab_block):
            for rows in _ranges(len(e), token_block):
                a = _logits(e[rows], c[vocab], None if bias is None else bias[vocab], softcap)
                lse[rows] = torch.logaddexp(lse[rows], torch.logsumexp(a, dim=1))
                if sort_vocab:
                    means[vocab] += a.sum(dim=0)
        chosen = (e.to(wide) * c[ids].to(wide)).sum(dim=1)
        if bias is not None:
            chosen = chosen + bias[ids].to(wide)
        if softcap is not None:
            chosen = softcap * torch.tanh(chosen / softcap)
        order = torch.argsort(means) if sort_vocab else None
        ctx.save_for_backward(e, c, bias, ids, lse, order)
        ctx.options = softcap, filter_eps, vocab_block, token_block
        return lse - chosen, lse.clone()

    @staticmethod
    def backward(ctx: Any, d_nll: Tensor, d_lse: Tensor) -> Any:
        e, c, bias, ids, lse, order = ctx.saved_tensors
        softcap, eps, vocab_block, token_block = ctx.options
        wide = lse.dtype
        need_e, need_c, need_b = ctx.needs_input_grad[:3]
        d_e = torch.zeros_like(e, dtype=wide) if need_e else None
        d_c = torch.zeros_like(c, dtype=wide) if need_c else None
        d_b = torch.zeros(len(c), dtype=wide, device=e.device) if need_b else None
        place = torch.arange(len(c), device=c.device)
        if order is not None:
            place[order] = torch.arange(len(c), device=c.device)
        where = place[ids]  # position of each target in the order of the visit
        for span in _ranges(len(c), vocab_block):
            vocab: Any = span if order is None else order[span]
            block = c[vocab]
            shifted = None if bias is None else bias[vocab]
            for rows in _ranges(len(e), token_block):
                a = _logits(e[rows], block, shifted, softcap)
                probs = torch.exp(a - lse[rows, None])
                inside = (where[rows] >= span.start) & (where[rows] < span.stop)
                hit = inside.nonzero()[:, 0]
                column = where[rows][hit] - span.start
                if eps is not None:
                    error = probs.clone()
                    error[hit, column] -= 1
                    if float(error.abs().max()) < eps:
                        continue
                g = probs * (d_nll + d_lse)[rows, None]
                g[hit, column] -= d_nll[rows][hit]
                if softcap is not None:
                    g = g * (1 - (a / softcap) ** 2)
                if d_e is not None:
                    d_e[rows] += g @ block.to(wide)
                if d_c is not None:
                    d_c[vocab] += g.T @ e[rows].to(wide)
                if d_b is not None:
                    d_b[vocab] += g.sum(dim=0)
        cast = (
            None if d_e is None else d_e.to(e.dtype),
            None if d_c is None else d_c.to(c.dtype),
            None if d_b is None else d_b.to(bias.dtype),
        )
        return (*cast, None, None, None, None, None, None)


def _logits(e: Tensor, c: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    wide = torch.float64 if e.dtype == torch.float64 else torch.float32
    a = (e @ c.T).to(wide)
    if bias is not None:
        a = a + bias.to(wide)
    return a if softcap is None else softcap * torch.tanh(a / softcap)


def _ranges(length: int, size: int) -> Iterator[slice]:
    for begin in range(0, length, size):
        yield slice(begin, min(begin + size, length))
