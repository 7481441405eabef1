"""A reranking job spread over a Ray cluster: one model per worker, the same code on each.

Requests are read here, put into Ray's object store in small blocks (it spills to disk, so memory is
bounded whatever the input's size), ranked by actors of Ray Data, and come back in the order of the
input. What a worker returns is the finished record, so the output has the bytes that one process
would have written, if the engine computes the same bits on every machine. A worker that dies is
started again and its block is ranked once more; a block that kills its workers every time ends the
job, whose records stay and can be resumed.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from .. import errors
from ..errors import BackendError, MissingDependency, SteersmanError
from ..model import Model
from .batch import rank_each, rows_for
from .first import First
from .generate import Generate
from .io import Candidate, Request, dump_line, result_record
from .job import Outcome, RecordLog, Settings, job_settings
from .prompt import Prompt
from .ranking import Usage
from .reranker import Reranker

RETRIES = 3  # of a block whose worker died


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every worker is told: the model and how to rank; plain JSON values.

    Attributes
    ----------
    load : mapping
        Arguments of ``steersman.core.load``. Paths must mean the same on every machine.
    method : str
        "first" or "generate".
    method_options : mapping
        Arguments of its class.
    window, stride, passes, max_words, first_stage_weight, top_k
        As in :class:`.Reranker`.
    prompt : mapping, optional
        Fields of :class:`.Prompt`.
    batch_size : int
    settings : mapping
        What else belongs into the settings of each record.
    opener : str
        ``module:function`` that is given ``load``.
    """

    load: Mapping[str, Any]
    method: str = "first"
    method_options: Mapping[str, Any] = field(default_factory=dict)
    window: int = 20
    stride: int | None = None
    passes: int = 1
    max_words: int = 300
    first_stage_weight: float = 0.0
    top_k: int | None = None
    prompt: Mapping[str, Any] | None = None
    batch_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    opener: str = "steersman.core:load"

    def open(self) -> tuple[Model, Reranker]:
        """Open the model, and a reranker on it."""
        module, _, name = self.opener.partition(":")
        model: Model = getattr(importlib.import_module(module), name)(**self.load)
        kind = {"first": First, "generate": Generate}[self.method]
        return model, Reranker(
            model,
            method=kind(**self.method_options),
            window=self.window,
            stride=self.stride,
            passes=self.passes,
            max_words=self.max_words,
            first_stage_weight=self.first_stage_weight,
            prompt=None if self.prompt is None else Prompt(**self.prompt),
        )

    def record_settings(self, reranker: Reranker) -> Settings:
        """Return the settings of each record, as a resume compares them."""
        info = reranker.model.info
        rows = rows_for(reranker, self.batch_size)
        # Elsewhere the rows of a batch do not touch each other's numbers.
        shared = {} if rows == 1 or info.batch_invariant else {"batch_size": rows}
        settings = job_settings(reranker, info, **self.settings, **shared)
        plain: Settings = json.loads(json.dumps(settings))
        return plain


def describe(work: Work) -> dict[str, Any]:
    """Return what the model on this machine is: ``settings``, ``facts`` and ``rows``."""
    model, reranker = work.open()
    with model, reranker:
        return {
            "settings": work.record_settings(reranker),
            "facts": {
                **asdict(model.info),
                "extra": dict(model.info.extra),
                "capabilities": model.capabilities.names(),
            },
            "rows": rows_for(reranker, work.batch_size),
        }


