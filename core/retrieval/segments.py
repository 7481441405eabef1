"""Segments: the pieces an index is made of on disk. Written once, never changed.

A segment is a folder with plain NumPy arrays (read without pickle, through memory maps) and JSON:

``docs.jsonl``, ``offsets.npy``
    Ids and texts, and where each line begins (int64, n + 1).
``ids.json``
    The ids alone.
``dense.npy``
    Vectors (n, D), float32; absent in an index without them.
``starts.npy``, ``places.npy``, ``impacts.npy``
    The inverted index, a matrix (V, n) in compressed rows: documents that hold token ``t`` are
    ``places[starts[t]:starts[t + 1]]``.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import InvalidInput
from ..strict_json import parse_json
from .documents import Document
from .represent import Representation

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Segment:
    """One segment, read as needed.

    Attributes
    ----------
    folder : Path
    count : int
        Number of documents.
    """

    folder: Path
    count: int

    def _array(self, name: str) -> npt.NDArray[Any]:
        path = self.folder / f"{name}.npy"
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{path}: damaged or missing ({error}); build the index again"
            ) from None

    @cached_property
    def ids(self) -> list[str]:
        """Ids of the documents, in order."""
        path = self.folder / "ids.json"
        try:
            ids = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InvalidInput(
                f"{path}: damaged or missing ({error}); build the index again"
            ) from None
        if not isinstance(ids, list) or len(ids) != self.count:
            raise InvalidInput(f"{path}: must list {self.count} ids; build the index again")
        return [str(i) for i in ids]

    @cached_property
    def offsets(self) -> npt.NDArray[Any]:
        """Where each line of ``docs.jsonl`` begins (n + 1,)."""
        return self._array("offsets")

    @cached_property
    def dense(self) -> npt.NDArray[Any]:
        """Vectors (n, D)."""
        return self._checked(self._array("dense"))

    def _checked(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if array.ndim != 2 or len(array) != self.count or array.dtype != np.float32:
            raise InvalidInput(f"{self.folder}: dense.npy has another shape; build the index again")
        return array

    @cached_property
    def postings(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any], npt.NDArray[Any]]:
        """``(starts (V + 1,), places (m,), impacts (m,))``."""
        starts, places, impacts = (self._array(n) for n in ("starts", "places", "impacts"))
        fits = len(starts) > 0 and len(places) == len(impacts) == int(starts[-1])
        if not fits or (len(places) and int(places.max()) >= self.count):
            raise InvalidInput(f"{self.folder}: postings are damaged; build the index again")
        return starts, places, impacts

    def text(self, place: int) -> str:
        """Read one document's text."""
        begin, end = int(self.offsets[place]), int(self.offsets[place + 1])
        path = self.folder / "docs.jsonl"
        try:
            with path.open("rb") as file:
                file.seek(begin)
                line = file.read(end - begin)
        except OSError as error:
            raise InvalidInput(f"{path}: cannot be read: {error.strerror}") from None
        record = parse_json(line.decode(errors="replace"), f"{path}: byte {begin}")
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InvalidInput(f"{path}: byte {begin}: no document; build the index again")
        return str(record["text"])

    def add_scores(
        self, scores: npt.NDArray[np.int64], tokens: Sequence[int], impacts: Sequence[int]
    ) -> None:
        """Add to ``scores`` (n,) each document's inner product with a query's bag."""
        starts, places, weights = self.postings
        for token, impact in zip(tokens, impacts):
            if token >= len(starts) - 1:
                continue
            begin, end = int(starts[token]), int(starts[token + 1])
            # A document stands once per token, so plain fancy indexing adds rightly.
            scores[places[begin:end]] += impact * weights[begin:end].astype(np.int64)


def write_segment(
    folder: Path,
    documents: Sequence[Document],
    found: Sequence[Representation],
    *,
    vocab_size: int,
) -> Segment:
    """Write documents and their representations; on disk when this returns."""
    folder.mkdir(parents=True)
    offsets = [0]
    with (folder / "docs.jsonl").open("wb") as file:
        for document in documents:
            record = {"docid": document.docid, "text": document.text}
            offsets.append(
                offsets[-1] + file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            )
        _sync(file)
    _write_ids(folder, [document.docid for document in documents])
    _save(folder, "offsets", np.array(offsets, np.int64))
    if all(one.dense is not None for one in found):
        _save(folder, "dense", np.stack([np.asarray(one.dense, np.float32) for one in found]))
    tokens = np.concatenate([one.sparse.tokens for one in found]).astype(np.int64)
    impacts = np.concatenate([one.sparse.impacts for one in found])
    places = np.repeat(np.arange(len(found)), [len(one.sparse.tokens) for one in found])
    _save_postings(folder, tokens, places, impacts, vocab_size)
    _sync_folder(folder)
    return Segment(folder, len(documents))


def merge_segments(folder: Path, parts: Sequence[Segment], *, vocab_size: int) -> Segment:
    """Write adjacent segments as one; documents keep their order.

    Vectors and texts are copied piece by piece; the postings of all parts are held at once, some
    30 bytes for each.
    """
    folder.mkdir(parents=True)
    count = sum(part.count for part in parts)
    offsets, shift = [np.zeros(1, np.int64)], 0
    with (folder / "docs.jsonl").open("wb") as file:
        for part in parts:
            with (part.folder / "docs.jsonl").open("rb") as source:
                shutil.copyfileobj(source, file, 1 << 20)
            offsets.append(np.asarray(part.offsets[1:], np.int64) + shift)
            shift += int(part.offsets[-1])
        _sync(file)
    _write_ids(folder, [docid for part in parts for docid in part.ids])
    _save(folder, "offsets", np.concatenate(offsets))
    if all((part.folder / "dense.npy").exists() for part in parts):
        shape = (count, parts[0].dense.shape[1])
        dense = np.lib.format.open_memmap(folder / "dense.npy", "w+", np.float32, shape)
        begin = 0
        for part in parts:
            dense[begin : begin + part.count] = part.dense
            begin += part.count
        dense.flush()
        del dense
        with (folder / "dense.npy").open("rb") as held:
            os.fsync(held.fileno())
    tokens, places, impacts, begin = [], [], [], 0
    for part in parts:
        starts, where, weights = part.postings
        tokens.append(np.repeat(np.arange(len(starts) - 1), np.diff(starts)))
        places.append(np.asarray(where, np.int64) + begin)
        impacts.append(np.asarray(weights))
        begin += part.count
    _save_postings(
        folder, np.concatenate(tokens), np.concatenate(places), np.concatenate(impacts), vocab_size
    )
    _sync_folder(folder)
    return Segment(folder, count)


def _save_postings(
    folder: Path, tokens: IntArray, places: IntArray, impacts: npt.NDArray[Any], vocab_size: int
) -> None:
    """Turn (token, place, impact) triples, places rising, into an inverted index."""
    order = np.argsort(tokens, kind="stable")
    counts = np.bincount(tokens, minlength=vocab_size)
    _save(folder, "starts", np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
    _save(folder, "places", places[order].astype(np.int32))
    _save(folder, "impacts", impacts[order].astype(np.int32))


def _write_ids(folder: Path, ids: Sequence[str]) -> None:
    with (folder / "ids.json").open("wb") as file:
        file.write(json.dumps(ids, ensure_ascii=False).encode())
        _sync(file)


def _save(folder: Path, name: str, array: npt.NDArray[Any]) -> None:
    with (folder / f"{name}.npy").open("wb") as file:
        np.save(file, array, allow_pickle=False)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Make the folder's entries durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)
