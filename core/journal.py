"""Results as JSON lines that a kill cannot damage: one synced line each, a stopped job goes on."""

from __future__ import annotations

import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

from .errors import InvalidInput, MissingFile, UsageError
from .strict_json import parse_json, to_json

KEY = "made_with"


def settings_key(settings: Mapping[str, Any]) -> str:
    """Return a short digest of everything that a job's results depend on."""
    return hashlib.sha256(to_json(dict(sorted(settings.items()))).encode()).hexdigest()[:16]


def hold_job(folder: Path, job: Mapping[str, Any]) -> None:
    """Note in ``folder`` how its texts are made, or refuse if they were made otherwise.

    Parameters
    ----------
    folder : Path
        Made if needed; gets ``job.json``.
    job : mapping
        All that the texts depend on; JSON-able.

    Raises
    ------
    UsageError
        The folder holds texts of another job; the message names what differs.
    InvalidInput
        ``job.json`` is damaged.
    """
    path = folder / "job.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_text(json.dumps(job, indent=1), encoding="utf-8")
        return
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise InvalidInput(f"{path}: damaged: {exc}; use another folder") from None
    other = sorted(k for k in {*job, *held} if job.get(k) != held.get(k))
    if other:
        raise UsageError(
            f"{folder}: holds texts made with another {', '.join(other)}; use another folder"
        )


class SyncedLines(ABC):
    """A file of JSON lines that one process appends to, each line on disk before the next.

    Parameters
    ----------
    path : Path
    anew : bool
        Drop what the file holds.

    Attributes
    ----------
    done : set of str
        Items that have a record.

    Raises
    ------
    MissingFile
        The file cannot be written.
    InvalidInput
        It holds something else than this job's records.
    UsageError
        Another process is writing it.
    """

    def __init__(self, path: Path, *, anew: bool) -> None:
        self.path = path
        self.done: set[str] = set()
        try:
            self._file: IO[bytes] = path.open("r+b" if path.exists() else "w+b")
        except OSError as error:
            raise MissingFile(f"{path}: cannot be written: {error.strerror or error}") from None
        try:
            _lock(self._file, path)
            if anew:
                self._file.truncate(0)
            self._recover()
        except BaseException:
            self._file.close()
            raise

    @abstractmethod
    def _recover(self) -> None:
        """Read what is there, cut a half-written end off, and stand behind the last record."""

    def _put(self, line: str) -> None:
        """Write one line and wait until it is on disk."""
        self._file.write(line.encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def records(self) -> Iterator[dict[str, Any]]:
        """Yield every record, in the order they were written."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield parse_json(line.decode(), f"{self.path}:{number}")

    def close(self) -> None:
        """Close the file and let others write it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: two writers are then the user's own affair
        return
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UsageError(f"{path}: another process is writing it") from None


class Journal(SyncedLines):
    """Append-only JSON lines, one per finished item, each on disk before the next one starts.

    Opening a file that an earlier run of the same job left goes on with it; a last line that a kill
    left half-written is cut off.

    Parameters
    ----------
    path : Path
    settings : mapping
        What the results are made with; a digest of it stands in each line.
    overwrite : bool
        Start anew if ``path`` exists.

    Attributes
    ----------
    done : set of str
        ``id`` of every record.

    Raises
    ------
    InvalidInput
        The file was made with other settings, or holds something else.
    UsageError
        Another process is writing it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self._key = settings_key(settings)
        super().__init__(path, anew=overwrite)

    def _recover(self) -> None:
        good = 0
        for number, line in enumerate(iter(self._file.readline, b""), start=1):
            if not line.endswith(b"\n"):
                break  # killed while writing it: this item is done again
            where = f"{self.path}:{number}"
            record = parse_json(line.decode(errors="replace"), where)
            if not isinstance(record, dict) or KEY not in record or "id" not in record:
                raise InvalidInput(f"{where}: not a result of this command; choose another file")
            if record[KEY] != self._key:
                raise InvalidInput(
                    f"{where}: made with other input, model or settings; use them again, "
                    "choose another file or give --overwrite"
                )
            self.done.add(str(record["id"]))
            good += len(line)
        self._file.truncate(good)
        self._file.seek(good)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record, which has an ``id``, and wait until it is on disk."""
        self._put(json.dumps({**record, KEY: self._key}, ensure_ascii=False, allow_nan=False))
        self.done.add(str(record["id"]))
