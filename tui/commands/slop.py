"""``steersman slop``: what a model says too often, and a profile that keeps it from doing so."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from steersman.core.errors import UsageError

from .. import common, output
from ..options import FILE, WIDE, overwrite_option, refuse_existing, whole

if TYPE_CHECKING:
    from steersman.core.slop import Human, SlopProfile

CORPUS_PROFILE = "slop-corpus"
SHOWN = 20  # entries of each kind on the terminal


@click.group("slop")
def command() -> None:
    """Find a model's over-used words and phrases."""


@command.command("profile", context_settings=WIDE)
@click.argument("texts", nargs=-1, metavar="[TEXTS]...", type=FILE)
@common.option(
    "--prompts",
    metavar="FILE",
    envvar=None,
    help="Write texts to these prompts first (JSONL, as generate --jsonl takes them); they are "
    "kept, and a stopped run goes on.",
)
@common.option("--chat", is_flag=True, help="Send the prompts as chat messages.")
@common.option(
    "--human",
    "human_file",
    type=FILE,
    metavar="FILE",
    help="Published profile of human writing (slop-forensics JSON) for n-grams.",
)
@common.option(
    "--human-text",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="Count these human texts instead; may be repeated.",
)
@common.option(
    "--out",
    type=FILE,
    metavar="FILE",
    help="Write a profile that bans what was found (NAME.yaml); run it with --profile FILE.",
)
@common.option(
    "--plot",
    type=FILE,
    metavar="FILE",
    help="Plot as PNG, SVG or PDF [with --out: NAME.svg where matplotlib is installed].",
)
@common.option(
    "--allow",
    type=FILE,
    metavar="FILE",
    help="Words and phrases to leave alone, one per line.",
)
@common.option("--words", type=whole(0, 10_000), default=100, help="Words to ban [100].")
@common.option("--phrases", type=whole(0, 10_000), default=50, help="Phrases to ban [50].")
@common.option(
    "--ngrams",
    type=whole(0, 10_000),
    default=0,
    help="Bigrams and trigrams to ban, stopwords between them ignored [0].",
)
@common.option(
    "--min-ratio",
    type=common.Finite(1, 1e6),
    default=2.0,
    help="Leave out what people use more than 1/N times as often [2].",
)
@common.option(
    "--min-texts",
    type=whole(1, 1_000_000),
    default=3,
    help="Leave out what occurs in fewer texts [3].",
)
@common.option(
    "--factor", type=common.Finite(0, 1), default=0.0, help="Of the ban: 0 never, 1 no ban [0]."
)
@overwrite_option()
@common.model_options
@common.sampling_options
@common.output_options
def profile_command(
    texts: tuple[Path, ...],
    prompts: str | None,
    chat: bool,
    human_file: Path | None,
    human_text: tuple[Path, ...],
    out: Path | None,
    plot: Path | None,
    allow: Path | None,
    words: int,
    phrases: int,
    ngrams: int,
    min_ratio: float,
    min_texts: int,
    factor: float,
    overwrite: bool,
    model_args: common.ModelArgs,
    sampling: common.SamplingArgs,
) -> None:
    """Rank what TEXTS over-use against human writing, and make a ban list of it.

    TEXTS are results of `steersman generate --jsonl ... --out`, or plain text with blank lines
    between texts. Some hundred texts of some hundred tokens are needed for useful ranks.

    \b
    steersman slop profile --prompts prompts.jsonl -n 300 --out my-bans.yaml
    steersman slop profile texts.jsonl --human-text novels.txt --out my-bans.yaml
    steersman generate --profile ./my-bans.yaml -p "Once upon a time"
    """  # fmt: skip
    with common.Envelope("slop profile") as envelope:
        envelope.inputs = {"texts": texts, "prompts": prompts, "out": out, "human": human_file}
        if not texts and prompts is None:
            raise UsageError("texts: name some files, or --prompts to have them written")
        if human_file is not None and human_text:
            raise UsageError("--human: not together with --human-text")
        plot = _plot_path(out, plot, envelope)
        refuse_existing(out, plot, overwrite=overwrite)
        if prompts is not None:
            store = _store(prompts, out)
            _write_texts(prompts, store, chat, model_args, sampling, envelope)
            if envelope.exit_code:
                return
            texts = (*texts, store)
        found = _analysed(texts, human_file, human_text, allow, min_ratio, min_texts)
        banned = _banned(found, words, phrases, ngrams)
        envelope.result = _result(found, banned)
        envelope.metrics = {"texts": found.texts, "characters": found.chars}
        if out is not None:
            _write_profile(out, banned, factor, found)
            envelope.artifacts["profile"] = out
        if plot is not None:
            from ..slop_plot import write_plot

            write_plot(plot, found)
            envelope.artifacts["plot"] = plot
        if not envelope.json:
            _print(found, banned)
            envelope.note_artifacts()


def _plot_path(out: Path | None, plot: Path | None, envelope: common.Envelope) -> Path | None:
    from importlib.util import find_spec

    from steersman.core.errors import MissingDependency

    installed = find_spec("matplotlib") is not None
    if plot is not None:
        if plot.suffix.lower() not in (".png", ".svg", ".pdf"):
            raise UsageError(f"--plot {plot}: must end in .png, .svg or .pdf")
        if not installed:
            raise MissingDependency(
                'matplotlib: not installed; run: pip install "steersman[plots]"'
            )
        return plot
    if out is None:
        return None
    if not installed:
        envelope.warn('no plot: matplotlib is not installed (pip install "steersman[plots]")')
        return None
    return out.with_suffix(".svg")


