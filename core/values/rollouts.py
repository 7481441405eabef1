"""Sampling texts for questions whose answers are known: JSONL, one line per question."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..api import Prompt, encode_prompt
from ..decode.best_of_n import BestOfN
from ..decode.events import Finished, Note
from ..decode.loop import decode
from ..decode.rng import Rng
from ..decode.sessions import Sessions
from ..decode.types import Request, Step
from ..errors import ContextOverflow, InvalidInput, UsageError
from ..journal import hold_job
from ..logits import Chain, Temperature, TopK
from ..model import Capability, Model, Output, Tokenizer
from ..routing.labels import last_number
from ..whole_file import whole_file


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its right answer."""

    prompt: Prompt
    answer: str


@dataclass(frozen=True, kw_only=True)
class RolloutSettings:
    """How texts are sampled and judged.

    Parameters
    ----------
    samples : int
        Texts per question; the predecessor's recipe takes 100.
    rows : int
        Texts that are sampled side by side.
    max_tokens : int
        Of a text.
    temperature : float
    top_k : int
        0: no truncation.
    match : {"number", "text"}
        "number": the last number in the text is the answer's last number. "text": the texts are
        equal but for white space at the ends.
    seed : int
    """

    samples: int = 32
    rows: int = 16
    max_tokens: int = 24
    temperature: float = 0.7
    top_k: int = 50
    match: Literal["number", "text"] = "number"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("samples", 2), ("rows", 1), ("max_tokens", 1), ("top_k", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        if self.match not in ("number", "text"):
            raise UsageError(f"match: must be number or text, got {self.match!r}")

    @property
    def chain(self) -> Chain:
        """The stages that texts are drawn with."""
        return Chain((TopK(k=self.top_k), Temperature(t=self.temperature)))


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """The texts of one question.

    Attributes
    ----------
    prompt : tuple of int
    texts : tuple of tuples of int
        Generated tokens; the end token is the last one of a text that ended by itself.
    right : tuple of bool
    logprobs : tuple of float
        Mean log-probability of each text under the model itself, in nats per token.
    answers : tuple of str
        What each text says, as far as answers are compared; empty where it says none.
    """

    prompt: tuple[int, ...]
    texts: tuple[tuple[int, ...], ...]
    right: tuple[bool, ...]
    logprobs: tuple[float, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _AllTexts:
    """Sampling several texts at once, as best-of-n does, but all of them are told at the end."""

    inner: BestOfN = field(default_factory=BestOfN)

    @property
    def requires(self) -> Mapping[str, Capability]:
        return self.inner.requires

    @property
    def max_rows(self) -> int:
        return self.inner.max_rows

    def init(self, request: Request, rng: Rng) -> tuple[Any, Step]:
        return self.inner.init(request, rng)

    def step(self, state: Any, out: Mapping[str, Output], rng: Rng) -> tuple[Any, Step]:
        state, step = self.inner.step(state, out, rng)
        if step.finish is None:
            return state, step
        texts = [[token.id for token in c.tokens] for c in state.candidates]
        scores = [c.score("mean_logprob") for c in state.candidates]
        return state, Step(finish=step.finish, note={"texts": texts, "scores": scores})


def sample_texts(
    sessions: Sessions,
    prompt: Prompt,
    settings: RolloutSettings,
    *,
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> tuple[list[int], list[list[int]], list[float]] | None:
    """Return prompt ids, the sampled texts and their mean log-probabilities; None if cancelled.

    Text ``i`` draws as row ``i``, however many are sampled side by side.
    """
    model = sessions.target
    ids = encode_prompt(model.tokenizer, prompt)
    texts: list[list[int]] = []
    scores: list[float] = []
    while len(texts) < settings.samples:
        count = min(settings.rows, settings.samples - len(texts))
        strategy = _AllTexts(inner=BestOfN(n=count, chain=settings.chain))
        open_sessions = sessions.prepare(strategy, name="train value")
        room = open_sessions["target"].context
        if len(ids) + settings.max_tokens > room:
            raise ContextOverflow(
                f"question: {len(ids)} tokens and {settings.max_tokens} new ones do not fit into a "
                f"context of {room}; shorten it or raise --ctx-size"
            )
        request = Request(
            prompt=ids,
            models=sessions.models,
            eos_ids=model.tokenizer.eos_ids,
            max_tokens=settings.max_tokens,
            context=room,
            row=len(texts),
        )
        for event in decode(strategy, open_sessions, request, Rng(seed), cancelled=cancelled):
            if isinstance(event, Note) and "texts" in event.values:
                texts += event.values["texts"]
                scores += event.values["scores"]
            elif isinstance(event, Finished) and event.reason == "cancelled":
                return None
    return ids.tolist(), texts, scores


def said(tokenizer: Tokenizer, text: Sequence[int], match: str) -> str:
    """Return the answer that a text gives, as answers are compared; empty if it gives none."""
    ids = [i for i in text if i not in tokenizer.eos_ids]
    return comparable(b"".join(map(tokenizer.token_bytes, ids)).decode(errors="replace"), match)


def comparable(text: str, match: str) -> str:
    """Return a text in the form in which answers are compared."""
    return text.strip() if match == "text" else last_number(text) or ""


def roll_out(
    folder: Path,
    questions: Sequence[Question],
    model: Model,
    settings: RolloutSettings,
    *,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[], Any] = lambda: None,
) -> int:
    """Sample texts for every question into ``folder``; goes on where an earlier call stopped.

    Parameters
    ----------
    folder : Path
        Afterwards it holds ``job.json`` and ``rollouts.jsonl``.
    questions : sequence of Question
        A question's random numbers hang on its place here.
    model : Model
        The generator; values will be those of its sampling with these settings.
    settings : RolloutSettings
    cancelled : callable
        Polled between calls to the model.
    progress : callable
        Called after every question, those that were there already included.

    Returns
    -------
    int
        How many questions are done.

    Raises
    ------
    UsageError
        The folder holds texts of another model, other questions or settings.
    """
    check_job(folder, model, settings)
    path = folder / "rollouts.jsonl"
    done = _whole_lines(path)
    for at, (held, question) in enumerate(zip(read_rollouts(folder), questions)):
        if list(held.prompt) != encode_prompt(model.tokenizer, question.prompt).tolist():
            raise UsageError(
                f"{path}:{at + 1}: texts of another question than the data's; use another folder"
            )
        progress()
    with Sessions(model) as sessions, path.open("a", encoding="utf-8") as log:
        for number in range(done, len(questions)):
            question = questions[number]
            found = sample_texts(
                sessions, question.prompt, settings, seed=settings.seed + number,
                cancelled=cancelled,
            )  # fmt: skip
            if found is None:
                return number
            ids, texts, scores = found
            answers = [said(model.tokenizer, text, settings.match) for text in texts]
            wanted = comparable(question.answer, settings.match)
            line = {
                "prompt": ids,
                "texts": texts,
                "right": [answer == wanted for answer in answers],
                "logprobs": [round(score, 6) for score in scores],
                "answers": answers,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            progress()
    return len(questions)


def read_rollouts(folder: Path) -> Iterator[Rollout]:
    """Yield what :func:`roll_out` wrote, in the order of the questions.

    Raises
    ------
    InvalidInput
        A line is damaged.
    """
    path = folder / "rollouts.jsonl"
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                held = json.loads(line)
                found = Rollout(
                    prompt=tuple(held["prompt"]),
                    texts=tuple(map(tuple, held["texts"])),
                    right=tuple(map(bool, held["right"])),
                    logprobs=tuple(held["logprobs"]),
                    answers=tuple(held["answers"]),
                )
                if len({len(found.texts), len(found.right), len(found.logprobs)}) != 1:
                    raise ValueError("its lists differ in length")
            except (ValueError, KeyError, TypeError) as exc:
                raise InvalidInput(
                    f"{path}:{number}: damaged ({exc}); delete the line and those after it"
                ) from None
            yield found


def _whole_lines(path: Path) -> int:
    """Return the number of lines, without a last one that a stopped run left half written."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with whole_file(path) as file:
            file.write(whole)
    return whole.count(b"\n")


def check_job(folder: Path, model: Model, settings: RolloutSettings) -> None:
    """Note in ``folder`` how its texts are made, or raise UsageError if they were otherwise."""
    job = {"model": model.info.fingerprint, **asdict(settings)}
    job.pop("rows")  # changes the time it takes, not what is drawn
    hold_job(folder, job)
