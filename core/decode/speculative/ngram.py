"""A table from the last few tokens to what the target said next, learned while it speaks.

References
----------
"Accelerated Test-Time Scaling with Model-Free Speculative Sampling" (STAND), arXiv:2506.04708.
"""

from __future__ import annotations

import json
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ...errors import InvalidInput, MissingFile
from ...whole_file import whole_file

CONTEXTS = (4, 3, 2)
"""Numbers of tokens that an entry stands for, in the order in which they are tried."""

WIDTH = 10
"""Most tokens that an entry holds."""

FORMAT = "steersman-ngram-1"
_MOST_BYTES = 1 << 30


class Entry(NamedTuple):
    """A running mean of distributions: the likeliest tokens and their mean probabilities.

    ``seen`` distributions are in it. ``tokens`` are sorted by falling probability, equal ones by
    id. The probabilities need not sum to 1: what fell out of the first ten is gone.
    """

    seen: int
    tokens: tuple[int, ...]
    probs: tuple[float, ...]


class Hit(NamedTuple):
    """What a lookup found: the length of the context that was known, and its entry."""

    length: int
    entry: Entry


def merged(entry: Entry | None, tokens: Sequence[int], probs: Sequence[float]) -> Entry:
    """Return ``entry`` with one more distribution in its mean, cut to the ten largest.

    Parameters
    ----------
    entry : Entry or None
        None starts a new one.
    tokens, probs : sequences of equal length
        The new distribution's likeliest tokens, at most ten of which count.
    """
    count = entry.seen if entry is not None else 0
    mean = {t: p * count for t, p in zip(entry.tokens, entry.probs)} if entry is not None else {}
    for token, prob in zip(tokens[:WIDTH], probs[:WIDTH]):
        mean[token] = mean.get(token, 0.0) + prob
    count += 1
    best = sorted(((-p, t) for t, p in mean.items()))[:WIDTH]
    return Entry(count, tuple(t for _, t in best), tuple(-p / count for p, _ in best))


