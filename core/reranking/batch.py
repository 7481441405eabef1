"""Windows of different queries in the rows of one cache, and passages tokenised ahead of time.

Windows of one query follow from each other; those of different queries do not, so each row of a
cache works on a query of its own and takes the next one when it is done. Every call appends the
next part of each row's prompt. On an engine whose logits do not depend on what else is in the batch
(``ModelInfo.batch_invariant``) the rankings are those of one query after the other, bit for bit.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

import numpy as np

from ..errors import Cancelled, SteersmanError
from ..model import Capability, Forward, Session
from .first import First
from .generate import Generate
from .io import Request
from .ranking import Ranking
from .reader import Array, Steps, WindowReader
from .reranker import Reranker, WindowCall

OnCall = Callable[[Request, WindowCall], None]
Ranked = tuple[Request, Ranking | SteersmanError | None]

_NEEDS = Capability.ROWS | Capability.FORK | Capability.ROLLBACK
_WAITING = 4  # finished queries that may wait for an earlier one, per row


def rows_for(reranker: Reranker, wanted: int) -> int:
    """Return how many rows can work at once: ``wanted``, or 1 where model or method take one."""
    able = _NEEDS in reranker.model.capabilities and isinstance(reranker.method, First | Generate)
    return wanted if able else 1


def rank_each(
    reranker: Reranker,
    requests: Iterable[Request],
    *,
    rows: int = 1,
    skip: Callable[[Request], bool] = lambda request: False,
    top_k: int | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] | None = None,
    on_call: OnCall | None = None,
) -> Iterator[Ranked]:
    """Rank queries and yield each with its ranking or error, in the order they came.

    Parameters
    ----------
    reranker : Reranker
    requests : iterable of Request
        Read as it goes: at most ``4 * rows`` are held beyond the oldest unfinished one.
    rows : int
        Queries that are worked on at once.
    skip : callable
        Requests that are only passed through, with None.
    top_k, progress
        As in :meth:`Reranker.rank`; ``progress`` is told with ``rows=1`` alone.
    cancelled : callable
        Polled between calls of the model.
    on_call : callable, optional
        Called with the request and each compared window.

    Raises
    ------
    Cancelled
    """
    options = _Options(top_k, on_call)
    if rows_for(reranker, rows) > 1:
        yield from _Batch(reranker, rows, skip, cancelled, options).run(iter(requests))
        return
    for request in requests:
        if skip(request):
            yield request, None
            continue
        try:
            ranking = reranker.rank(
                request.query,
                [c.text for c in request.candidates],
                docids=[c.docid for c in request.candidates],
                scores=request.scores(),
                top_k=top_k,
                cancel=cancelled,
                progress=progress,
                on_call=options.told(request),
            )
        except Cancelled:
            raise
        except SteersmanError as error:
            yield request, error
            continue
        yield request, ranking


@dataclass(frozen=True)
class _Options:
    top_k: int | None
    on_call: OnCall | None

    def told(self, request: Request) -> Callable[[WindowCall], None] | None:
        on_call = self.on_call
        return None if on_call is None else lambda call: on_call(request, call)


@dataclass
class _Query:
    """A query that some row works on.

    Attributes
    ----------
    place : int
        Among all requests.
    ask : list of int or int
        What it waits for: a whole prompt, or one more token.
    """

    place: int
    request: Request
    reader: WindowReader
    steps: Steps[Ranking]
    ask: list[int] | int = 0
    keep: int = 0  # tokens of its row that stay
    left: list[int] = field(default_factory=list)  # to be appended


class _Batch:
    """The rows and who works in them."""

    def __init__(
        self,
        reranker: Reranker,
        size: int,
        skip: Callable[[Request], bool],
        cancelled: Callable[[], bool],
        options: _Options,
    ) -> None:
        self._reranker, self._model = reranker, reranker.model
        self._size, self._skip, self._cancelled = size, skip, cancelled
        self._options = options
        self._session: Session | None = None
        self._rows: list[_Query | None] = [None] * size
        self._found: dict[int, Ranked] = {}
        self._ended = False
        self._next = 0  # place of the next request
        self._told = 0  # place of the next result

    def run(self, requests: Iterator[Request]) -> Iterator[Ranked]:
        """Work until nothing is left."""
        try:
            while True:
                self._admit(requests)
                while self._told in self._found:
                    yield self._found.pop(self._told)
                    self._told += 1
                if not any(self._rows):
                    if self._ended:
                        return
                    continue
                try:
                    self._call()
                except Cancelled:
                    raise
                except SteersmanError:
                    # Too much at once, perhaps; a query that cannot be ranked will fail alone.
                    self._alone()
        finally:
            self.close()

    def close(self) -> None:
        """Free the cache and drop what was begun."""
        for query in filter(None, self._rows):
            query.steps.close()
        self._rows = [None] * self._size
        self._restart()

    def _restart(self) -> None:
        if self._session is not None:
            self._session.close()
            self._session = None

    # -- queries in and out ----------------------------------------------------------------

    def _admit(self, requests: Iterator[Request]) -> None:
        """Give free rows new queries."""
        for row, query in enumerate(self._rows):
            while query is None and self._next - self._told < _WAITING * self._size:
                request = next(requests, None)
                if request is None:
                    self._ended = True
                    return
                place, self._next = self._next, self._next + 1
                if self._skip(request):
                    self._found[place] = request, None
                    continue
                query = self._begin(place, request)
                self._rows[row] = query

    def _begin(self, place: int, request: Request) -> _Query | None:
        """Return a query at its first request for logits; None if it makes none."""
        reader = self._reranker.beside(self._open().context)
        steps = self._reranker.steps(
            reader,
            request.query,
            [c.text for c in request.candidates],
            docids=[c.docid for c in request.candidates],
            scores=request.scores(),
            top_k=self._options.top_k,
            on_call=self._options.told(request),
        )
        query = _Query(place, request, reader, steps)
        return query if self._go_on(query, lambda: next(steps)) else None

    def _go_on(self, query: _Query, resume: Callable[[], list[int] | int]) -> bool:
        """Take a query to its next request for logits; False if it is finished."""
        try:
            query.ask = resume()
        except StopIteration as stop:
            self._found[query.place] = query.request, stop.value
            return False
        except Cancelled:
            raise
        except SteersmanError as error:
            self._found[query.place] = query.request, error
            return False
        query.left = []
        return True

    def _alone(self) -> None:
        """Rank the queries at hand one by one, and start with an empty cache."""
        queries = [query for query in self._rows if query is not None]
        self.close()
        for query in queries:
            ((_, found),) = rank_each(
                self._reranker,
                [query.request],
                top_k=self._options.top_k,
                cancelled=self._cancelled,
                on_call=self._options.on_call,
            )
            self._found[query.place] = query.request, found
        self._reranker.close()

    # -- calls -----------------------------------------------------------------------------

    def _open(self) -> Session:
        if self._session is None:
            self._session = self._model.session(max_rows=self._size, needs=_NEEDS)
        return self._session

    def _check_cancel(self) -> None:
        if self._cancelled():
            raise Cancelled("rerank: cancelled")

    def _call(self) -> None:
        """Append the next part of every row, and serve those that are complete."""
        self._check_cancel()
        session = self._open()
        if session.batch < self._size:
            self._spread(session)
        chunk = self._model.prefill_chunk
        keep = np.zeros(self._size, np.int64)  # a row without a query is emptied
        parts: list[list[int]] = [[] for _ in self._rows]
        complete: list[int] = []
        for row, query in enumerate(self._rows):
            if query is None:
                continue
            if not query.left:
                self._plan(query, row, session)
            keep[row], parts[row] = query.keep, query.left[:chunk]
            query.keep += len(parts[row])
            query.left = query.left[chunk:]
            if not query.left:
                complete.append(row)
        tokens = np.full((self._size, max(map(len, parts))), -1, np.int64)
        for row, part in enumerate(parts):
            tokens[row, : len(part)] = part
        out = session.forward(
            Forward(keep=keep, tokens=tokens, logits="last" if complete else "none")
        )
        for row in complete:
            self._serve(row, out.logits)

    def _serve(self, row: int, logits: Array) -> None:
        query = self._rows[row]
        assert query is not None
        if isinstance(query.ask, list):
            query.reader.prompts.append(tuple(query.ask))
        if not self._go_on(query, lambda: query.steps.send(logits[row, :])):
            self._rows[row] = None

    @staticmethod
    def _plan(query: _Query, row: int, session: Session) -> None:
        """Say what of the row stays and what is appended."""
        counters = query.reader.counters
        if isinstance(query.ask, int):
            query.keep, query.left = int(session.lengths[row]), [query.ask]
            counters.generated_tokens += 1
            return
        query.keep = min(session.common_prefix(query.ask, row), len(query.ask) - 1)
        query.left = query.ask[query.keep :]
        counters.prompt_tokens += len(query.ask)
        counters.cached_tokens += query.keep

    def _spread(self, session: Session) -> None:
        """Compute the beginning that the first prompts share, once, and fork it to all rows."""
        prompts = [query.ask for query in self._rows if query is not None]
        shared = _common([ids for ids in prompts if isinstance(ids, list)])
        chunk = self._model.prefill_chunk
        for begin in range(0, len(shared), chunk):
            self._check_cancel()
            part = np.asarray([shared[begin : begin + chunk]], np.int64)
            session.forward(Forward(keep=begin, tokens=part, logits="none"))
        rows = np.zeros(self._size, np.int64)
        session.forward(Forward(keep=len(shared), rows=rows, logits="none"))


def _common(prompts: list[list[int]]) -> list[int]:
    """Return the ids that all prompts begin with, short of the last one of any."""
    if len(prompts) < 2:
        return []
    length = min(map(len, prompts)) - 1
    table = np.asarray([ids[:length] for ids in prompts], np.int64)
    differ = np.flatnonzero((table != table[0]).any(axis=0))
    return prompts[0][: int(differ[0]) if len(differ) else length]


def ahead(
    reranker: Reranker,
    requests: Iterable[Request],
    *,
    depth: int,
    skip: Callable[[Request], bool] = lambda request: False,
) -> Iterator[Request]:
    """Yield the requests, the next ``depth`` of which are being tokenised in a thread.

    The source is read in the caller's thread, ``depth`` requests ahead: not for a live pipe.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenise")
    queue: deque[tuple[Request, Future[None] | None]] = deque()

    def ready() -> Request:
        request, future = queue.popleft()
        if future is not None:
            wait([future])  # what failed there is tried again, and told, where it is needed
        return request

    try:
        for request in requests:
            texts = [c.text for c in request.candidates]
            future = None if skip(request) else pool.submit(reranker.warm, request.query, texts)
            queue.append((request, future))
            if len(queue) > depth:
                yield ready()
        while queue:
            yield ready()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
