"""Building an index: a job that can be killed at any time and goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from ..errors import InvalidInput, MissingFile, UsageError
from ..model import Model
from ..text_lines import Report, tell
from .documents import Document, as_documents, digest_documents
from .index import Index
from .manifest import NAME, Manifest, check_settings, engine_of, read_manifest, settings_of
from .represent import PromptReps, Representation, Representer
from .segments import Segment, merge_segments, write_segment
from .vectors import Graph, library

BATCH = 64  # documents per segment, and the most that a kill can lose
EXACT_BELOW = 50_000


@dataclass(kw_only=True)
class Built:
    """What a build did.

    Attributes
    ----------
    added, skipped : int
        Documents indexed now, and by an earlier, interrupted run of the same job.
    documents : int
        In the index now.
    tokens : int
        Read by the model now, the shared head of the prompt not counted.
    """

    added: int = 0
    skipped: int = 0
    documents: int = 0
    tokens: int = 0


class IndexWriter:
    """Appends documents to an index folder; one writer at a time.

    Parameters
    ----------
    folder : Path
        Is made if it is not there.
    settings, engine : mapping
        Of :func:`~.manifest.settings_of` and :func:`~.manifest.engine_of`.
    job : str
        Digest of the input: tells an interrupted run of the same job from another one.
    add : bool
        Add to an index that is there.
    overwrite : bool
        Replace one that is there.
    exact_below : int
        Number of documents from which a graph for approximate search is built.

    Raises
    ------
    UsageError
        An index is there and neither flag says what to do, another job on it is unfinished, or
        another process writes it.
    InvalidInput
        It was made with other settings.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, Any],
        engine: Mapping[str, Any],
        *,
        job: str,
        add: bool = False,
        overwrite: bool = False,
        exact_below: int = EXACT_BELOW,
    ) -> None:
        self.folder, self.exact_below = folder, exact_below
        self.finished_before = False
        exists = (folder / NAME).exists()
        if not exists:
            if add:
                raise MissingFile(f"{folder}: is not an index; leave --add out to make one")
            if folder.exists() and not _is_vacant(folder):
                raise UsageError(f"{folder}: is neither empty nor an index; choose another folder")
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise MissingFile(f"{folder}: cannot be made: {error.strerror}") from None
        self._lock = _locked(folder)
        try:
            fresh = Manifest(settings=settings, engine=engine, job=(job, 0))
            if not exists:
                self.manifest = fresh
            else:
                held = read_manifest(folder)
                if overwrite and not (held.job is not None and held.job[0] == job):
                    self.manifest = replace(fresh, serial=held.serial)
                else:
                    self.manifest = self._continued(held, settings, job, add)
            if self.manifest.settings.get("dense"):
                library()  # before any work is done
            self.manifest.write(folder)
            self._tidy()
        except BaseException:
            self.close()
            raise
        before = 0 if self.manifest.job is None else self.manifest.job[1]
        ids = [docid for s in self._segments(self.manifest.segments) for docid in s.ids]
        self.before = set(ids[:before])  # of earlier jobs
        self.done = set(ids[before:])  # of earlier runs of this one

    def _continued(
        self, held: Manifest, settings: Mapping[str, Any], job: str, add: bool
    ) -> Manifest:
        check_settings(self.folder, held.settings, settings)
        if held.job is not None:
            if held.job[0] == job:
                return held
            if held.documents > held.job[1]:
                raise UsageError(
                    f"{self.folder}: holds an unfinished job over other documents; finish that "
                    "one first, or give --overwrite"
                )
            held = replace(held, job=None)  # it had added nothing
            add = add or not held.documents
        if add:
            return replace(held, job=(job, held.documents))
        if held.last == job:
            self.finished_before = True
            return held
        raise UsageError(
            f"{self.folder}: holds an index; give --add to add to it or --overwrite to replace it"
        )

    def _segments(self, named: Iterable[tuple[str, int]]) -> list[Segment]:
        return [Segment(self.folder / name, count) for name, count in named]

    def append(self, documents: list[Document], found: list[Representation]) -> None:
        """Write documents; they are in the index when this returns."""
        name = f"segment-{self.manifest.serial:06d}"
        vocab_size = int(self.manifest.settings["vocab_size"])
        write_segment(self.folder / name, documents, found, vocab_size=vocab_size)
        self._commit(self.manifest.with_segment(name, len(documents)))
        self._merge(factor=4)

    def finish(self) -> None:
        """Merge small segments, build or extend the graph, and mark the job as done."""
        self._merge(factor=1)
        manifest = self.manifest
        if manifest.settings.get("dense") and manifest.documents >= self.exact_below:
            manifest = self._with_graph(manifest)
        job = manifest.job
        self._commit(replace(manifest, job=None, last=job[0] if job else manifest.last))
        self._tidy()

    def _merge(self, *, factor: int) -> None:
        """Merge the last segments while the one before is not much larger: their number stays
        logarithmic, and each document is copied a logarithmic number of times."""
        named = list(self.manifest.segments)
        start, total = len(named) - 1, 0 if not named else named[-1][1]
        if factor > 1:  # amortised: several of about one size at a time
            same = [count for _, count in named if count <= total]
            if len(same) < factor:
                return
            start = next(i for i, (_, count) in enumerate(named) if count <= total)
            total = sum(count for _, count in named[start:])
        while start > 0 and named[start - 1][1] <= 2 * total:
            start -= 1
            total += named[start][1]
        if start >= len(named) - 1:
            return
        name = f"segment-{self.manifest.serial:06d}"
        parts = self._segments(named[start:])
        vocab_size = int(self.manifest.settings["vocab_size"])
        merge_segments(self.folder / name, parts, vocab_size=vocab_size)
        kept = replace(self.manifest, segments=tuple(named[:start]))
        self._commit(kept.with_segment(name, total))
        self._tidy()

    def _with_graph(self, manifest: Manifest) -> Manifest:
        width = int(manifest.settings["width"])
        if manifest.graph is None:
            graph = Graph(width)
        else:
            name, count = manifest.graph
            graph = Graph.read(self.folder / name, width=width, count=count)
        begin, covered = 0, len(graph)
        for segment in self._segments(manifest.segments):
            first = max(covered - begin, 0)
            for at in range(first, segment.count, 4096):
                graph.add(segment.dense[at : at + 4096])
            begin += segment.count
        name = f"graph-{manifest.serial:06d}.faiss"
        graph.write(self.folder / name)
        return replace(manifest, graph=(name, len(graph)), serial=manifest.serial + 1)

    def _commit(self, manifest: Manifest) -> None:
        manifest.write(self.folder)
        self.manifest = manifest

    def _tidy(self) -> None:
        """Remove what the manifest does not name: left by a kill, or merged."""
        named = {name for name, _ in self.manifest.segments}
        if self.manifest.graph is not None:
            named.add(self.manifest.graph[0])
        for path in self.folder.iterdir():
            if path.name not in named and path.name.startswith(("segment-", "graph-")):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    def __enter__(self) -> IndexWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _is_vacant(folder: Path) -> bool:
    """Whether a folder is empty, but for what a build that was killed at once leaves."""
    mine = {".lock", f".{NAME}.part"}
    return folder.is_dir() and all(path.name in mine for path in folder.iterdir())


