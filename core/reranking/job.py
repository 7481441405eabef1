"""A batch of queries that can be killed at any time and resumed without loss or repetition.

The output itself is the journal: one JSON line per finished query, appended and synced to disk
before the next query starts. Every record carries the settings it was made with, so a resume under
other settings, another model or another input is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..decode.rng import Rng
from ..errors import InvalidInput, MissingFile, SteersmanError, UsageError
from ..journal import SyncedLines
from ..model import ModelInfo
from .batch import ahead, rank_each
from .io import Request, dump_line, parse_json, result_record
from .ranking import Ranking, Usage
from .reranker import Cancel, Reranker, WindowCall, poll
from .trec import write_run

Settings = dict[str, Any]


def job_settings(reranker: Reranker, info: ModelInfo, **more: Any) -> Settings:
    """Return everything a ranking depends on, as plain JSON values.

    Parameters
    ----------
    reranker : Reranker
    info : ModelInfo
    **more
        What else shapes the result: the input's hash, cut-offs, a shuffle seed.
    """
    method = reranker.method
    options: dict[str, Any] = (
        asdict(method) if is_dataclass(method) and not isinstance(method, type) else {}
    )
    fixed = {"requires", "logit_kind"}
    weight = reranker.first_stage_weight
    return {
        "method": reranker.name,
        **{name: value for name, value in options.items() if name not in fixed},
        "window": reranker.window,
        "stride": reranker.stride,
        "passes": reranker.passes,
        "max_words": reranker.max_words,
        **({"first_stage_weight": weight} if weight else {}),
        "prompt": digest(json.dumps(asdict(reranker.prompt), sort_keys=True).encode()),
        "model": info.name,
        "weights": info.fingerprint,
        "backend": info.backend,
        "dtype": info.dtype,
        "context": info.context,
        **more,
    }


def digest(data: bytes) -> str:
    """Return a short SHA-256 of ``data`` (16 hex digits)."""
    return hashlib.sha256(data).hexdigest()[:16]


def digest_files(paths: Iterable[Path]) -> str:
    """Return a short SHA-256 over the contents of files, in order."""
    total = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
        except FileNotFoundError:
            raise MissingFile(f"{path}: no such file") from None
    return total.hexdigest()[:16]


class RecordLog(SyncedLines):
    """Append-only JSON lines, one per finished query, synced one by one.

    Parameters
    ----------
    path : Path
    settings : mapping
        What the records are made with; stored in each under ``rerank.settings``.
    resume : bool
        Go on after what ``path`` holds. A last line that a kill left half-written is cut off.
    overwrite : bool
        Start anew if ``path`` exists.

    Attributes
    ----------
    done : set of str
        Queries that have a record.

    Raises
    ------
    UsageError
        The file has content and neither ``resume`` nor ``overwrite`` is given, or another process
        is writing it.
    InvalidInput
        The file was made with other settings (they are named), or a line in it is damaged.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        *,
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        self._settings = json.loads(json.dumps(settings))
        if not resume and not overwrite:
            refuse_existing(path)
        super().__init__(path, anew=overwrite and not resume)

    def _recover(self) -> None:
        """Read what is there, cut a half-written end off, and stand behind the last record."""
        self._file.seek(0)
        good = 0
        for number, line in enumerate(iter(self._file.readline, b""), start=1):
            where = f"{self.path}:{number}"
            try:
                if not line.endswith(b"\n"):
                    raise InvalidInput(f"{where}: ends in mid-line")
                record = parse_json(line.decode(errors="replace"), where)
                try:
                    made_with = record["rerank"]["settings"]
                    qid = str(record["query"]["qid"])
                except (KeyError, TypeError):
                    raise InvalidInput(f"{where}: not a record of this command") from None
            except InvalidInput:
                if self._file.read(1):
                    raise
                break  # killed while writing the last line: this query is done again
            self._check(made_with, where)
            self.done.add(qid)
            good += len(line)
        self._file.truncate(good)
        self._file.seek(good)

    def _check(self, made_with: Any, where: str) -> None:
        if made_with == self._settings:
            return
        if not isinstance(made_with, dict):
            raise InvalidInput(f"{where}: rerank.settings: must be an object")
        names = sorted({*made_with, *self._settings})
        differ = [n for n in names if made_with.get(n) != self._settings.get(n)]
        told = "; ".join(
            f"{n} was {made_with.get(n)!r} and is now {self._settings.get(n)!r}" for n in differ
        )
        raise InvalidInput(
            f"{where}: made with other settings ({told}); use them again, choose another output "
            "or give --overwrite"
        )

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and wait until it is on disk."""
        info = {**record["rerank"], "settings": self._settings}
        self._put(dump_line({**record, "rerank": info}).removesuffix("\n"))
        self.done.add(str(record["query"]["qid"]))


def refuse_existing(path: Path) -> None:
    """Raise UsageError if ``path`` exists and is not empty."""
    if path.exists() and path.stat().st_size:
        raise UsageError(
            f"{path}: exists; give --resume to continue it or --overwrite to replace it"
        )


def write_run_from_log(log: RecordLog, path: Path, *, tag: str) -> int:
    """Write the log's records as a TREC run, in one step: a reader never sees half of it.

    Returns
    -------
    int
        Repeated documents that were left out; see :func:`~.trec.write_run`.
    """
    rows = (
        (
            str(record["query"]["qid"]),
            [str(hit["docid"]) for hit in record["candidates"]],
            [float(hit["score"]) for hit in record["candidates"]],
        )
        for record in log.records()
    )
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8", newline="\n") as file:
            dropped = write_run(file, rows, tag=tag)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise MissingFile(f"{path}: cannot be written: {error.strerror or error}") from None
    finally:
        with suppress(FileNotFoundError):
            part.unlink()
    return dropped


def shuffle(request: Request, seed: int) -> Request:
    """Return the request with its candidates in random order; their scores stay in the slots.

    The order depends on ``seed`` and the query's id alone, so that a resumed job makes the same.
    """
    n = len(request.candidates)
    row = int.from_bytes(hashlib.sha256(request.qid.encode()).digest()[:8], "big")
    places = np.argsort(Rng(seed).uniforms(row, 0, n), kind="stable")
    scores = request.scores()
    shuffled = tuple(
        replace(request.candidates[int(place)], score=None if scores is None else scores[slot])
        for slot, place in enumerate(places)
    )
    return replace(request, candidates=shuffled)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one query.

    ``error`` is set if it failed, ``record`` and ``usage`` if it was ranked (and ``ranking``, if
    that was in this process); all are None for a query that an earlier run of the job had finished.
    """

    request: Request
    ranking: Ranking | None = None
    record: Mapping[str, Any] | None = None
    error: SteersmanError | None = None
    usage: Usage | None = None


