"""From texts to vectors and bags of words: one forward pass per text, many texts per call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from ..array import array_namespace, to_numpy
from ..errors import BackendError, Cancelled, UsageError, did_you_mean
from ..model import PAD, Capability, Forward, Model, Session
from .prompt import Kind, WordEncoder, WordPrompt
from .sparse import (
    Bag,
    FloatArray,
    centre,
    gather_weights,
    quantise,
    saturate,
    strongest,
)
from .words import STOP_WORDS, TokensOfWords

Array = Any
EMPTY_TOKENS = 10  # of the whole vocabulary, for a text without a word of its own
IMPACT_SCALE = 100.0


@dataclass(frozen=True, kw_only=True)
class PromptReps:
    """What a representation depends on beside the model.

    Parameters
    ----------
    prompt : WordPrompt
    max_tokens : int
        Tokens that the model reads of each text; the words of the bag come from the whole text.
    dense : bool
        Make a vector, the hidden state of the prompt's last position after the final norm.
    keep : int
        Most tokens of a bag.
    expansion : int
        Tokens that are no word of the text added to a bag: the strongest lower-case ones.
    stop_words : {"english", "none"}
    centred : bool
        Subtract the median logit first. *Ours*, for models with few positive logits.

    References
    ----------
    Zhuang et al., "PromptReps: Prompting Large Language Models to Generate Dense and Sparse
    Representations for Zero-Shot Document Retrieval", arXiv:2404.18424.
    """

    prompt: WordPrompt = field(default_factory=WordPrompt)
    max_tokens: int = 512
    dense: bool = True
    keep: int = 128
    expansion: int = 0
    stop_words: str = "english"
    centred: bool = False

    def __post_init__(self) -> None:
        for name, low in (("max_tokens", 1), ("keep", 1), ("expansion", 0)):
            if getattr(self, name) < low:
                raise UsageError(f"{name}: must be at least {low}, got {getattr(self, name)}")
        if self.stop_words not in STOP_WORDS:
            known = did_you_mean(self.stop_words, STOP_WORDS)
            raise UsageError(f"stop_words: {self.stop_words!r}{known}")

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Representation:
    """One text.

    Attributes
    ----------
    dense : float32 array (D,), or None
        Of length 1.
    sparse : Bag
    """

    dense: FloatArray | None
    sparse: Bag


class Representer:
    """Represents texts with one session of a model. Not for two threads at once.

    Texts of like length share a call, the head of the prompt is computed once and kept in the
    cache, and nothing is held but one call's arrays.

    Parameters
    ----------
    model : Model
    settings : PromptReps
        ``dense`` needs HIDDEN and HEAD of the model.
    rows : int
        Most texts per call; 1 where the engine cannot fork rows.
    call_tokens : int
        Most tokens per call, padding included: what bounds memory and how soon a cancel is seen.
        A longer text goes alone, in chunks.
    cancelled : callable
        Polled between calls.
    """

    def __init__(
        self,
        model: Model,
        settings: PromptReps | None = None,
        *,
        rows: int = 8,
        call_tokens: int = 2048,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.model = model
        self.settings = settings or PromptReps()
        self.cancelled = cancelled
        self._needs = Capability.LAST_LOGITS
        if self.settings.dense:
            self._needs |= Capability.HIDDEN | Capability.HEAD
        model.require(self._needs, who="retrieval")
        if rows < 1 or call_tokens < 1:
            raise UsageError("retrieval: rows and call_tokens must be at least 1")
        batches = Capability.ROWS | Capability.FORK | Capability.ROLLBACK
        self.rows = rows if batches in model.capabilities else 1
        self.call_tokens = max(call_tokens, 1)
        self.encoder = WordEncoder(
            model.tokenizer, self.settings.prompt, max_tokens=self.settings.max_tokens
        )
        self.encoder.check_context(model.info.context)
        self._tokens_of = TokensOfWords(model.tokenizer, self.settings.stop_words)
        self._expandable: set[int] | None = None
        self._session: Session | None = None
        self._kind: Kind | None = None
        self.tokens_read = 0

    # -- the way in ----------------------------------------------------------------------------

    def represent(
        self,
        texts: Sequence[str],
        kind: Kind = "passage",
        *,
        progress: Callable[[int], None] | None = None,
    ) -> list[Representation]:
        """Return the representations of texts, in their order.

        Raises
        ------
        BackendError
            A logit or a hidden state is not finite.
        Cancelled
        """
        rests = [self.encoder.rest(text, kind) for text in texts]
        found: dict[int, Representation] = {}
        for places in self._calls([len(rest) for rest in rests]):
            if self.cancelled():
                raise Cancelled("retrieval: cancelled")
            logits, hidden = self._read([rests[i] for i in places], kind)
            bags = self.bags(logits, [texts[i] for i in places])
            vectors = [None] * len(places) if hidden is None else list(unit(hidden))
            for i, bag, vector in zip(places, bags, vectors):
                found[i] = Representation(dense=vector, sparse=bag)
            if progress is not None:
                progress(len(places))
        return [found[i] for i in range(len(texts))]

    def close(self) -> None:
        """Free the cache; the model stays open."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def __enter__(self) -> Representer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # -- the model -----------------------------------------------------------------------------

    def _calls(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        """Yield the places that share a call: like lengths together, so that little is padding."""
        order = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
        call: list[int] = []
        for i in order:
            full = len(call) >= self.rows or lengths[i] * (len(call) + 1) > self.call_tokens
            if call and full:
                yield call
                call = []
            call.append(i)
        if call:
            yield call

    def _read(self, rests: Sequence[Sequence[int]], kind: Kind) -> tuple[Array, Array | None]:
        """Return logits (B, V) and normed hidden states (B, D) at each prompt's last position."""
        session = self._with_head(kind)
        start, batch = len(self.encoder.head(kind)), len(rests)
        layer = self.model.info.layers
        wanted = (layer,) if self.settings.dense else ()
        lengths = np.array([len(rest) for rest in rests])
        tokens = np.full((batch, int(lengths.max())), PAD, np.int64)
        for b, rest in enumerate(rests):
            tokens[b, : len(rest)] = rest
        self.tokens_read += int(lengths.sum())
        rows = np.zeros(batch, np.int64) if self.rows > 1 else None
        keep = start
        if batch == 1:  # a long text in chunks, so that a cancel is noticed
            size = min(self.model.prefill_chunk, self.call_tokens)
            while tokens.shape[1] > size:
                piece, tokens = tokens[:, :size], tokens[:, size:]
                session.forward(Forward(keep=keep, rows=rows, tokens=piece, logits="none"))
                keep, rows = keep + size, None
                if self.cancelled():
                    raise Cancelled("retrieval: cancelled")
            lengths = np.array([tokens.shape[1]])
        out = session.forward(Forward(keep=keep, rows=rows, tokens=tokens, hidden=wanted))
        assert out.logits is not None
        if not wanted:
            return out.logits, None
        states = out.hidden[layer]
        xp = array_namespace(states)
        last = xp.stack([states[b, int(lengths[b]) - 1, :] for b in range(batch)])
        return out.logits, self.model.norm(last)

    def _with_head(self, kind: Kind) -> Session:
        """Return the session with the head of the prompt in its first row."""
        head = self.encoder.head(kind)
        if self._session is None:
            needs = Capability.HIDDEN if self.settings.dense else Capability.NONE
            if self.rows > 1:
                needs |= Capability.ROWS | Capability.FORK
            longest = max(len(h) + len(t) for h, t in self.encoder.parts.values())
            context = min(self.model.info.context, longest + self.settings.max_tokens)
            self._session = self.model.session(max_rows=self.rows, needs=needs, context=context)
            self._kind = None
        session = self._session
        held = self._kind == kind and session.common_prefix(head) == len(head)
        partial = Capability.ROLLBACK in self.model.capabilities
        if not held or not (partial or session.lengths[0] == len(head)):
            rows = np.zeros(1, np.int64) if self.rows > 1 else None
            ids = np.asarray(head, np.int64)[None]
            if head:
                session.forward(Forward(keep=0, rows=rows, tokens=ids, logits="none"))
            else:
                session.forward(Forward(keep=0, rows=rows, logits="none"))
            self._kind = kind
        return session

    # -- bags of words -------------------------------------------------------------------------

    def bags(self, logits: Array, texts: Sequence[str]) -> list[Bag]:
        """Return the bags of texts from the logits behind their prompts.

        Parameters
        ----------
        logits : float array (B, V)
        texts : B texts
            Whole, uncut.
        """
        if self.settings.centred:
            logits = centre(logits)
        weights = saturate(logits)
        tokens = [self._tokens_of(text) for text in texts]
        gathered = gather_weights(weights, tokens)
        bags = []
        for b, (ids, values) in enumerate(zip(tokens, gathered)):
            if not np.isfinite(values).all():
                raise BackendError(_not_finite(self.model, "logits"))
            best = strongest(values, self.settings.keep)
            ids, values = [ids[i] for i in best], values[best]
            if not ids or self.settings.expansion:
                every = to_numpy(weights[b, :]).astype(np.float32)
                if not np.isfinite(every).all():
                    raise BackendError(_not_finite(self.model, "logits"))
                ids, values = self._widened(ids, values, every)
            bags.append(quantise(ids, values, keep=len(ids), scale=IMPACT_SCALE))
        return bags

    def _widened(
        self, ids: list[int], values: FloatArray, every: FloatArray
    ) -> tuple[list[int], FloatArray]:
        """Return a bag with the vocabulary's strongest tokens in it, as the settings ask."""
        if not ids:
            chosen = [int(i) for i in strongest(every, EMPTY_TOKENS)]
            return chosen, every[chosen]
        outside = self._lowercase_tokens() - set(ids)
        if not outside:
            return ids, values
        candidates = np.array(sorted(outside), np.int64)
        best = candidates[strongest(every[candidates], self.settings.expansion)]
        return [*ids, *(int(i) for i in best)], np.concatenate([values, every[best]])

    def _lowercase_tokens(self) -> set[int]:
        """Return the ids whose bytes are a word that begins with a-z, perhaps after one blank."""
        if self._expandable is None:
            tokenizer = self.model.tokenizer
            found = set()
            for token in range(tokenizer.vocab_size):
                if token in tokenizer.special_ids:
                    continue
                text = tokenizer.token_bytes(token).decode(errors="replace").removeprefix(" ")
                if text.isalnum() and "a" <= text[0] <= "z":
                    found.add(token)
            self._expandable = found
        return self._expandable


def unit(hidden: Array) -> FloatArray:
    """Return hidden states (B, D) as float32 rows of length 1 on the host.

    Raises
    ------
    BackendError
        A row is not finite, or zero.
    """
    rows = to_numpy(hidden).astype(np.float32)
    lengths = np.linalg.norm(rows.astype(np.float64), axis=-1, keepdims=True)
    if not (np.isfinite(lengths).all() and (lengths > 0).all()):
        raise BackendError(
            "retrieval: a hidden state is zero or not finite; try another --dtype, or --no-dense"
        )
    return np.asarray(rows / lengths, np.float32)


def _not_finite(model: Model, what: str) -> str:
    return (
        f"retrieval: {model.info.name} on {model.info.backend} gave {what} that are not finite; "
        "try another --dtype"
    )