def _locked(folder: Path) -> IO[bytes]:
    file = (folder / ".lock").open("ab")
    try:
        import fcntl
    except ImportError:  # Windows: two writers are then the user's own affair
        return file
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise UsageError(f"{folder}: another process is writing it") from None
    return file


def fresh_documents(
    documents: Iterable[Document], writer: IndexWriter, built: Built, report: Report | None
) -> Iterator[Document]:
    """Yield what is still to be indexed; repeated ids are reported with their line and left out."""
    seen: dict[str, str] = {}
    for document in documents:
        first = seen.get(document.docid)
        problem = ""
        if first is not None:
            problem = f"was used at {first}; give each document its own"
        elif document.docid in writer.before:
            problem = "is in the index already; give new documents ids of their own"
        if problem:
            told = f"{document.source}: id {document.docid!r} {problem}"
            tell(report, InvalidInput(told))
            continue
        seen[document.docid] = document.source
        if document.docid in writer.done:
            built.skipped += 1
            continue
        yield document


def build(
    representer: Representer,
    documents: Iterable[Document],
    folder: str | Path,
    *,
    job: str,
    add: bool = False,
    overwrite: bool = False,
    batch: int = BATCH,
    exact_below: int = EXACT_BELOW,
    report: Report | None = None,
    progress: Callable[[int], None] | None = None,
) -> Built:
    """Index a stream of documents.

    Parameters
    ----------
    representer : Representer
    documents : iterable of Document
        Read as it goes; a batch is held at a time, and all ids.
    folder : str or Path
    job : str
        Digest of the documents. The same job on an unfinished index goes on; on a finished one it
        does nothing.
    add, overwrite, exact_below
        As of :class:`IndexWriter`.
    batch : int
        Documents per write.
    report : callable, optional
        Called with an InvalidInput for each repeated id; if None, the first one is raised.
    progress : callable, optional
        Called with how many documents were passed.

    Raises
    ------
    Cancelled
        What was written stays and the same call goes on.
    """
    model = representer.model
    settings = settings_of(model, representer.settings, representer.encoder)
    built = Built()
    told = progress or (lambda n: None)
    with IndexWriter(
        Path(folder),
        settings,
        engine_of(model),
        job=job,
        add=add,
        overwrite=overwrite,
        exact_below=exact_below,
    ) as writer:
        if not writer.finished_before:
            before = representer.tokens_read
            stream = fresh_documents(documents, writer, built, report)
            passed = 0
            while held := list(islice(stream, batch)):
                told(built.skipped - passed)
                passed = built.skipped
                found = representer.represent([d.text for d in held], progress=told)
                writer.append(held, found)
                built.added += len(held)
            told(built.skipped - passed)
            built.tokens = representer.tokens_read - before
            writer.finish()
        else:
            built.skipped = writer.manifest.documents
        built.documents = writer.manifest.documents
    return built


def build_index(
    model: Model,
    documents: Mapping[str, str] | Iterable[Document | tuple[str, str]],
    folder: str | Path,
    *,
    settings: PromptReps | None = None,
    add: bool = False,
    overwrite: bool = False,
    rows: int = 8,
    cancelled: Callable[[], bool] = lambda: False,
    **options: Any,
) -> Index:
    """Index documents for :func:`~.index.search` and return the index.

    Parameters
    ----------
    model : Model
    documents : mapping of id to text, or iterable of ``(id, text)`` or Document
    folder : str or Path
        A call that was interrupted goes on when it is made again.
    settings : PromptReps
    add, overwrite : bool
    rows : int
        Texts per call of the model.
    **options
        As of :func:`build`.
    """
    held = as_documents(documents)
    with Representer(model, settings, rows=rows, cancelled=cancelled) as representer:
        build(
            representer, held, folder, job=digest_documents(held), add=add, overwrite=overwrite,
            **options,
        )  # fmt: skip
    return Index(folder)