def run_job(
    reranker: Reranker,
    requests: Iterable[Request],
    *,
    log: RecordLog | None = None,
    top_k: int | None = None,
    cancel: Cancel | None = None,
    progress: Callable[[int, int], None] | None = None,
    on_call: Callable[[Request, WindowCall], None] | None = None,
    batch_size: int = 1,
    tokenise_ahead: bool = False,
) -> Iterator[Outcome]:
    """Rank queries and yield what became of each, in the order of the requests.

    A query that fails (its window does not fit the context, the engine gives no finite logits) is
    yielded with its error and the job goes on; it has no record, so a resume tries it again.

    Parameters
    ----------
    reranker : Reranker
    requests : iterable of Request
        Read as it goes.
    log : RecordLog, optional
        Finished queries are skipped, new ones appended before they are yielded.
    top_k : int, optional
        Keep the best ``top_k`` in each result.
    cancel, progress
        As in :meth:`Reranker.rank`; ``progress`` counts the windows of one query.
    on_call : callable, optional
        Called with the request and each compared window.
    batch_size : int
        Queries whose windows share the model's calls, where it takes several rows.
    tokenise_ahead : bool
        Read the next requests, ``batch_size`` of them, and tokenise them while the model runs.

    Raises
    ------
    Cancelled
        After the last finished query was recorded.
    """

    def skip(request: Request) -> bool:
        return log is not None and request.qid in log.done

    if tokenise_ahead:
        requests = ahead(reranker, requests, depth=batch_size, skip=skip)
    ranked = rank_each(
        reranker,
        requests,
        rows=batch_size,
        skip=skip,
        top_k=top_k,
        cancelled=poll(cancel),
        progress=progress,
        on_call=on_call,
    )
    try:
        for request, found in ranked:
            if found is None:
                yield Outcome(request=request)
            elif isinstance(found, SteersmanError):
                yield Outcome(request=request, error=found)
            else:
                record = result_record(request, found)
                if log is not None:
                    log.append(record)
                yield Outcome(request=request, ranking=found, record=record, usage=found.usage)
    finally:
        for source in (ranked, requests):
            if isinstance(source, Generator):
                source.close()