class NgramTable:
    """Entries for contexts of 4, 3 and 2 tokens; the least recently used ones go first.

    Safe to share between threads. It only ever proposes tokens, so what it holds can change how
    fast a text comes but not its distribution.

    Parameters
    ----------
    most : int
        Entries kept. An entry takes 0.3 to 1 KiB, so 200,000 stay below 200 MiB.
    """

    def __init__(self, most: int = 200_000) -> None:
        self.most = most
        self._entries: OrderedDict[tuple[int, ...], Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, context: Sequence[int]) -> Entry:
        return self._entries[tuple(context)]

    def observe(self, before: Sequence[int], tokens: Sequence[int], probs: Sequence[float]) -> None:
        """Add the distribution that the target had after ``before``.

        Parameters
        ----------
        before : sequence of int
            The text so far; its last four tokens are looked at.
        tokens, probs : sequences of equal length
            The likeliest tokens of the distribution, best first.
        """
        tail = tuple(before[-CONTEXTS[0] :])
        with self._lock:
            for length in CONTEXTS:
                if len(tail) >= length:
                    key = tail[-length:]
                    self._entries[key] = merged(self._entries.get(key), tokens, probs)
                    self._entries.move_to_end(key)
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)

    def seed(self, text: Sequence[int]) -> None:
        """Let a given text be known: what follows each context becomes its certain next token.

        Contexts that are known already stay as they are.
        """
        ids = [int(t) for t in text]
        with self._lock:
            for at in range(CONTEXTS[-1], len(ids)):
                for length in CONTEXTS:
                    key = tuple(ids[at - length : at])
                    if at >= length and key not in self._entries:
                        self._entries[key] = Entry(1, (ids[at],), (1.0,))
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)

    def find(self, before: Sequence[int]) -> Hit | None:
        """Return the entry of the longest known context at the end of ``before``, or None."""
        tail = tuple(before[-CONTEXTS[0] :])
        with self._lock:
            for length in CONTEXTS:
                if len(tail) >= length:
                    entry = self._entries.get(tail[-length:])
                    if entry is not None:
                        self._entries.move_to_end(tail[-length:])
                        return Hit(length, entry)
        return None

    # -- files -----------------------------------------------------------------------------------

    def save(self, path: str | Path, made_with: Mapping[str, str]) -> None:
        """Write the table to an ``.npz`` file, replacing it at once or not at all.

        ``made_with`` says what the entries belong to (see :func:`stand.made_with`).
        """
        with self._lock:
            items = list(self._entries.items())
        rows = len(items)
        contexts = np.full((rows, CONTEXTS[0]), -1, np.int64)
        counts = np.empty(rows, np.int64)
        tokens = np.full((rows, WIDTH), -1, np.int64)
        probs = np.zeros((rows, WIDTH))
        for i, (key, entry) in enumerate(items):
            contexts[i, : len(key)] = key
            counts[i] = entry.seen
            tokens[i, : len(entry.tokens)] = entry.tokens
            probs[i, : len(entry.probs)] = entry.probs
        head = json.dumps({"format": FORMAT, "made_with": dict(made_with)})
        with whole_file(Path(path)) as file:
            np.savez(
                file,
                head=np.frombuffer(head.encode(), np.uint8),
                contexts=contexts,
                counts=counts,
                tokens=tokens,
                probs=probs,
            )

    @classmethod
    def load(
        cls, path: str | Path, made_with: Mapping[str, str], *, most: int = 200_000
    ) -> NgramTable:
        """Read a table that :meth:`save` wrote; nothing is unpickled.

        Raises
        ------
        MissingFile
            There is no such file.
        InvalidInput
            It is not such a table, is damaged, or was made with another model, tokenizer or chain.
        """
        path = Path(path)
        if not path.is_file():
            raise MissingFile(f"{path}: no such file; save a table there first")
        try:
            arrays = _read(path)
            head = json.loads(arrays["head"].tobytes().decode())
            if head["format"] != FORMAT:
                raise ValueError(f"format {head['format']!r}")
            found = {str(k): str(v) for k, v in head["made_with"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile) as e:
            raise InvalidInput(
                f"{path}: not an n-gram table ({e}); delete it or name another"
            ) from e
        for key, value in made_with.items():
            if found.get(key) != value:
                raise InvalidInput(
                    f"{path}: made with {key} {found.get(key)!r}, not {value!r}; "
                    "name another file or delete this one"
                )
        table = cls(most)
        try:
            table._fill(**{k: v for k, v in arrays.items() if k != "head"})
        except (ValueError, TypeError) as e:
            raise InvalidInput(f"{path}: damaged ({e}); delete it or name another") from e
        return table

    def _fill(
        self, contexts: np.ndarray, counts: np.ndarray, tokens: np.ndarray, probs: np.ndarray
    ) -> None:
        rows = len(counts)
        shapes = [contexts.shape, counts.shape, tokens.shape, probs.shape]
        if shapes != [(rows, CONTEXTS[0]), (rows,), (rows, WIDTH), (rows, WIDTH)]:
            raise ValueError(f"shapes {shapes}")
        if any(array.dtype.kind != "i" for array in (contexts, counts, tokens)):
            raise ValueError("ids that are no integers")
        if not np.isfinite(probs).all() or (probs < 0).any() or (probs > 1 + 1e-9).any():
            raise ValueError("probabilities outside 0..1")
        if (counts < 1).any() or (contexts < -1).any() or (tokens < -1).any():
            raise ValueError("negative numbers")
        lengths, widths = (contexts >= 0).sum(axis=1), (tokens >= 0).sum(axis=1)
        for i in range(max(0, rows - self.most), rows):
            key = tuple(contexts[i, : lengths[i]].tolist())
            if len(key) not in CONTEXTS or -1 in key or not widths[i]:
                raise ValueError(f"entry {i}")
            kept = slice(0, int(widths[i]))
            ids = tuple(tokens[i, kept].tolist())
            if -1 in ids:
                raise ValueError(f"entry {i}")
            self._entries[key] = Entry(int(counts[i]), ids, tuple(probs[i, kept].tolist()))


def _read(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of an .npz file whose contents are as small as they say."""
    names = {"head", "contexts", "counts", "tokens", "probs"}
    with zipfile.ZipFile(path) as archive:
        if {Path(i.filename).stem for i in archive.infolist()} != names:
            raise ValueError("other arrays than a table has")
        if sum(i.file_size for i in archive.infolist()) > _MOST_BYTES:
            raise ValueError("more than 1 GiB")
    with np.load(path, allow_pickle=False) as arrays:
        return {name: np.asarray(arrays[name]) for name in names}