def _store(prompts: str, out: Path | None) -> Path:
    if out is not None:
        return out.with_suffix(".texts.jsonl")
    if prompts == "-":
        raise UsageError("--prompts -: give --out as well, to keep the texts beside it")
    return Path(prompts).with_suffix(".texts.jsonl")


def _write_texts(
    prompts: str,
    store: Path,
    chat: bool,
    model_args: common.ModelArgs,
    sampling: common.SamplingArgs,
    envelope: common.Envelope,
) -> None:
    from dataclasses import replace

    from ..batch import run_batch

    if sampling.profile == common.DEFAULT_PROFILE:
        sampling = replace(sampling, profile=CORPUS_PROFILE)
    if sampling.seed is None:
        sampling = replace(sampling, seed=0)  # a stopped run goes on with the same texts
    run_batch(
        prompts,
        str(store),
        model_args=model_args,
        sampling=sampling,
        chat=chat,
        system=None,
        top_logprobs=None,
        envelope=envelope,
    )
    envelope.artifacts = {"texts": store}


def _analysed(
    paths: tuple[Path, ...],
    human_file: Path | None,
    human_text: tuple[Path, ...],
    allow: Path | None,
    min_ratio: float,
    min_texts: int,
) -> SlopProfile:
    from steersman.core.errors import InvalidInput
    from steersman.core.slop import count_texts, slop_profile
    from steersman.core.slop.texts import read_texts

    human = _human(human_file, human_text)
    texts = [text for path in paths for text in read_texts(path)]
    if not any(text.strip() for text in texts):
        raise InvalidInput(f"{paths[0]}: holds no text")
    allowed = set() if allow is None else {line.strip() for line in _read_lines(allow)}
    with output.progress(len(texts), label="count", unit="text") as bar:
        counts = count_texts(texts, progress=bar.update)
    return slop_profile(
        texts, counts, human, min_ratio=min_ratio, min_texts=min_texts, allowed=allowed
    )


def _human(human_file: Path | None, human_text: tuple[Path, ...]) -> Human:
    from steersman.core.slop import Human, human_of_texts, read_human
    from steersman.core.slop.human import word_table
    from steersman.core.slop.texts import read_texts

    if human_file is not None:
        return read_human(human_file)
    if human_text:
        return human_of_texts(
            (text for path in human_text for text in read_texts(path)),
            source=", ".join(map(str, human_text)),
        )
    return Human(source="wordfreq (English)", word_frequency=word_table())


def _read_lines(path: Path) -> list[str]:
    return [line for line in common.read_text(path).splitlines() if line.strip()]


def _banned(found: SlopProfile, words: int, phrases: int, ngrams: int) -> dict[str, list[str]]:
    return {
        "phrases": [e.text for e in found.words[:words]]
        + [e.text for e in found.phrases[:phrases]],
        "ngrams": [e.text for e in found.ngrams[:ngrams]],
    }


def _result(found: SlopProfile, banned: dict[str, list[str]]) -> dict[str, Any]:
    lists = {"words": found.words, "phrases": found.phrases, "ngrams": found.ngrams}
    return {
        "texts": found.texts,
        "characters": found.chars,
        "human": found.human,
        **{name: [vars(e) for e in entries] for name, entries in lists.items()},
        "banned": banned,
    }


def _write_profile(
    path: Path, banned: dict[str, list[str]], factor: float, found: SlopProfile
) -> None:
    """Write a profile that loads, at once or not at all."""
    import os

    import yaml

    from steersman.core.profile import load_profile

    base = load_profile("antislop").as_dict()
    strategy = base["strategy"]["antislop"]
    base["description"] = (
        f"Bans what {found.texts} texts of the model over-used against {Path(found.human).name}."
    )
    strategy.update(phrases=banned["phrases"], ngrams=banned["ngrams"], factor=factor, regexes=[])
    strategy["factors"] = {}
    strategy.pop("phrases_file", None)
    text = yaml.safe_dump(base, sort_keys=False, allow_unicode=True, width=100)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.stem}.part.yaml")
    try:
        part.write_text(text, encoding="utf-8")
        load_profile(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _print(found: SlopProfile, banned: dict[str, list[str]]) -> None:
    chosen = {text for texts in banned.values() for text in texts}
    output.print_text(f"{found.texts} texts, {found.chars} characters, against {found.human}")
    for title, entries in (
        ("words", found.words),
        ("phrases", found.phrases),
        ("bigrams and trigrams", found.ngrams),
    ):
        if not entries:
            output.print_text(f"\n{title}: none stands out")
            continue
        rows = [
            [
                "x" if entry.text in chosen else "",
                entry.text,
                entry.count,
                entry.texts,
                "-" if entry.ratio is None else f"{entry.ratio:,.1f}",
                _bar(entry.ratio),
            ]
            for entry in entries[:SHOWN]
        ]
        header = ["ban", title, "count", "texts", "times human", "(log scale)"]
        output.print_text()
        print(output.table(rows, header=header, right=(2, 3, 4)))
        if len(entries) > SHOWN:
            output.print_text(f"... and {len(entries) - SHOWN} more (--json has them all)")


def _bar(ratio: float | None) -> str:
    import math

    return "" if ratio is None else "█" * min(40, round(6 * math.log10(max(ratio, 1))))