class Worker:
    """An actor: ranks blocks of requests with a model of its own."""

    def __init__(self, work: Work, settings: Settings) -> None:
        self._work = work
        _, self._reranker = work.open()
        own = work.record_settings(self._reranker)
        differ = [name for name in settings if settings[name] != own.get(name)]
        self._problem = (
            f"a worker has another model: {differ[0]} is {own.get(differ[0])!r}, "
            f"elsewhere {settings[differ[0]]!r}; use the same files and versions on all machines"
            if differ
            else None
        )

    def __call__(self, table: Any) -> Any:
        """Return the results of one block."""
        import pyarrow as pa

        requests = [_unpack(text) for text in table.column("request").to_pylist()]
        return pa.table({"result": [json.dumps(row) for row in self._rank(requests)]})

    def _rank(self, requests: list[Request]) -> Iterator[dict[str, Any]]:
        if self._problem is not None:
            yield {"stop": self._problem}
            return
        work = self._work
        found = rank_each(self._reranker, requests, rows=work.batch_size, top_k=work.top_k)
        for request, ranking in found:
            row: dict[str, Any] = {"qid": request.qid, "source": request.source}
            if isinstance(ranking, SteersmanError):
                yield {**row, "error": [ranking.code, str(ranking)]}
            elif ranking is not None:
                record = dump_line(result_record(request, ranking))
                yield {**row, "record": record, "usage": asdict(ranking.usage)}


class Cluster:
    """A connection to Ray, for one job.

    Parameters
    ----------
    work : Work
    workers : int, optional
        Models at once; as many as the cluster has room for if None.
    cpus, gpus : float
        Of each worker.
    address : str, optional
        Of a running cluster; ``$RAY_ADDRESS`` if None, or else a cluster of this machine alone,
        which ends with the job.

    Attributes
    ----------
    settings : dict
        Of the records, as a local job would have them.
    facts : dict
        The model's, from one of the machines.
    rows : int
        Queries that share a call on each worker.

    Raises
    ------
    MissingDependency
        Ray is not installed.
    BackendError
        The cluster cannot be reached.
    SteersmanError
        What opening the model on a machine of the cluster came to.
    """

    def __init__(
        self,
        work: Work,
        *,
        workers: int | None = None,
        cpus: float = 1,
        gpus: float = 0,
        address: str | None = None,
    ) -> None:
        self._ray = ray = _import_ray()
        self._work, self._cpus, self._gpus = work, cpus, gpus
        self._begun = not ray.is_initialized()
        self._stdout = sys.stdout
        sys.stdout = _OfThisThread(sys.stdout)
        try:
            if self._begun:
                _connect(ray, address, cpus * workers if workers else None)
            self.workers = workers or self._room()
            self.facts: dict[str, Any]
            self.settings: Settings
            self.rows: int
            found = self._described()
            self.settings, self.facts, self.rows = found["settings"], found["facts"], found["rows"]
        except BaseException:
            self.close()
            raise

    def _room(self) -> int:
        has = self._ray.cluster_resources()
        room = has.get("CPU", 1) / self._cpus
        if self._gpus:
            room = min(room, has.get("GPU", 0) / self._gpus)
        if room < 1:
            raise BackendError(
                f"--engine ray: a worker takes {self._cpus:g} processors and {self._gpus:g} GPUs; "
                f"the cluster has {has.get('CPU', 0):g} and {has.get('GPU', 0):g}"
            )
        return int(room)

    def _described(self) -> dict[str, Any]:
        def look(work: Work) -> str:
            try:
                return json.dumps(describe(work))
            except SteersmanError as error:
                return json.dumps({"error": [error.code, str(error)]})

        task = self._ray.remote(num_cpus=self._cpus, num_gpus=self._gpus)(look)
        try:
            found: dict[str, Any] = json.loads(self._ray.get(task.remote(self._work)))
        except self._ray.exceptions.RayError as error:
            raise BackendError(f"--engine ray: {_first_line(error)}") from error
        if "error" in found:
            raise _error(*found["error"])
        return found

    def run(
        self, requests: Iterable[Request], *, log: RecordLog | None = None
    ) -> Iterator[Outcome]:
        """Rank requests and yield what became of each, in their order; see :func:`.run_job`.

        All requests are read first. Those that ``log`` has are yielded at once, and finished ones
        appended to it before they are yielded.
        """
        import pyarrow as pa

        refs: list[Any] = []
        block: list[str] = []

        def put() -> None:
            refs.append(self._ray.put(pa.table({"request": list(block)})))
            block.clear()

        for request in requests:
            if log is not None and request.qid in log.done:
                yield Outcome(request=request)
                continue
            block.append(_pack(request))
            if len(block) == 2 * self._work.batch_size:
                put()
        if block:
            put()
        if refs:
            for row in self._results(refs):
                outcome = _outcome(row)
                if log is not None and outcome.record is not None:
                    log.append(outcome.record)
                yield outcome

    def _results(self, refs: list[Any]) -> Iterator[dict[str, Any]]:
        from ray import data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        context = data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.execution_options.preserve_order = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the retry options' coming new spelling
            ranked = data.from_arrow_refs(refs).map_batches(
                Worker,
                fn_constructor_args=(self._work, self.settings),
                batch_size=None,
                batch_format="pyarrow",
                compute=data.ActorPoolStrategy(size=min(self.workers, len(refs))),
                num_cpus=self._cpus,
                num_gpus=self._gpus,
                max_restarts=RETRIES,
                max_task_retries=RETRIES,
            )
        try:
            for row in ranked.iter_rows():
                result = json.loads(row["result"])
                if "stop" in result:
                    raise BackendError(f"--engine ray: {result['stop']}")
                yield result
        except self._ray.exceptions.RayError as error:
            raise BackendError(
                f"--engine ray: a block of queries failed {RETRIES + 1} times "
                f"({_first_line(error)}); what is recorded stays, go on with --resume"
            ) from error

    def close(self) -> None:
        """Let the workers go; a cluster that was begun here ends."""
        if isinstance(sys.stdout, _OfThisThread):
            sys.stdout = self._stdout
        if self._begun:
            self._ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _OfThisThread:
    """A stdout for the thread that makes it; what others print goes to stderr.

    Ray prints what becomes of workers on stdout, from a thread, whatever it is asked to log.
    """

    def __init__(self, stream: Any) -> None:
        self._stream, self._thread = stream, threading.get_ident()

    def _now(self) -> Any:
        return self._stream if threading.get_ident() == self._thread else sys.stderr

    def write(self, text: str) -> int:
        """Write to the stream of the calling thread."""
        written: int = self._now().write(text)
        return written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._now(), name)


