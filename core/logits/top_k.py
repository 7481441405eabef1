"""Top-k truncation: keep the k most likely tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..array import Array
from ..ops import mask_out, top_k
from ..ops.sorting import positions_like
from .stage import Context, Stage, check_integer


def apply_top_k(logits: Array, k: int, *, ordered: bool = False) -> Array:
    """Set to -inf all but the ``k`` largest logits of each row.

    Parameters
    ----------
    logits : float array (..., V)
    k : int >= 0
        0, or V and more, keeps everything. Of equal logits the lower ids are kept.
    ordered : bool
        Logits already fall along the last axis.

    References
    ----------
    Fan et al., "Hierarchical Neural Story Generation", arXiv:1805.04833.
    """
    if k == 0 or k >= logits.shape[-1]:
        return logits
    return mask_out(logits, keep_top_k(logits, k, ordered=ordered))


def keep_top_k(logits: Array, k: int, *, ordered: bool = False) -> Array:
    """Return the mask (..., V) of :func:`apply_top_k`; k > 0."""
    places = positions_like(logits)
    if ordered:
        return (places < k) & (logits == logits)
    values, indices = top_k(logits, k)
    cut, last = values[..., -1:], indices[..., -1:]
    return (logits > cut) | ((logits == cut) & (places <= last))


@dataclass(frozen=True, kw_only=True)
class TopK(Stage):
    """Keep the ``k`` most likely tokens; 0 is off."""

    name: ClassVar[str] = "top_k"
    truncates: ClassVar[bool] = True
    listwise: ClassVar[bool] = True
    k: int = 40

    def __post_init__(self) -> None:
        check_integer(self.name, "k", self.k, 0)

    @property
    def off(self) -> bool:
        return self.k == 0

    def keep(self, logits: Array, context: Context) -> Array:
        return keep_top_k(logits, self.k, ordered=context.ordered)

    def on_list(self, values: list[float]) -> list[float]:
        return values[: self.k]
