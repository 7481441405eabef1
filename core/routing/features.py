"""What the router looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..array import Array, to_numpy
from ..model import Capability, Forward, IntArray, Model, Session
from ..ops import top_k

Floats = npt.NDArray[np.float32]


def step_features(
    model: Model, logits: Array, hidden: Array, token: int, *, top: int
) -> tuple[Floats, Floats, Floats]:
    """Return the router's inputs for one step of the small model.

    Parameters
    ----------
    model : Model
        The small model.
    logits : float array (V,)
        Raw logits of the last position.
    hidden : float array (D,)
        Hidden state after the last layer, before the final norm, of the same position.
    token : int
        The token that the small model chose.
    top : int

    Returns
    -------
    top_logits : float32 (top,)
    hidden : float32 (D,)
        After the final norm.
    embedding : float32 (D,)
    """
    values, _ = top_k(logits, top)
    return (
        _host(values),
        _host(model.norm(hidden)),
        _host(model.embed(np.array([token]))[0, :]),
    )


def _host(array: Array) -> Floats:
    return np.asarray(to_numpy(array), np.float32)


@dataclass(frozen=True, kw_only=True)
class TextFeatures:
    """The small model's view of a text that another model wrote, one row per generated token.

    Attributes
    ----------
    choice : int64 (n,)
        What the small model would have written greedily.
    top_logits : float32 (n, top)
    hidden : float32 (n, D)
        After the final norm.
    """

    choice: IntArray
    top_logits: Floats
    hidden: Floats


NEEDS = Capability.ALL_LOGITS | Capability.HIDDEN | Capability.HEAD | Capability.ROLLBACK
CHUNK = 64  # positions whose logits are held at once


def text_features(
    model: Model, session: Session, prompt: Sequence[int], answer: Sequence[int], *, top: int
) -> TextFeatures:
    """Read ``prompt`` and ``answer`` with the small model, and return what the router would see.

    Parameters
    ----------
    model : Model
    session : Session
        Of that model, opened with :data:`NEEDS`.
    prompt, answer : sequence of int
        Token ids; the answer not empty.
    top : int
    """
    depth = model.info.layers
    if len(prompt) > 1:
        for begin in range(0, len(prompt) - 1, model.prefill_chunk):
            piece = np.asarray(prompt[begin : min(begin + model.prefill_chunk, len(prompt) - 1)])
            session.forward(Forward(keep=begin, tokens=piece[None], logits="none"))
    fed = [prompt[-1], *answer[:-1]]
    choices, tops, hiddens = [], [], []
    for begin in range(0, len(fed), CHUNK):
        ids = np.asarray(fed[begin : begin + CHUNK])
        keep = len(prompt) - 1 + begin
        out = session.forward(Forward(keep=keep, tokens=ids[None], logits="all", hidden=(depth,)))
        assert out.logits is not None
        values, places = top_k(out.logits[0, :, :], top)
        choices.append(to_numpy(places)[:, 0].astype(np.int64))
        tops.append(_host(values))
        hiddens.append(_host(model.norm(out.hidden[depth][0, :, :])))
    return TextFeatures(
        choice=np.concatenate(choices),
        top_logits=np.concatenate(tops),
        hidden=np.concatenate(hiddens),
    )