def _import_ray() -> Any:
    try:
        import pyarrow as pa  # noqa: F401 - Ray Data's blocks
        import ray
    except ImportError:
        raise MissingDependency(
            '--engine ray: Ray is not installed; run: pip install "steersman[ray]"'
        ) from None
    return ray


def _connect(ray: Any, address: str | None, cpus: float | None) -> None:
    # Nothing is sent anywhere, and stdout stays what the command prints.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here = {} if address != "local" else {"num_cpus": cpus, "include_dashboard": False}
    # Workers find what this process can import, on machines that have it in the same place.
    paths = os.pathsep.join(path for path in sys.path if path)
    try:
        ray.init(
            address=address,
            log_to_driver=False,
            configure_logging=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": paths}} if address == "local" else None,
            **here,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise BackendError(f"--engine ray: {address}: {_first_line(error)}") from error


def _pack(request: Request) -> str:
    return json.dumps(asdict(request))


def _unpack(text: str) -> Request:
    value = json.loads(text)
    return Request(**{**value, "candidates": tuple(Candidate(**c) for c in value["candidates"])})


def _outcome(row: Mapping[str, Any]) -> Outcome:
    request = Request(qid=row["qid"], query="", candidates=(), source=row["source"])
    if "error" in row:
        return Outcome(request=request, error=_error(*row["error"]))
    return Outcome(request=request, record=json.loads(row["record"]), usage=Usage(**row["usage"]))


def _error(code: str, message: str) -> SteersmanError:
    """Return an error that a worker told, as one of the class it had there."""
    kinds: dict[str, Callable[[str], SteersmanError]] = {
        kind.code: kind
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, SteersmanError)
    }
    return kinds.get(code, BackendError)(message)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
