"""The nearest vectors, by usearch: exactly, or through a graph where there are many."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput, MissingDependency

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]


def library() -> Any:
    """Return the module ``usearch.index``, imported when first needed.

    Raises
    ------
    MissingDependency
    """
    try:
        import usearch.index
    except ImportError:
        raise MissingDependency(
            'usearch: not installed; run: pip install "steersman[search]", or use --mode sparse'
        ) from None
    return usearch.index


def nearest(matrix: FloatArray, query: FloatArray, count: int) -> IntArray:
    """Return the places of the ``count`` rows with the largest inner product, exactly."""
    count = min(count, len(matrix))
    if not count:
        return np.zeros(0, np.int64)
    index = library()
    found = index.search(matrix, query, count, index.MetricKind.IP, exact=True, threads=1)
    return np.asarray(found.keys, np.int64).reshape(-1)


class Graph:
    """A navigable small-world graph over the first vectors of an index; answers approximately."""

    def __init__(self, width: int) -> None:
        self._index = library().Index(ndim=width, metric="ip", dtype="f32")

    @classmethod
    def read(cls, path: Path, *, width: int, count: int) -> Graph:
        """Open a graph, mapped into memory.

        Raises
        ------
        InvalidInput
            Damaged, or of another size than the index says.
        """
        graph = cls(width)
        try:
            graph._index = library().Index.restore(str(path), view=False)
        except Exception as error:
            raise InvalidInput(f"{path}: damaged ({error}); build the index again") from None
        if graph._index is None or graph._index.ndim != width or len(graph) != count:
            raise InvalidInput(f"{path}: is not the graph of this index; build the index again")
        return graph

    def __len__(self) -> int:
        return len(self._index)

    def add(self, first: int, vectors: FloatArray) -> None:
        """Add vectors with the keys ``first``, ``first + 1``, ..."""
        keys = np.arange(first, first + len(vectors), dtype=np.uint64)
        self._index.add(keys, np.asarray(vectors))

    def write(self, path: Path) -> None:
        """Write to a file."""
        self._index.save(str(path))

    def nearest(self, query: FloatArray, count: int) -> IntArray:
        """Return the places of about the ``count`` nearest vectors."""
        # The library's default breadth is made for a handful of neighbours.
        self._index.expansion_search = max(64, 2 * count)
        found = self._index.search(query, min(count, len(self)))
        return np.asarray(found.keys, np.int64).reshape(-1)


def inner_products(matrix: FloatArray, places: Sequence[int] | IntArray, query: FloatArray) -> Any:
    """Return the inner products of some rows with a query, float32."""
    return np.asarray(matrix[np.asarray(places, np.int64)] @ query, np.float32)
