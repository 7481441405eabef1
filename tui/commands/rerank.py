"""``steersman rerank``: order passages by relevance, in batches that survive being killed."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from steersman.core.errors import UsageError

from .. import common, output
from ..options import FILE, whole
from ..rerank_job import Args, Problems, requests, run_rerank

_INPUT = (
    common.option("--requests-file", type=FILE, metavar="FILE",
                  help="JSON lines: query and candidates; .gz is unpacked."),
    common.option("--input-json", metavar="JSON", help="One request as text."),
    common.option("--stdin", is_flag=True, help="JSON lines from stdin."),
    common.option("--run", type=FILE, metavar="FILE",
                  help="TREC run of the first stage, with --queries and --collection."),
    common.option("--queries", type=FILE, metavar="FILE",
                  help="id<TAB>text, or JSON lines with _id and text."),
    common.option("--collection", type=FILE, metavar="FILE",
                  help="id<TAB>text, or JSON lines with _id, title and text."),
    common.option("--top-k-candidates", type=whole(1), metavar="N",
                  help="Take the first N candidates of each query [all]."),
    common.option("--shuffle-candidates", is_flag=True,
                  help="Put the candidates in random order first."),
    common.option("--seed", type=whole(0, 2**64 - 1), default=0,
                  help="Of the shuffle [0]."),
)  # fmt: skip

_METHOD = (
    common.option("--method", type=click.Choice(["first", "generate"]), default="first",
                  help="first reads one logit row per window; generate writes the permutation."),
    common.option("--window-size", type=whole(2, 26), default=20,
                  help="Passages compared at once, 2 to 26 [20]."),
    common.option("--stride", type=whole(1, 26),
                  help="How far the window moves [half its size]."),
    common.option("--num-passes", type=whole(1, 1000), default=1,
                  help="How often the list is gone through [1]."),
    common.option("--max-words", type=whole(1), default=300,
                  help="Words kept of each passage [300]."),
    common.option("--first-stage-weight", type=common.Finite(0, 1e6), default=0.0, metavar="W",
                  help="Fuse the result with the order of the candidates' scores (reciprocal "
                       "ranks): 1 trusts both alike, 0 the model alone [0]."),
    common.option("--batch-size", type=whole(1, 256), default=1,
                  help="Queries whose windows share the model's calls [1]."),
    common.option("--engine", type=click.Choice(["local", "ray"]), default="local",
                  help="Where the work is done: in this process, or spread over a Ray cluster."),
    common.option("--workers", type=whole(1, 10_000), metavar="N",
                  help="ray: models at once [as many as there is room for]."),
    common.option("--ray-address", metavar="ADDRESS",
                  help="ray: a running cluster [$RAY_ADDRESS, or one of this machine alone]."),
    common.option("--permutations", type=whole(1, 26), default=1,
                  help="first: average over N presentations of each window [1]."),
    common.option("--content-free", is_flag=True,
                  help="first: subtract the scores of a window without content."),
    common.option("--prompt-file", type=FILE, metavar="FILE",
                  help="YAML with the wording: system, opening, passage, closing."),
)  # fmt: skip

_OUTPUT = (
    common.option("--top-k-rerank", type=whole(1), metavar="N",
                  help="Keep the best N of each query [all]."),
    common.option("--output-jsonl-file", type=FILE, metavar="FILE",
                  help="Results as JSON lines, each on disk before the next query starts."),
    common.option("--output-trec-file", type=FILE, metavar="FILE",
                  help="Results as a TREC run with strictly falling scores."),
    common.option("--tag", default="steersman", help="Last column of the run [steersman]."),
    common.option("--invocations-history-file", type=FILE, metavar="FILE",
                  help="Append every model call: prompts, answer, scores, tokens."),
    common.option("--resume", is_flag=True, help="Go on with a job that was stopped."),
    common.option("--overwrite", is_flag=True, help="Replace existing output."),
    common.option("--dry-run", is_flag=True,
                  help="Read everything, say what would be done, load no model."),
    common.option("--validate-only", is_flag=True, help="Check the input and stop."),
)  # fmt: skip


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for decorate in reversed((*_INPUT, *_METHOD, *_OUTPUT)):
        function = decorate(function)
    return function


@click.command("rerank")
@click.argument("source", required=False, metavar="[FILE|-]", type=FILE)
@_options
@common.model_options
@common.output_options
def command(source: Path | None, model_args: common.ModelArgs, **given: Any) -> None:
    """Order passages by how well they answer a query.

    \b
    steersman rerank --requests-file in.jsonl --output-jsonl-file out.jsonl
    steersman rerank --run bm25.txt --queries q.tsv --collection docs.jsonl \\
        --output-trec-file first.txt
    echo '{"query": "what do fleas eat", "candidates": ["Tax law", "Blood"]}' |
        steersman rerank -
    steersman search my-index queries.tsv -k 20 | steersman rerank -

    FILE is short for --requests-file FILE, - for --stdin.
    Without an output file the results are JSON lines on stdout. A line or query that cannot be
    used is reported and the job goes on; it then ends with exit code 7.
    """
    given |= _from_source(source, given)
    mode = Args(**given).mode
    with common.Envelope("rerank", mode) as envelope, ExitStack() as stack:
        args = Args(**(given | _trained_with(model_args, given)))
        envelope.inputs.update({k: v for k, v in given.items() if v not in (None, False)})
        _check(args)
        problems = Problems(envelope)
        if args.validate_only or args.dry_run:
            _look(args, problems)
            return
        run_rerank(args, model_args, problems, stack)


def _from_source(source: Path | None, given: dict[str, Any]) -> dict[str, Any]:
    """Return what the argument stands for: --stdin or --requests-file."""
    if source is None:
        return {}
    name = "stdin" if str(source) == "-" else "requests_file"
    if given[name]:
        raise UsageError(f"input: {source} and --{name.replace('_', '-')} say the same; give one")
    return {name: True if name == "stdin" else source}


def _trained_with(model_args: common.ModelArgs, given: dict[str, Any]) -> dict[str, Any]:
    """Return what the adapter says about windows and wording, where nothing else was said."""
    if model_args.adapter is None:
        return {}
    from steersman.core.adapters import find_adapter, read_rerank_settings

    settings, prompt = read_rerank_settings(find_adapter(model_args.adapter))
    found = {**asdict(settings), "prompt_file": prompt}
    if given["window_size"] != settings.window_size and common.origin("window_size") != "built-in":
        found["stride"] = None  # it belongs to the adapter's own window
    return {
        name: value
        for name, value in found.items()
        if value is not None and common.origin(name) == "built-in"
    }


def _check(args: Args) -> None:
    """Refuse what cannot work before any file is read or model loaded."""
    kinds = {
        "--requests-file": args.requests_file is not None,
        "--input-json": args.input_json is not None,
        "--stdin": args.stdin,
        "--run": args.run is not None,
    }
    chosen = [name for name, given in kinds.items() if given]
    if len(chosen) != 1:
        told = f"got {' and '.join(chosen)}" if chosen else "got none"
        raise UsageError(f"input: give one of {', '.join(kinds)}; {told}")
    if args.run is not None and (args.queries is None or args.collection is None):
        raise UsageError("--run: needs --queries and --collection as well")
    if args.run is None and (args.queries is not None or args.collection is not None):
        raise UsageError("--queries and --collection go with --run")
    if args.resume and args.overwrite:
        raise UsageError("--resume and --overwrite exclude each other")
    outputs = [p for p in (args.output_jsonl_file, args.output_trec_file) if p is not None]
    if args.resume and not outputs:
        raise UsageError("--resume: needs --output-jsonl-file or --output-trec-file to go on with")
    if len(args.tag.split()) != 1:
        raise UsageError(f"--tag {args.tag!r}: must be one word")
    if args.method != "first" and (args.permutations != 1 or args.content_free):
        raise UsageError("--permutations and --content-free go with --method first")
    if args.engine != "ray" and (args.workers is not None or args.ray_address is not None):
        raise UsageError("--workers and --ray-address go with --engine ray")
    if args.engine == "ray" and args.invocations_history_file is not None:
        raise UsageError("--invocations-history-file: not with --engine ray; run one query locally")
    from steersman.core.reranking.job import refuse_existing
    from steersman.core.reranking.trec import require_file
    from steersman.core.reranking.windows import check_window

    check_window(args.window_size, args.step, args.num_passes)
    for path in (*args.files, *([args.prompt_file] if args.prompt_file else [])):
        require_file(path)
    for path in outputs:
        if path.resolve() in [p.resolve() for p in args.files]:
            raise UsageError(f"{path}: is both input and output")
        if not args.resume and not args.overwrite and args.mode == "run":
            refuse_existing(path)
    if len(outputs) == 2 and outputs[0].resolve() == outputs[1].resolve():
        raise UsageError(f"{outputs[0]}: two outputs cannot go to one file")


def _look(args: Args, problems: Problems) -> None:
    """Read all input and report; no model is loaded."""
    from steersman.core.reranking.prompt import read_prompt
    from steersman.core.reranking.windows import windows

    if args.prompt_file is not None:
        read_prompt(args.prompt_file)
    queries = candidates = planned = 0
    with ExitStack() as stack:
        for request in requests(args, problems, stack):
            queries += 1
            candidates += len(request.candidates)
            plan = windows(len(request.candidates), args.window_size, args.step)
            planned += args.num_passes * sum(end - begin > 1 for begin, end in plan)
    envelope = problems.envelope
    envelope.validation.update(
        queries=queries, candidates=candidates, windows=planned, problems=problems.lines
    )
    envelope.metrics["problems"] = problems.counted()
    problems.settle(succeeded=0 if args.validate_only else queries)
    if problems.kinds:
        output.note(problems.sentence())
    if not envelope.json:
        verb = "checked" if args.validate_only else "would compare"
        output.print_text(
            f"{verb} {queries} queries, {candidates} candidates, {planned} windows; "
            f"{problems.lines} problems"
        )
