"""From a window of passages to the logits after ``[``: prompt, fit, cache, one forward."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ..array import array_namespace, asarray_like, to_numpy
from ..decode.loop import prompt_chunks
from ..decode.sessions import reuse_prefix
from ..errors import BackendError, Cancelled, ContextOverflow, UsageError
from ..model import Capability, Forward, IntArray, Model, Session
from .encoding import PromptEncoder
from .prompt import Prompt, count_words, sanitise, shorten

Array = Any
Result = TypeVar("Result")
# A comparison asks for the logits after a whole prompt (ids) or after one more token, and is sent
# a row of them (V,), valid until its next request.
Steps = Generator[list[int] | int, Array, Result]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How one window was ordered.

    Attributes
    ----------
    order : tuple of int
        Places in the window, best first; a permutation.
    scores : tuple of float, or None
        One per place of the window, larger is better.
    response : str or None
        Generated text, where there is one.
    malformed : bool
        The answer was not a permutation of the identifiers.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...] | None = None
    response: str | None = None
    malformed: bool = False


@dataclass
class Counters:
    """Running totals of one ranking."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    malformed: int = 0
    windows: int = 0
    word_limit: int | None = None


@dataclass
class WindowReader:
    """Builds window prompts and reads them with one session of a model.

    Not for use by two threads at once; each opens its own on the shared model.

    Parameters
    ----------
    model : Model
    prompt : Prompt
    max_words : int
        Words of each passage, at least 1.
    cancelled : callable
        Polled between prompt chunks and between generated tokens.
    """

    model: Model
    prompt: Prompt = field(default_factory=Prompt)
    max_words: int = 300
    cancelled: Callable[[], bool] = lambda: False

    def __post_init__(self) -> None:
        if self.max_words < 1:
            raise UsageError(f"--max-words {self.max_words}: must be at least 1")
        self.model.require(Capability.LAST_LOGITS, who="rerank")
        self._encoder = PromptEncoder(self.model.tokenizer, self.prompt)
        self.identifiers = self._encoder.identifiers
        self.counters = Counters()
        self.prompts: list[tuple[int, ...]] = []  # of the window being compared
        self._session: Session | None = None
        self._context: int | None = None
        self._letters: Array | None = None

    def beside(self, context: int) -> WindowReader:
        """Return a reader of another query, for whoever feeds many at once.

        It shares what was tokenised and has counters of its own; it builds prompts for ``context``
        positions and reads none itself.
        """
        other = copy(self)
        other.counters, other.prompts = Counters(), []
        other._session, other._context = None, context
        return other

    def start(self) -> None:
        """Begin a new query: counters at zero.

        What another query left in the cache (the beginning that all prompts share) is reused if
        the engine's logits do not depend on how a prompt is cut into calls. Else the cache is
        emptied, so that a ranking never depends on what was ranked before it, and a resumed job
        gives what an uninterrupted one does.
        """
        self.counters = Counters()
        session = self._session
        if session is None or not session.lengths[0] or self.model.info.batch_invariant:
            return
        if Capability.ROLLBACK in self.model.capabilities:
            session.forward(Forward(keep=0, logits="none"))
        else:
            self.close()

    def close(self) -> None:
        """Free the cache; the model stays open."""
        if self._session is not None:
            self._session.close()
            self._session = None

    @property
    def context(self) -> int:
        """Positions that a prompt and its answer may take."""
        return self._open_session().context if self._context is None else self._context

    # -- prompts ---------------------------------------------------------------------------

    def encode(self, query: str, passages: Sequence[str], *, max_words: int) -> list[int]:
        """Return the ids of a window's prompt, with the assistant's turn open and ``[`` in it."""
        return self._encoder.encode(query, passages, max_words=max_words)

    def fit(self, query: str, passages: Sequence[str], *, reserve: int) -> list[int]:
        """Return the prompt's ids with as many words per passage as the context allows.

        Parameters
        ----------
        reserve : int
            Tokens to keep free for the answer.

        Raises
        ------
        ContextOverflow
            It does not fit even without a word of any passage.
        """
        room = self.context - reserve
        passages = [shorten(text, self.max_words) for text in passages]
        longest = max((count_words(sanitise(text)) for text in passages), default=0)
        # Starting above the longest passage would only repeat the same prompt.
        limit = min(self.max_words, longest)
        while True:
            ids = self.encode(query, passages, max_words=limit)
            overflow = len(ids) - room
            if overflow <= 0:
                return ids
            if limit == 0:
                raise ContextOverflow(
                    f"rerank: {len(passages)} passages need {len(ids)} tokens without their text "
                    f"and {room} are free; raise --ctx-size or lower --window-size"
                )
            limit = max(0, limit - max(1, overflow // (4 * len(passages))))
            counted = self.counters.word_limit
            self.counters.word_limit = limit if counted is None else min(counted, limit)

    def warm(self, query: str, passages: Sequence[str], *, window: int) -> None:
        """Tokenise a query's passages ahead of time; any thread may do so."""
        passages = [shorten(text, self.max_words) for text in passages]
        self._encoder.warm(query, passages, window=window, max_words=self.max_words)

    # -- calls -----------------------------------------------------------------------------

    def drive(self, steps: Steps[Result]) -> Result:
        """Give each request of ``steps`` its logits, and return what it comes to."""
        try:
            ask = next(steps)
            while True:
                ask = steps.send(self.append(ask) if isinstance(ask, int) else self.read(ask))
        except StopIteration as stop:
            result: Result = stop.value
            return result
        finally:
            steps.close()

    def read(self, ids: Sequence[int]) -> Array:
        """Read a prompt, reusing the prefix that the cache holds of it.

        Returns
        -------
        float32 array (V,)
            Logits for the token after the last one; valid until the next call.

        Raises
        ------
        Cancelled
            ``cancelled`` became true between two chunks.
        """
        session = self._open_session()
        tokens: IntArray = np.asarray(ids, np.int64)[None]
        ask, cached = reuse_prefix(session, Forward(keep=0, tokens=tokens))
        logits: Array = None
        for chunk in prompt_chunks(session, ask):
            self.check_cancel()
            logits = session.forward(chunk).logits
        self.counters.prompt_tokens += len(ids)
        self.counters.cached_tokens += cached
        self.prompts.append(tuple(int(i) for i in ids))
        return logits[0, :]

    def append(self, token: int) -> Array:
        """Append one generated token and return the next logits (V,)."""
        session = self._open_session()
        self.check_cancel()
        self.counters.generated_tokens += 1
        keep = int(session.lengths[0])
        out = session.forward(Forward(keep=keep, tokens=np.array([[token]], np.int64)))
        assert out.logits is not None
        return out.logits[0, :]

    def letter_logits(self, logits: Array, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Gather the first ``count`` identifiers' logits on the device; one copy to the host.

        Parameters
        ----------
        logits : float array (V,)
        count : int in 1..26

        Returns
        -------
        float64 array (count,)

        Raises
        ------
        BackendError
            A logit is not finite: the model or its precision is broken.
        """
        xp = array_namespace(logits)
        if self._letters is None:
            self._letters = asarray_like(
                np.asarray(self.identifiers.letters, np.int64), logits, dtype=xp.int64
            )
        values = to_numpy(xp.take(logits, self._letters[:count], axis=0)).astype(np.float64)
        if not np.isfinite(values).all():
            raise BackendError(
                f"rerank: {self.model.info.name} on {self.model.info.backend} gave logits that are "
                "not finite; try another --dtype"
            )
        return values

    def check_cancel(self) -> None:
        """Raise Cancelled if the caller asked to stop."""
        if self.cancelled():
            raise Cancelled("rerank: cancelled")

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, control tokens by name."""
        tokenizer = self.model.tokenizer
        return b"".join(tokenizer.token_bytes(int(i)) for i in ids).decode(errors="replace")

    def _open_session(self) -> Session:
        if self._session is None:
            self._session = self.model.session(needs=Capability.NONE)
        return self._session
