"""Rank a whole list with a listwise method, window by window."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, Self

from ..errors import UsageError, did_you_mean
from ..fusion import reciprocal_ranks
from ..model import Model
from .first import First
from .generate import Generate
from .prompt import Prompt
from .ranking import Ranking, Usage, slot_scores
from .reader import Comparison, Steps, WindowReader
from .windows import check_window, windows

Cancel = Callable[[], bool] | threading.Event


class Method(Protocol):
    """A listwise comparison of one window."""

    @property
    def logit_kind(self) -> str:
        """What its scores are: "logit", "calibrated_logit" or "none"."""

    def compare(self, reader: WindowReader, query: str, passages: Sequence[str]) -> Comparison:
        """Order one window of 2..26 passages."""


METHODS: dict[str, type[First] | type[Generate]] = {"first": First, "generate": Generate}


@dataclass(frozen=True, kw_only=True)
class WindowCall:
    """One compared window, for a history of model calls.

    Attributes
    ----------
    begin, end : int
        The window's places in the list.
    indices : tuple of int
        Passages in it, in the order they were shown; the first was ``[A]``.
    order : tuple of int
        The same indices, best first.
    scores : tuple of float, or None
    prompts : tuple of str
        The exact text of each prompt, control tokens by name.
    response : str or None
        Generated text, for methods that generate.
    malformed : bool
    prompt_tokens, generated_tokens : int
    seconds : float
    """

    begin: int
    end: int
    indices: tuple[int, ...]
    order: tuple[int, ...]
    scores: tuple[float, ...] | None
    prompts: tuple[str, ...]
    response: str | None
    malformed: bool
    prompt_tokens: int
    generated_tokens: int
    seconds: float


class Reranker:
    """A listwise method on a model, with one cache, for many queries.

    Not for use by two threads at once; open one per thread on the shared model.

    Parameters
    ----------
    model : Model
    method : str or Method
        "first" (:class:`First`), "generate" (:class:`Generate`), or an object that compares.
    window : int
        Passages compared at once, 2..26.
    stride : int, optional
        How far the window moves, 1..window; half the window if None (20 and 10 in the papers).
    passes : int
        How often the whole list is gone through.
    max_words : int
        Words kept of each passage.
    prompt : Prompt, optional
        Wording; a neutral one for untrained models if None.
    first_stage_weight : float
        Weight of the first stage's order against the model's in the final order, by reciprocal
        rank fusion (:func:`..fusion.reciprocal_ranks`): 1 trusts both alike, 0 the model alone. A
        small model that ranks better than chance but knows less than the first stage helps this
        way where it would harm by itself. Passages that come without scores have no first stage:
        for them the model alone decides.

    Raises
    ------
    UsageError, CapabilityError, InvalidInput
        At construction, before any model call.
    """

    def __init__(
        self,
        model: Model,
        *,
        method: str | Method = "first",
        window: int = 20,
        stride: int | None = None,
        passes: int = 1,
        max_words: int = 300,
        prompt: Prompt | None = None,
        first_stage_weight: float = 0.0,
    ) -> None:
        if not 0 <= first_stage_weight < float("inf"):
            raise UsageError(
                f"--first-stage-weight {first_stage_weight}: must be a number of at least 0"
            )
        self.first_stage_weight = first_stage_weight
        stride = max(1, window // 2) if stride is None else stride
        check_window(window, stride, passes)
        if isinstance(method, str):
            if method not in METHODS:
                raise UsageError(f"--method {method!r}: unknown{did_you_mean(method, METHODS)}")
            chosen: Method = METHODS[method]()
            self.name = method
        else:
            chosen = method
            self.name = type(method).__name__.lower()
        self.method = chosen
        self.window, self.stride, self.passes = window, stride, passes
        self.model, self.max_words, self.prompt = model, max_words, prompt or Prompt()
        self._reader = WindowReader(model, prompt=self.prompt, max_words=max_words)

    def rank(
        self,
        query: str,
        passages: Sequence[str],
        *,
        docids: Sequence[str] | None = None,
        scores: Sequence[float] | None = None,
        top_k: int | None = None,
        cancel: Cancel | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_call: Callable[[WindowCall], None] | None = None,
    ) -> Ranking:
        """Order passages by relevance to ``query``.

        Parameters
        ----------
        query : str
        passages : sequence of str (n,)
            In first-stage order, best first. Any number; empty and repeated ones are fine.
        docids : sequence of str (n,), optional
        scores : sequence of float (n,), optional
            First-stage scores: they become the slot scores of the result.
        top_k : int, optional
            Return only the best ``top_k``.
        cancel : callable or threading.Event, optional
            Polled between prompt chunks.
        progress : callable, optional
            Called with (windows done, windows in all).
        on_call : callable, optional
            Called with each compared window.

        Raises
        ------
        UsageError
            Lengths disagree.
        ContextOverflow
            A window does not fit into the context even with empty passages.
        Cancelled
        """
        reader = self._reader
        reader.cancelled = poll(cancel)
        reader.start()
        return reader.drive(
            self.steps(
                reader,
                query,
                passages,
                docids=docids,
                scores=scores,
                top_k=top_k,
                progress=progress,
                on_call=on_call,
            )
        )

    def steps(
        self,
        reader: WindowReader,
        query: str,
        passages: Sequence[str],
        *,
        docids: Sequence[str] | None = None,
        scores: Sequence[float] | None = None,
        top_k: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        on_call: Callable[[WindowCall], None] | None = None,
    ) -> Steps[Ranking]:
        """Do what :meth:`rank` does, asking for logits instead of calling the model.

        A method without ``steps`` of its own calls the model through ``reader``.
        """
        n = len(passages)
        for name, given in (("docids", docids), ("scores", scores)):
            if given is not None and len(given) != n:
                raise UsageError(f"rerank: {len(given)} {name} for {n} passages")
        if top_k is not None and top_k < 0:
            raise UsageError(f"top_k: must be at least 0, got {top_k}")
        begun = time.perf_counter()
        slots = slot_scores(scores, n)
        order = list(range(n))
        logits: list[float | None] = [None] * n
        plan = windows(n, self.window, self.stride) * self.passes
        for done, (begin, end) in enumerate(plan):
            if progress is not None:
                progress(done, len(plan))
            if end - begin < 2:
                continue  # one passage has one order
            shown = order[begin:end]
            counters = replace(reader.counters)
            since = time.perf_counter()
            reader.prompts.clear()
            texts = [passages[i] for i in shown]
            if isinstance(self.method, First | Generate):
                found = yield from self.method.steps(reader, query, texts)
            else:
                found = self.method.compare(reader, query, texts)
            if sorted(found.order) != list(range(len(shown))):
                raise UsageError(f"rerank: method {self.name} did not return a permutation")
            reader.counters.windows += 1
            order[begin:end] = [shown[place] for place in found.order]
            if found.scores is not None:
                for index, score in zip(shown, found.scores):
                    logits[index] = score
            if on_call is not None:
                on_call(
                    WindowCall(
                        begin=begin,
                        end=end,
                        indices=tuple(shown),
                        order=tuple(order[begin:end]),
                        scores=found.scores,
                        prompts=tuple(reader.text(ids) for ids in reader.prompts),
                        response=found.response,
                        malformed=found.malformed,
                        prompt_tokens=reader.counters.prompt_tokens - counters.prompt_tokens,
                        generated_tokens=(
                            reader.counters.generated_tokens - counters.generated_tokens
                        ),
                        seconds=time.perf_counter() - since,
                    )
                )
        if progress is not None:
            progress(len(plan), len(plan))
        if self.first_stage_weight and scores is not None:
            order = reciprocal_ranks([range(n), order], [self.first_stage_weight, 1.0])
        ranking = Ranking(
            indices=tuple(order),
            scores=tuple(slots),
            logits=tuple(logits[index] for index in order),
            logit_kind=self.method.logit_kind,
            method=self.name,
            docids=None if docids is None else tuple(docids[index] for index in order),
            usage=Usage(**asdict(reader.counters), seconds=time.perf_counter() - begun),
        )
        return ranking if top_k is None else ranking.top_k(top_k)

    def beside(self, context: int) -> WindowReader:
        """Return what :meth:`steps` takes, for a query that runs beside others."""
        return self._reader.beside(context)

    def warm(self, query: str, passages: Sequence[str]) -> None:
        """Tokenise a query's passages before :meth:`rank` needs them; any thread may do so."""
        self._reader.warm(query, passages, window=self.window)

    def close(self) -> None:
        """Free the cache; the model stays open."""
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def poll(cancel: Cancel | None) -> Callable[[], bool]:
    """Return what says whether to stop."""
    if cancel is None:
        return lambda: False
    return cancel.is_set if isinstance(cancel, threading.Event) else cancel


def rerank(
    model: Model,
    query: str,
    passages: Sequence[str],
    *,
    method: str | Method = "first",
    window: int = 20,
    stride: int | None = None,
    passes: int = 1,
    max_words: int = 300,
    prompt: Prompt | None = None,
    first_stage_weight: float = 0.0,
    **options: Any,
) -> Ranking:
    """Order passages by relevance to a query with a language model.

    For many queries keep a :class:`Reranker`. Parameters are those of :class:`Reranker`; further
    ``options`` (``docids``, ``scores``, ``top_k``, ``cancel``, ``progress``) are those of
    :meth:`Reranker.rank`.

    Returns
    -------
    Ranking
        ``indices`` best first, slot ``scores`` and the model's ``logits``.

    Examples
    --------
    >>> ranking = rerank(model, "what do fleas eat", ["Tax law", "Fleas feed on blood"])
    >>> ranking[0].index, ranking[0].logit
    """
    with Reranker(
        model,
        method=method,
        window=window,
        stride=stride,
        passes=passes,
        max_words=max_words,
        prompt=prompt,
        first_stage_weight=first_stage_weight,
    ) as reranker:
        return reranker.rank(query, passages, **options)
