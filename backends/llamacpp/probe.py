"""What a freshly loaded model can really do, found by trying, and remembered per file.

The engine runs hundreds of architectures. Whether one names its nodes as expected, scales its
embeddings, or ends in a norm and projection that we know, is not announced anywhere; and whether
logits depend on how a prompt is cut depends on kernels and weight types. So a few tokens are run.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from steersman.core.errors import SteersmanError
from steersman.core.model import Capability, Forward, IntArray

if TYPE_CHECKING:
    from .model import LlamaModel

_CHUNKS = (8, 4, 1)
_POSITIONS = 16
_CLOSE = 1e-2  # of the logits' standard deviation


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Answers of the probe.

    Attributes
    ----------
    batch_invariant : bool
        16 tokens give the same logits, bit for bit, in calls of 16, 8, 4 and 1.
    hidden, attentions, head : bool
    scale : float
        What rows of the embedding table are multiplied by to act as soft tokens; 0: not possible.
    """

    batch_invariant: bool
    hidden: bool
    attentions: bool
    head: bool
    scale: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> Facts | None:
        """Return the facts in a remembered value, or None where it is not of the right form."""
        flags = ("batch_invariant", "hidden", "attentions", "head")
        if not isinstance(value, dict) or value.keys() != {*flags, "scale"}:
            return None
        scale = value["scale"]
        if not all(isinstance(value[flag], bool) for flag in flags):
            return None
        if not isinstance(scale, float) or not 0 <= scale < math.inf:
            return None
        return cls(**value)


def probe(model: LlamaModel) -> Facts:
    """Try a loaded model that for the moment claims every capability."""
    vocab = model.info.vocab_size
    tokens = ((np.arange(_POSITIONS, dtype=np.int64) * 7919 + 13) % vocab)[None, :]
    hidden, attentions, head = _white_box(model, tokens[:, :6])
    return Facts(
        # The engine's own defaults change kernels at 64 tokens, far beyond this probe.
        batch_invariant=model.setting.micro_batch < 64 and _is_invariant(model, tokens),
        hidden=hidden,
        attentions=attentions,
        head=head,
        scale=_embedding_scale(model, tokens[:, :4]),
    )


def _is_invariant(model: LlamaModel, tokens: IntArray) -> bool:
    with model.session(context=_POSITIONS) as session:
        ask = Forward(keep=0, tokens=tokens, logits="all")
        whole: Any = session.forward(ask).logits
        for size in _CHUNKS:
            for begin in range(0, _POSITIONS, size):
                part = tokens[:, begin : begin + size]
                got = session.forward(Forward(keep=begin, tokens=part, logits="all")).logits
                if not bool((got == whole[:, begin : begin + size]).all()):
                    return False
    return True


def _white_box(model: LlamaModel, tokens: IntArray) -> tuple[bool, bool, bool]:
    layers = model.info.layers
    needs = Capability.HIDDEN | Capability.ATTENTIONS
    hidden = attentions = head = False
    with model.session(needs=needs, context=_POSITIONS) as session:
        every = tuple(range(layers + 1))
        try:
            out = session.forward(Forward(keep=0, tokens=tokens, logits="all", hidden=every))
            hidden = True
            head = model.weights.head_spec is not None and _close(
                model.head(out.hidden[layers]), out.logits
            )
        except (SteersmanError, KeyError, IndexError):
            pass
        try:
            session.forward(Forward(keep=0, tokens=tokens, attentions=every[:-1]))
            attentions = True
        except (SteersmanError, KeyError, IndexError, ValueError):
            pass
    return hidden, attentions, head


def _embedding_scale(model: LlamaModel, tokens: IntArray) -> float:
    if model.weights.table is None or not model.takes_embeddings:
        return 0.0
    rows = model.weights.rows(tokens)
    with model.session(needs=Capability.EMBEDS, context=_POSITIONS) as session:
        want = session.forward(Forward(keep=0, tokens=tokens, logits="all")).logits
        for scale in (1.0, math.sqrt(model.info.width)):
            soft = rows * np.float32(scale)
            got = session.forward(Forward(keep=0, embeds=soft, logits="all")).logits
            if _close(got, want):
                return scale
    return 0.0


def _close(got: Any, want: Any) -> bool:
    return bool(np.abs(got - want).max() <= _CLOSE * np.std(want))
