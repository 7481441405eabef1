"""An index as it is searched: dense, sparse, or both fused."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import UsageError
from ..fusion import fuse_hybrid, ranked
from ..model import Model
from .manifest import check_settings, engine_of, read_manifest, reps_of, settings_of
from .represent import Representation, Representer
from .segments import Segment
from .sparse import Bag
from .vectors import FloatArray, Graph, inner_products, nearest

Mode = Literal["hybrid", "dense", "sparse"]
MODES: tuple[Mode, ...] = ("hybrid", "dense", "sparse")
DEPTH = 1000


@dataclass(frozen=True, kw_only=True)
class Hit:
    """A document found.

    Attributes
    ----------
    docid : str
    rank : int
        From 1.
    score : float
        Cosine (dense), inner product of whole-number impacts (sparse), or the weighted sum of both
        lists' scores, each brought to 0..1 (hybrid). Not comparable between queries.
    text : str
    """

    docid: str
    rank: int
    score: float
    text: str


class Index:
    """An index folder, opened for reading.

    Parameters
    ----------
    folder : Path

    Raises
    ------
    MissingFile, InvalidInput
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.settings = reps_of(self.manifest, self.folder)
        self.segments = [Segment(self.folder / n, count) for n, count in self.manifest.segments]
        self._begins = [0]
        for segment in self.segments:
            self._begins.append(self._begins[-1] + segment.count)

    def __len__(self) -> int:
        return self._begins[-1]

    @property
    def complete(self) -> bool:
        """False while a build or an addition is unfinished; what it has done can be searched."""
        return self.manifest.job is None

    def _at(self, place: int) -> tuple[Segment, int]:
        number = bisect.bisect_right(self._begins, place) - 1
        return self.segments[number], place - self._begins[number]

    def docid(self, place: int) -> str:
        """Return the id of the document at a place, 0..len-1."""
        segment, inside = self._at(place)
        return segment.ids[inside]

    @cached_property
    def places(self) -> dict[str, int]:
        """Place of each document by its id."""
        ids = [docid for segment in self.segments for docid in segment.ids]
        return {docid: place for place, docid in enumerate(ids)}

    def text(self, docid: str) -> str:
        """Return a document's text."""
        segment, inside = self._at(self.places[docid])
        return segment.text(inside)

    # -- searching by representations ------------------------------------------------------------

    def dense(self, vector: FloatArray, depth: int = DEPTH) -> dict[str, float]:
        """Return the ``depth`` documents of largest cosine, best first.

        Exact, except for the documents that an approximate graph was built over.
        """
        if not self.settings.dense:
            raise UsageError(f"{self.folder}: was built without vectors; search with --mode sparse")
        found: dict[int, float] = {}
        covered = 0
        if self._graph is not None:
            covered = len(self._graph)
            for place in self._graph.nearest(vector, depth):
                segment, inside = self._at(int(place))
                found[int(place)] = float(inner_products(segment.dense, [inside], vector)[0])
        for begin, segment in zip(self._begins, self.segments):
            skipped = max(0, covered - begin)
            if skipped >= segment.count:
                continue
            matrix = segment.dense[skipped:]
            near = nearest(matrix, vector, depth)
            for place, score in zip(near, inner_products(matrix, near, vector)):
                found[begin + skipped + int(place)] = float(score)
        return self._top(list(found), list(found.values()), depth)

    def sparse(self, bag: Bag, depth: int = DEPTH) -> dict[str, float]:
        """Return the ``depth`` documents of largest inner product above 0, best first."""
        tokens, impacts = bag.tokens.tolist(), bag.impacts.tolist()
        places: list[int] = []
        values: list[float] = []
        for begin, segment in zip(self._begins, self.segments):
            scores = np.zeros(segment.count, np.int64)
            segment.add_scores(scores, tokens, impacts)
            hits = np.flatnonzero(scores)
            if len(hits) > depth:  # ties at the edge go to what stands first
                hits = hits[np.argsort(-scores[hits], kind="stable")[:depth]]
            places += (hits + begin).tolist()
            values += scores[hits].astype(float).tolist()
        return self._top(places, values, depth)

    def _top(self, places: Sequence[int], scores: Sequence[float], depth: int) -> dict[str, float]:
        pairs = ranked({self.docid(place): score for place, score in zip(places, scores)})
        return dict(pairs[:depth])

    @cached_property
    def _graph(self) -> Graph | None:
        if self.manifest.graph is None:
            return None
        name, count = self.manifest.graph
        width = int(self.manifest.settings["width"])
        return Graph.read(self.folder / name, width=width, count=count)

    def runs(
        self, query: Representation, mode: Mode = "hybrid", *, depth: int = DEPTH
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Return the dense and the sparse list of a query; empty the one ``mode`` leaves out."""
        dense: dict[str, float] = {}
        if mode != "sparse":
            if query.dense is None:
                raise UsageError("search: the query has no vector; search with --mode sparse")
            dense = self.dense(query.dense, depth)
        return dense, {} if mode == "dense" else self.sparse(query.sparse, depth)


class Searcher:
    """Answers queries from an index with the model it was built with.

    Parameters
    ----------
    model : Model
        Must have the weights and the chat template that the index was built with.
    index : Index, str or Path
    mode : {"hybrid", "dense", "sparse"}
        "hybrid" is "sparse" for an index without vectors.
    depth : int
        Documents taken from each of the two lists.
    alpha : float in 0..1
        Weight of the dense list in a hybrid search.
    remove_query : bool
        Leave out a document whose id is the query's own, as BEIR does. After normalisation, so the
        other scores do not change.
    rows : int
        Queries per call of the model.

    Attributes
    ----------
    engine_differs : str
        Says how engine or number format differ from those of the index; empty if they do not. The
        representations then differ by rounding.

    Raises
    ------
    InvalidInput
        The index was made with another model or template; the message says what differs.
    """

    def __init__(
        self,
        model: Model,
        index: Index | str | Path,
        *,
        mode: Mode = "hybrid",
        depth: int = DEPTH,
        alpha: float = 0.5,
        remove_query: bool = False,
        rows: int = 8,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.index = index if isinstance(index, Index) else Index(index)
        if mode not in MODES:
            raise UsageError(f"mode: must be one of {', '.join(MODES)}, got {mode!r}")
        if depth < 1:
            raise UsageError(f"depth: must be at least 1, got {depth}")
        if not 0 <= alpha <= 1:
            raise UsageError(f"alpha: must be in 0..1, got {alpha}")
        settings = self.index.settings
        self.mode: Mode = "sparse" if mode == "hybrid" and not settings.dense else mode
        if self.mode == "dense" and not settings.dense:
            raise UsageError(f"{self.index.folder}: was built without vectors; use --mode sparse")
        self.depth, self.alpha, self.remove_query = depth, alpha, remove_query
        self.representer = Representer(model, settings, rows=rows, cancelled=cancelled)
        now = settings_of(model, settings, self.representer.encoder)
        check_settings(self.index.folder, self.index.manifest.settings, now)
        made, opened = self.index.manifest.engine, engine_of(model)
        differ = [k for k in ("backend", "dtype") if made.get(k) != opened.get(k)]
        self.engine_differs = "; ".join(f"{k} was {made.get(k)}, is {opened[k]}" for k in differ)

    def search(self, queries: Sequence[tuple[str, str]], *, k: int = 10) -> list[list[Hit]]:
        """Return the ``k`` best documents of each ``(id, text)``, best first."""
        found = self.representer.represent([text for _, text in queries], "query")
        return [self._hits(qid, query, k) for (qid, _), query in zip(queries, found)]

    def _hits(self, qid: str, query: Representation, k: int) -> list[Hit]:
        dense, sparse = self.index.runs(query, self.mode, depth=self.depth)
        if self.mode == "hybrid":
            pairs = fuse_hybrid(dense, sparse, self.alpha)
        else:
            pairs = list((dense or sparse).items())
        if self.remove_query:
            pairs = [(docid, score) for docid, score in pairs if docid != qid]
        return [
            Hit(docid=docid, rank=rank, score=score, text=self.index.text(docid))
            for rank, (docid, score) in enumerate(pairs[:k], start=1)
        ]

    def close(self) -> None:
        """Free the model's cache."""
        self.representer.close()

    def __enter__(self) -> Searcher:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def open_index(folder: str | Path) -> Index:
    """Open an index for reading; see :class:`Index`."""
    return Index(folder)


def search(
    model: Model, index: Index | str | Path, query: str, *, k: int = 10, **options: Any
) -> list[Hit]:
    """Return the ``k`` best documents of an index for one query.

    Parameters
    ----------
    model : Model
    index : Index, str or Path
    query : str
    k : int
    **options
        As of :class:`Searcher`, to be kept for many queries.
    """
    with Searcher(model, index, **options) as searcher:
        return searcher.search([("", query)], k=k)[0]
