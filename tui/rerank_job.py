"""The work behind ``steersman rerank``: reading requests, running the job, writing results."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steersman.core.errors import InvalidInput, MissingFile

from . import common, output
from .envelope import INVALID, PARTIAL, RUNTIME

if TYPE_CHECKING:
    from steersman.core.reranking.cluster import Work
    from steersman.core.reranking.io import Request
    from steersman.core.reranking.job import Outcome, RecordLog
    from steersman.core.reranking.reranker import Reranker, WindowCall

_SHOWN_PROBLEMS = 20


@dataclass(frozen=True, kw_only=True)
class Args:
    """The command's own options, as given."""

    requests_file: Path | None
    input_json: str | None
    stdin: bool
    run: Path | None
    queries: Path | None
    collection: Path | None
    output_jsonl_file: Path | None
    output_trec_file: Path | None
    invocations_history_file: Path | None
    method: str
    window_size: int
    stride: int | None
    num_passes: int
    max_words: int
    first_stage_weight: float
    batch_size: int
    engine: str
    workers: int | None
    ray_address: str | None
    top_k_candidates: int | None
    top_k_rerank: int | None
    permutations: int
    content_free: bool
    prompt_file: Path | None
    shuffle_candidates: bool
    seed: int
    dry_run: bool
    validate_only: bool
    resume: bool
    overwrite: bool
    tag: str

    @property
    def mode(self) -> str:
        """Mode for the envelope."""
        return "validate" if self.validate_only else "dry-run" if self.dry_run else "run"

    @property
    def step(self) -> int:
        """Stride: half the window if none was given."""
        return max(1, self.window_size // 2) if self.stride is None else self.stride

    @property
    def files(self) -> list[Path]:
        """Input files, in a fixed order."""
        given = (self.requests_file, self.run, self.queries, self.collection)
        return [path for path in given if path is not None]


@dataclass
class Problems:
    """Errors that do not stop the job: counted, the first ones shown and kept."""

    envelope: common.Envelope
    lines: int = 0
    queries: int = 0
    hidden: int = 0
    kinds: Counter[str] = field(default_factory=Counter)

    def line(self, error: InvalidInput) -> None:
        """A line of input that cannot be used, or is odd."""
        from steersman.core.reranking.io import kind_of

        kind, count = kind_of(error)
        self.kinds[kind] += count
        self.lines += 1
        self._tell(error)

    def query(self, outcome: Outcome) -> None:
        """A query that could not be ranked."""
        self.queries += 1
        error = outcome.error
        assert error is not None
        told = common.problem(error)
        self.kinds[told.code] += 1
        where = f"{outcome.request.source}: query {outcome.request.qid!r}: "
        self._tell(common.Problem(code=told.code, message=where + told.message))

    def _tell(self, error: InvalidInput | common.Problem) -> None:
        if self.lines + self.queries <= _SHOWN_PROBLEMS:
            self.envelope.fail(error, exit_code=PARTIAL)
        else:
            self.hidden += 1

    def counted(self) -> dict[str, int]:
        """How many there were of each kind, the most frequent first."""
        return dict(self.kinds.most_common())

    def sentence(self) -> str:
        """The counts in words; empty if there were none."""
        counts = (f"{count} {kind.replace('_', ' ')}" for kind, count in self.kinds.most_common())
        return f"problems: {', '.join(counts)}" if self.kinds else ""

    def settle(self, succeeded: int) -> None:
        """Set the exit code: 7 if something succeeded, else 5 for bad input or 6."""
        if self.hidden:
            self.envelope.warn(f"{self.hidden} more problems are not shown")
        if self.lines or self.queries:
            failed = RUNTIME if self.queries else INVALID
            self.envelope.exit_code = PARTIAL if succeeded else failed


# -- input --------------------------------------------------------------------------------------


def requests(
    args: Args, problems: Problems, stack: ExitStack, held: bytes | None = None
) -> Iterator[Request]:
    """Yield the requests as they are read, cut and shuffled as asked.

    Parameters
    ----------
    args : Args
    problems : Problems
        Told of every line that cannot be used.
    stack : ExitStack
        Closes the input.
    held : bytes, optional
        What stdin held, if it has been read already.
    """
    from steersman.core.reranking.job import shuffle
    from steersman.core.reranking.trec import check_trec_names

    for request in _source(args, problems, stack, held):
        request = request.head(args.top_k_candidates)
        if args.output_trec_file is not None:
            try:
                check_trec_names(request)
            except InvalidInput as error:
                problems.line(error)
                continue
        yield shuffle(request, args.seed) if args.shuffle_candidates else request


def _source(
    args: Args, problems: Problems, stack: ExitStack, held: bytes | None
) -> Iterable[Request]:
    from steersman.core.reranking.io import read_requests
    from steersman.core.reranking.trec import read_run, read_texts, run_requests
    from steersman.core.text_lines import open_text

    if args.run is None:
        lines: Iterable[bytes]
        if args.input_json is not None:
            # One request may be written over several lines.
            name, lines = "--input-json", [" ".join(args.input_json.splitlines()).encode()]
        elif args.requests_file is not None:
            name = str(args.requests_file)
            lines = stack.enter_context(open_text(args.requests_file))
        else:
            name = "stdin"
            lines = sys.stdin.buffer if held is None else held.splitlines(keepends=True)
        return read_requests(lines, name, report=problems.line)
    assert args.queries is not None and args.collection is not None  # _check saw to it
    run = read_run(args.run, report=problems.line)
    run = {qid: hits[: args.top_k_candidates] for qid, hits in run.items()}
    queries = read_texts(args.queries, only=run.keys(), report=problems.line)
    wanted = {hit.docid for hits in run.values() for hit in hits}
    return run_requests(
        run,
        queries,
        read_texts(args.collection, only=wanted, report=problems.line, passages=True),
        queries_name=str(args.queries),
        collection_name=str(args.collection),
        report=problems.line,
    )


def _count(args: Args) -> int | None:
    """Number of queries for the progress bar, where it costs little to know."""
    if args.input_json is not None:
        return 1
    if args.requests_file is None or args.requests_file.suffix == ".gz":
        return None
    with args.requests_file.open("rb") as file:
        return sum(bool(line.strip()) for line in file)


# -- running ----------------------------------------------------------------------------------


def run_rerank(
    args: Args, model_args: common.ModelArgs, problems: Problems, stack: ExitStack
) -> None:
    """Open the model and rank every query; ``stack`` closes what was opened."""
    envelope = problems.envelope
    log_path = _log_path(args)
    held = sys.stdin.buffer.read() if args.stdin and log_path is not None else None
    work = _work(args, model_args, held)
    engine = (_cluster if args.engine == "ray" else _here)(args, work, held, envelope, stack)
    if engine.rows < args.batch_size:
        envelope.warn("this model takes one row at a time; --batch-size has no effect")
    envelope.resolved["settings"] = engine.settings
    log = None
    if log_path is not None:
        log = _open_log(args, log_path, engine.settings, stack)
    tally = _Tally()
    results: list[Any] = []
    begun = time.perf_counter()
    try:
        with output.progress(_count(args), label="rerank", unit="query") as bar:
            found = requests(args, problems, stack, held)
            for outcome in engine.run(found, log):
                bar.update()
                tally.add(outcome)
                if outcome.error is not None:
                    problems.query(outcome)
                elif log is None and outcome.record is not None:
                    if envelope.json:
                        results.append(outcome.record)
                    else:
                        output.print_json(common.to_json(outcome.record))
    except KeyboardInterrupt:
        if log is not None:
            output.note(f"{len(log.done)} queries are in {log.path}; go on with --resume")
        raise
    if log is not None:
        _finish(args, log, problems)
    elif envelope.json:
        envelope.result = results
    problems.settle(succeeded=tally.ranked + tally.skipped)
    tally.seconds = time.perf_counter() - begun
    envelope.metrics = {
        **asdict(tally),
        "input_problems": problems.lines,
        "problems": problems.counted(),
    }
    output.note("; ".join(filter(None, (tally.sentence(), problems.sentence()))))


def _log_path(args: Args) -> Path | None:
    """Where finished queries are recorded: the JSON lines output, or beside the run."""
    if args.output_jsonl_file is not None:
        return args.output_jsonl_file
    if args.output_trec_file is not None:
        return args.output_trec_file.with_name(args.output_trec_file.name + ".records.jsonl")
    return None


def _open_log(args: Args, path: Path, settings: dict[str, Any], stack: ExitStack) -> RecordLog:
    from steersman.core.reranking.job import RecordLog

    log = RecordLog(path, settings, resume=args.resume, overwrite=args.overwrite)
    return stack.enter_context(log)


# -- engines ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Engine:
    """What ranks the requests: this process, or a cluster."""

    settings: dict[str, Any]
    rows: int
    run: Callable[[Iterable[Request], RecordLog | None], Iterator[Outcome]]


def _work(args: Args, model_args: common.ModelArgs, held: bytes | None) -> Work:
    from steersman.core.reranking.cluster import Work
    from steersman.core.reranking.job import digest, digest_files
    from steersman.core.reranking.prompt import read_prompt

    if held is not None:
        made_of = digest(held)
    elif args.input_json is not None:
        made_of = digest(args.input_json.encode())
    else:
        made_of = digest_files(args.files)
    first = {"permutations": args.permutations, "content_free": args.content_free}
    prompt = None if args.prompt_file is None else read_prompt(args.prompt_file)
    return Work(
        load=model_args.resolve(),
        method=args.method,
        method_options=first if args.method == "first" else {},
        window=args.window_size,
        stride=args.stride,
        passes=args.num_passes,
        max_words=args.max_words,
        first_stage_weight=args.first_stage_weight,
        top_k=args.top_k_rerank,
        prompt=None if prompt is None else asdict(prompt),
        batch_size=args.batch_size,
        settings={
            "input": made_of,
            "top_k_candidates": args.top_k_candidates,
            "top_k_rerank": args.top_k_rerank,
            "shuffle_seed": args.seed if args.shuffle_candidates else None,
        },
    )


def _here(
    args: Args, work: Work, held: bytes | None, envelope: common.Envelope, stack: ExitStack
) -> _Engine:
    from steersman.core.reranking.batch import rows_for
    from steersman.core.reranking.job import run_job

    model, reranker = work.open()
    stack.enter_context(model)
    stack.enter_context(reranker)
    envelope.resolved["model"] = common.model_facts(model)
    history = _History(args.invocations_history_file, reranker, stack)

    def run(found: Iterable[Request], log: RecordLog | None) -> Iterator[Outcome]:
        return run_job(
            reranker,
            found,
            log=log,
            top_k=work.top_k,
            on_call=history.add,
            batch_size=work.batch_size,
            tokenise_ahead=not args.stdin or held is not None,  # a live pipe is not read ahead
        )

    rows = rows_for(reranker, work.batch_size)
    return _Engine(settings=work.record_settings(reranker), rows=rows, run=run)


def _cluster(
    args: Args, work: Work, held: bytes | None, envelope: common.Envelope, stack: ExitStack
) -> _Engine:
    from steersman.core.reranking.cluster import Cluster

    load = dict(work.load)
    for name in ("model", "adapter"):  # a worker stands in another folder
        if name in load and Path(load[name]).exists():
            load[name] = str(Path(load[name]).resolve())
    cpus = load.setdefault("threads", 1)
    on_gpu = str(load.get("device", "")).startswith(("cuda", "gpu"))
    cluster = stack.enter_context(
        Cluster(
            replace(work, load=load),
            workers=args.workers,
            cpus=cpus,
            gpus=int(on_gpu),
            address=args.ray_address,
        )
    )
    envelope.resolved["model"] = cluster.facts
    envelope.resolved["workers"] = cluster.workers

    def run(found: Iterable[Request], log: RecordLog | None) -> Iterator[Outcome]:
        return cluster.run(found, log=log)

    return _Engine(settings=cluster.settings, rows=cluster.rows, run=run)


def _finish(args: Args, log: RecordLog, problems: Problems) -> None:
    """Write the run from the records, and tidy up."""
    from steersman.core.reranking.job import write_run_from_log

    envelope = problems.envelope
    if args.output_trec_file is not None:
        repeated = write_run_from_log(log, args.output_trec_file, tag=args.tag)
        if repeated:
            envelope.warn(
                f"{args.output_trec_file}: {repeated} repeated documents were left out, "
                "a run holds each once per query"
            )
        envelope.artifacts["trec"] = args.output_trec_file
    if args.output_jsonl_file is not None:
        envelope.artifacts["jsonl"] = args.output_jsonl_file
    elif not problems.queries:
        log.close()
        log.path.unlink()


@dataclass
class _Tally:
    """What the job did."""

    ranked: int = 0
    skipped: int = 0
    failed: int = 0
    windows: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    malformed_answers: int = 0
    shortened_queries: int = 0
    seconds: float = 0.0

    def add(self, outcome: Outcome) -> None:
        if outcome.error is not None:
            self.failed += 1
        elif outcome.usage is None:
            self.skipped += 1
        else:
            usage = outcome.usage
            self.ranked += 1
            self.windows += usage.windows
            self.prompt_tokens += usage.prompt_tokens
            self.cached_tokens += usage.cached_tokens
            self.generated_tokens += usage.generated_tokens
            self.malformed_answers += usage.malformed
            self.shortened_queries += usage.word_limit is not None

    def sentence(self) -> str:
        parts = [f"{self.ranked} queries ranked, {self.windows} windows, {self.seconds:.1f} s"]
        if self.skipped:
            parts.append(f"{self.skipped} were done before")
        if self.failed:
            parts.append(f"{self.failed} failed")
        if self.malformed_answers:
            parts.append(f"{self.malformed_answers} answers were no permutation")
        if self.shortened_queries:
            parts.append(f"{self.shortened_queries} had passages cut to fit the context")
        return "; ".join(parts)


class _History:
    """Appends one JSON line per compared window."""

    def __init__(self, path: Path | None, reranker: Reranker, stack: ExitStack) -> None:
        self._facts = {"method": reranker.name, "model": reranker.model.info.name}
        self._file = None
        if path is not None:
            try:
                file = path.open("a", encoding="utf-8", newline="\n")
            except OSError as error:
                raise MissingFile(f"{path}: cannot be written: {error.strerror}") from None
            self._file = stack.enter_context(file)
        self.add = None if self._file is None else self._add

    def _add(self, request: Request, call: WindowCall) -> None:
        docids = [c.docid for c in request.candidates]
        line = {
            "qid": request.qid,
            **self._facts,
            **asdict(call),
            "docids": [docids[i] for i in call.order],
        }
        assert self._file is not None
        self._file.write(common.to_json(line) + "\n")
        self._file.flush()
