"""``steersman index``: make a collection searchable, in a job that survives being killed."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import Cancelled, InvalidInput, UsageError

from .. import common, output
from ..envelope import INVALID, PARTIAL
from ..interrupts import ctrl_c_cancels
from ..options import FILE, file_option, overwrite_option, whole

if TYPE_CHECKING:
    from steersman.core.retrieval import Document, Index, PromptReps

_SHOWN_PROBLEMS = 20


@click.command("index")
@click.argument("docs", nargs=-1, required=True, metavar="DOCS...", type=FILE)
@file_option("--out", metavar="FOLDER", required=True, help="Folder of the index.")
@common.option("--add", is_flag=True, envvar=None, help="Add to an index that is there.")
@overwrite_option("Replace an index that is there.")
@common.option("--no-dense", is_flag=True, help="Bags of words only, no vectors.")
@common.option(
    "--passage-tokens",
    type=whole(1),
    default=512,
    help="Tokens that the model reads of each text [512].",
)
@common.option(
    "--keep", type=whole(1, 1 << 16), default=128, help="Most tokens in a bag of words [128]."
)
@common.option(
    "--expansion",
    type=whole(0, 1 << 16),
    default=0,
    help="Tokens outside the text added to its bag [0].",
)
@common.option(
    "--stop-words",
    type=click.Choice(["english", "none"]),
    default="english",
    help="Words left out of the bags [english].",
)
@common.option(
    "--centred",
    is_flag=True,
    help="Subtract the median logit first, for models with few positive ones.",
)
@common.option(
    "--prompt-file", type=FILE, metavar="FILE", help="YAML with the wording: system, text, answer."
)
@common.option(
    "--batch-size", type=whole(1, 4096), default=8, help="Texts per call of the model [8]."
)
@common.option(
    "--exact-below",
    type=whole(1),
    default=50_000,
    help="Documents from which vectors are searched approximately [50000].",
)
@common.model_options
@common.output_options
def command(
    docs: tuple[Path, ...],
    out: Path,
    add: bool,
    overwrite: bool,
    exact_below: int,
    batch_size: int,
    model_args: common.ModelArgs,
    **given: Any,
) -> None:
    """Index DOCS for `steersman search`, with a model that was never trained for it.

    \b
    steersman index docs.jsonl --out my-index
    steersman index more.tsv --out my-index --add
    steersman search my-index --query "what do fleas eat"

    DOCS are JSON lines (_id or docid, text, perhaps title), or id<TAB>text; .gz is unpacked, - is
    stdin. A job that was stopped goes on when the same command is given again. A line that cannot
    be used is reported and left out; the command then ends with exit code 7.
    """  # fmt: skip
    with common.Envelope("index") as envelope, ExitStack() as stack:
        envelope.inputs = {"docs": docs, "out": out, "add": add, "overwrite": overwrite, **given}
        if add and overwrite:
            raise UsageError("--add and --overwrite exclude each other")
        _run(docs, out, add, overwrite, exact_below, batch_size, model_args, given, envelope, stack)


def _run(
    docs: tuple[Path, ...],
    out: Path,
    add: bool,
    overwrite: bool,
    exact_below: int,
    batch_size: int,
    model_args: common.ModelArgs,
    given: dict[str, Any],
    envelope: common.Envelope,
    stack: ExitStack,
) -> None:
    from steersman.core.reranking.job import digest_files
    from steersman.core.reranking.trec import require_file
    from steersman.core.retrieval import Representer, build, open_index
    from steersman.core.retrieval.vectors import library

    held = open_index(out) if add else None
    settings = _settings(given, held)
    if held is not None:
        model_args = as_indexed(model_args, held)
    if settings.dense:
        library()  # before a model is loaded
    files = {str(path): _spooled(stack) if str(path) == "-" else require_file(path)
             for path in docs}  # fmt: skip
    if len(files) < len(docs):
        raise UsageError("docs: a file is named twice")
    job = digest_files(files.values())
    problems = Problems(envelope)
    model = stack.enter_context(common.load_model(model_args, envelope=envelope))
    stop = stack.enter_context(ctrl_c_cancels())
    representer = stack.enter_context(
        Representer(model, settings, rows=batch_size, cancelled=stop.is_set)
    )
    envelope.artifacts["index"] = out
    try:
        with output.progress(_count(files.values()), label="index", unit="doc") as bar:
            built = build(
                representer,
                _documents(files, problems, stack),
                out,
                job=job,
                add=add,
                overwrite=overwrite,
                exact_below=exact_below,
                report=problems,
                progress=bar.update,
            )
    except (Cancelled, KeyboardInterrupt):
        output.note(f"{out}: what was done is kept; the same command goes on")
        raise
    envelope.metrics = {**asdict(built), "input_problems": problems.count}
    problems.settle(succeeded=built.added + built.skipped)
    if not envelope.json:
        done = f", {built.skipped} were done before" if built.skipped else ""
        output.print_text(
            f"{out}: {built.added} documents added{done}; {built.documents} in the index"
        )


def _settings(given: dict[str, Any], held: Index | None) -> PromptReps:
    """Return the settings asked for; for an addition those of the index, where none was named."""
    from steersman.core.retrieval import PromptReps
    from steersman.core.retrieval.prompt import read_word_prompt

    said: dict[str, Any] = {
        "max_tokens": given["passage_tokens"],
        "dense": not given["no_dense"],
        "keep": given["keep"],
        "expansion": given["expansion"],
        "stop_words": given["stop_words"],
        "centred": given["centred"],
    }
    if given["prompt_file"] is not None:
        said["prompt"] = read_word_prompt(given["prompt_file"])
    if held is None:
        return PromptReps(**said)
    flags = {"max_tokens": "passage_tokens", "dense": "no_dense", "prompt": "prompt_file"}
    named = {k: v for k, v in said.items() if common.origin(flags.get(k, k)) != "built-in"}
    return replace(held.settings, **named)


def _spooled(stack: ExitStack) -> Path:
    """Copy stdin to a file, so that a job can be told from another one before it starts."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="steersman-")))
    path = folder / "stdin"
    with path.open("wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file, 1 << 20)
    return path


def _documents(files: dict[str, Path], problems: Problems, stack: ExitStack) -> Iterator[Document]:
    from steersman.core.retrieval import read_documents
    from steersman.core.text_lines import open_text

    for name, path in files.items():
        told = "stdin" if name == "-" else name
        lines = stack.enter_context(open_text(path))
        yield from read_documents(lines, told, report=problems)


def _count(paths: Iterable[Path]) -> int | None:
    """Number of documents for the progress bar, where it costs little to know."""
    total = 0
    for path in paths:
        if path.suffix == ".gz":
            return None
        with path.open("rb") as file:
            total += sum(bool(line.strip()) for line in file)
    return total


def as_indexed(args: common.ModelArgs, index: Index) -> common.ModelArgs:
    """Return the arguments with the index's own model where none was named."""
    if args.model is not None:
        return args
    held = index.manifest.engine.get("options", {})
    names = ("model", "adapter", "layers")
    known = {n: held[n] for n in names if isinstance(held.get(n), str) and hasattr(args, n)}
    backend = args.backend or str(index.manifest.engine.get("backend", "")) or None
    if backend is not None and args.backend is None:
        from steersman.core.backend import missing_modules

        if backend not in ("llamacpp", "torch", "mlx") or _lacks(backend, missing_modules):
            backend = None
    return replace(args, **known, backend=backend)


def _lacks(backend: str, missing_modules: Any) -> bool:
    try:
        return bool(missing_modules(backend))
    except KeyError:
        return True


class Problems:
    """Lines that cannot be used: counted, the first ones shown and kept."""

    def __init__(self, envelope: common.Envelope) -> None:
        self.envelope, self.count = envelope, 0

    def __call__(self, error: InvalidInput) -> None:
        self.count += 1
        if self.count <= _SHOWN_PROBLEMS:
            self.envelope.fail(error, exit_code=PARTIAL)

    def settle(self, succeeded: int) -> None:
        """Set the exit code: 7 if something succeeded, else 5."""
        if self.count > _SHOWN_PROBLEMS:
            self.envelope.warn(f"{self.count - _SHOWN_PROBLEMS} more problems are not shown")
        if self.count:
            self.envelope.exit_code = PARTIAL if succeeded else INVALID
