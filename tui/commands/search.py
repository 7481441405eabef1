"""``steersman search``: ask an index, for people, pipes and evaluations."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import MissingFile, UsageError

from .. import common, output
from ..interrupts import ctrl_c_cancels
from ..options import FILE, overwrite_option, refuse_existing, whole
from .index import Problems, as_indexed

if TYPE_CHECKING:
    from steersman.core.retrieval import Document, Hit, Searcher

HITS, SHOWN_HITS = 100, 10


@click.command("search")
@click.argument("index", type=FILE)
@click.argument("queries", required=False, type=FILE, metavar="[QUERIES]")
@common.option(
    "-Q",
    "--query",
    multiple=True,
    envvar=None,
    metavar="TEXT",
    help="A query as text; may be repeated.",
)
@common.option(
    "--mode",
    type=click.Choice(["hybrid", "dense", "sparse"]),
    default="hybrid",
    help="Vectors, bags of words, or both fused [hybrid].",
)
@common.option(
    "-k",
    "--hits",
    type=whole(1),
    help="Documents returned for each query [100; 10 on a terminal].",
)
@common.option(
    "--depth",
    type=whole(1),
    default=1000,
    help="Documents taken from each side before fusion [1000].",
)
@common.option(
    "--alpha",
    type=common.Finite(0, 1),
    default=0.5,
    help="Weight of the vectors in a hybrid search [0.5].",
)
@common.option(
    "--remove-query",
    is_flag=True,
    help="Leave out a document whose id is the query's, as BEIR does.",
)
@common.option(
    "--batch-size", type=whole(1, 4096), default=8, help="Queries per call of the model [8]."
)
@common.option(
    "--output-jsonl-file",
    type=FILE,
    metavar="FILE",
    help="Requests for steersman rerank as JSON lines.",
)
@common.option(
    "--output-trec-file",
    type=FILE,
    metavar="FILE",
    help="A TREC run with strictly falling scores.",
)
@common.option("--tag", default="steersman", help="Last column of the run [steersman].")
@overwrite_option("Replace existing output.")
@common.model_options
@common.output_options
def command(
    index: Path,
    queries: Path | None,
    query: tuple[str, ...],
    model_args: common.ModelArgs,
    **given: Any,
) -> None:
    """Find the documents of INDEX that answer QUERIES, or the --query given.

    \b
    steersman search my-index --query "what do fleas eat"
    steersman search my-index queries.tsv --output-trec-file run.txt
    steersman search my-index queries.tsv -k 20 | steersman rerank - > ranked.jsonl

    QUERIES are JSON lines (_id, text) or id<TAB>text; - is stdin. The model is the one that INDEX
    was made with, unless --model says where else its weights are. Into a pipe go JSON lines that
    `steersman rerank` reads; on a terminal the hits are listed.
    """  # fmt: skip
    with common.Envelope("search") as envelope, ExitStack() as stack:
        envelope.inputs = {"index": index, "queries": queries, "query": query, **given}
        if (queries is None) == (not query):
            raise UsageError("search: give a file of queries, or --query TEXT, and not both")
        if len(given["tag"].split()) != 1:
            raise UsageError(f"--tag {given['tag']!r}: must be one word")
        outputs = [p for p in (given["output_jsonl_file"], given["output_trec_file"]) if p]
        if len(outputs) == 2 and outputs[0].resolve() == outputs[1].resolve():
            raise UsageError(f"{outputs[0]}: two outputs cannot go to one file")
        refuse_existing(*outputs, overwrite=given["overwrite"])
        _run(index, queries, query, model_args, given, envelope, stack)


def _run(
    folder: Path,
    path: Path | None,
    texts: tuple[str, ...],
    model_args: common.ModelArgs,
    given: dict[str, Any],
    envelope: common.Envelope,
    stack: ExitStack,
) -> None:
    from steersman.core.retrieval import Searcher, open_index
    from steersman.core.retrieval.vectors import library

    index = open_index(folder)
    if index.settings.dense and given["mode"] != "sparse":
        library()  # before a model is loaded
    if not index.complete:
        envelope.warn(f"{folder}: is not finished; {len(index)} documents are searched")
    problems = Problems(envelope)
    asked = _queries(path, texts, problems, stack)
    model_args = as_indexed(model_args, index)
    model = stack.enter_context(common.load_model(model_args, envelope=envelope))
    stop = stack.enter_context(ctrl_c_cancels())
    searcher = stack.enter_context(
        Searcher(
            model,
            index,
            mode=given["mode"],
            depth=given["depth"],
            alpha=given["alpha"],
            remove_query=given["remove_query"],
            rows=given["batch_size"],
            cancelled=stop.is_set,
        )
    )
    if searcher.engine_differs:
        envelope.warn(f"{folder}: {searcher.engine_differs}; scores differ by rounding")
    envelope.resolved["search"] = {"mode": searcher.mode, "documents": len(index)}
    listed = output.is_terminal(sys.stdout) and not envelope.json
    writers = _Writers(given, envelope, stack, listed=listed)
    count = given["hits"] or (SHOWN_HITS if listed and not writers.files else HITS)
    done = 0
    with output.progress(None, label="search", unit="query") as bar:
        for batch, found in _answers(searcher, asked, count, size=max(32, given["batch_size"])):
            for document, hits in zip(batch, found):
                writers.write(document, hits)
            done += len(batch)
            bar.update(len(batch))
    writers.finish()
    envelope.metrics = {"queries": done, "input_problems": problems.count}
    problems.settle(succeeded=done)


def _answers(
    searcher: Searcher, asked: Iterator[Document], count: int, *, size: int
) -> Iterator[tuple[list[Document], list[list[Hit]]]]:
    while batch := list(islice(asked, size)):
        yield batch, searcher.search([(d.docid, d.text) for d in batch], k=count)


def _queries(
    path: Path | None, texts: Iterable[str], problems: Problems, stack: ExitStack
) -> Iterator[Document]:
    from steersman.core.errors import InvalidInput
    from steersman.core.retrieval import Document, read_documents
    from steersman.core.text_lines import open_text

    if path is None:
        for number, text in enumerate(texts, start=1):
            if not text.strip():
                raise UsageError("--query: must be text that is not empty")
            yield Document(docid=str(number), text=text, source="--query")
        return
    piped = str(path) == "-"
    lines = sys.stdin.buffer if piped else stack.enter_context(open_text(path))
    seen: dict[str, str] = {}
    for query in read_documents(lines, "stdin" if piped else str(path), report=problems):
        if query.docid in seen:
            problems(
                InvalidInput(
                    f"{query.source}: id {query.docid!r} was used at {seen[query.docid]}; "
                    "give each query its own"
                )
            )
            continue
        seen[query.docid] = query.source
        yield query


class _Writers:
    """Where the answers go: files that appear whole, the envelope, a pipe, or a list to read."""

    def __init__(
        self, given: dict[str, Any], envelope: common.Envelope, stack: ExitStack, *, listed: bool
    ) -> None:
        self.envelope, self.listed, self.tag = envelope, listed, given["tag"]
        self.files: dict[str, tuple[Path, Path, Any]] = {}
        for kind in ("jsonl", "trec"):
            path: Path | None = given[f"output_{kind}_file"]
            if path is None:
                continue
            part = path.with_name(path.name + ".part")
            try:
                file = part.open("w", encoding="utf-8", newline="\n")
            except OSError as error:
                raise MissingFile(f"{path}: cannot be written: {error.strerror}") from None
            stack.callback(part.unlink, missing_ok=True)
            self.files[kind] = (path, part, stack.enter_context(file))
        if envelope.json and not self.files:
            envelope.result = []

    def write(self, query: Document, hits: list[Hit]) -> None:
        """Write one query's answer."""
        from steersman.core.reranking.io import Candidate, Request, dump_line
        from steersman.core.reranking.trec import check_trec_names, write_run

        rows = [{"docid": h.docid, "score": h.score, "doc": h.text} for h in hits]
        record = {"query": {"text": query.text, "qid": query.docid}, "candidates": rows}
        if "jsonl" in self.files:
            self.files["jsonl"][2].write(dump_line(record))
        if "trec" in self.files:
            candidates = tuple(Candidate(docid=h.docid, text=h.text) for h in hits)
            check_trec_names(
                Request(
                    qid=query.docid, query=query.text, candidates=candidates, source=query.source
                )
            )
            row = (query.docid, [h.docid for h in hits], [h.score for h in hits])
            write_run(self.files["trec"][2], [row], tag=self.tag)
        if self.files:
            return
        if self.envelope.json:
            self.envelope.result.append(record)
        elif self.listed:
            _list(query, hits)
        else:
            output.print_json(common.to_json(record))

    def finish(self) -> None:
        """Put the files in place."""
        for kind, (path, part, file) in self.files.items():
            file.flush()
            os.fsync(file.fileno())
            file.close()
            part.replace(path)
            self.envelope.artifacts[kind] = path


def _list(query: Document, hits: list[Hit]) -> None:
    output.print_text(f"{query.docid}: {query.text}")
    rows = [[h.rank, f"{h.score:.4g}", h.docid, " ".join(h.text.split())[:100]] for h in hits]
    if rows:
        output.print_styled(
            output.table(rows, header=["rank", "score", "document", "text"], right=(0, 1))
        )
    output.print_text()
