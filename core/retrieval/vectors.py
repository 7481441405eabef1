"""The nearest vectors, by faiss: exactly, or through a graph where there are many."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import BackendError, InvalidInput, MissingDependency

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
NEIGHBOURS = 32  # of each vector in the graph


def library() -> Any:
    """Return the module ``faiss``, imported when first needed.

    Raises
    ------
    MissingDependency

    Notes
    -----
    Not usearch: its wheel for Linux brings a C++ library of its own, and llama.cpp can then load no
    model in the same process (``std::bad_cast``; usearch 2.26.6, llama-cpp-python 0.3.36).
    """
    try:
        import faiss
    except ImportError:
        raise MissingDependency(
            'faiss-cpu: not installed; run: pip install "steersman[search]", or use --mode sparse '
            "(for an index: --no-dense)"
        ) from None
    return faiss


def nearest(matrix: FloatArray, query: FloatArray, count: int) -> IntArray:
    """Return the places of the ``count`` rows with the largest inner product, exactly."""
    count = min(count, len(matrix))
    if not count:
        return np.zeros(0, np.int64)
    faiss = library()
    metric = faiss.METRIC_INNER_PRODUCT
    _, places = faiss.knn(query[None], np.ascontiguousarray(matrix), count, metric=metric)
    return np.asarray(places[0], np.int64)


class Graph:
    """A navigable small-world graph over the first vectors of an index; answers approximately."""

    def __init__(self, width: int) -> None:
        faiss = library()
        self._index = faiss.IndexHNSWFlat(width, NEIGHBOURS, faiss.METRIC_INNER_PRODUCT)

    @classmethod
    def read(cls, path: Path, *, width: int, count: int) -> Graph:
        """Read a graph into memory.

        Raises
        ------
        InvalidInput
            Damaged, or of another size than the index says.
        """
        graph = cls.__new__(cls)
        try:
            graph._index = library().read_index(str(path))
        except RuntimeError:
            raise InvalidInput(f"{path}: damaged or missing; build the index again") from None
        if graph._index.d != width or len(graph) != count or not hasattr(graph._index, "hnsw"):
            raise InvalidInput(f"{path}: is not the graph of this index; build the index again")
        return graph

    def __len__(self) -> int:
        return int(self._index.ntotal)

    def add(self, vectors: FloatArray) -> None:
        """Add vectors; they are numbered as they come, from 0."""
        self._index.add(np.ascontiguousarray(vectors))

    def write(self, path: Path) -> None:
        """Write to a file; on disk when this returns."""
        try:
            library().write_index(self._index, str(path))
        except RuntimeError as error:
            raise BackendError(f"{path}: cannot be written: {error}") from None
        with path.open("rb") as file:
            os.fsync(file.fileno())

    def nearest(self, query: FloatArray, count: int) -> IntArray:
        """Return the places of about the ``count`` nearest vectors."""
        # The library's default breadth is made for a handful of neighbours.
        self._index.hnsw.efSearch = max(64, 2 * count)
        _, places = self._index.search(query[None], min(count, len(self)))
        return np.asarray(places[0][places[0] >= 0], np.int64)


def inner_products(matrix: FloatArray, places: Sequence[int] | IntArray, query: FloatArray) -> Any:
    """Return the inner products of some rows with a query, float32."""
    return np.asarray(matrix[np.asarray(places, np.int64)] @ query, np.float32)
