"""Building a router's training set: texts of the large model, seen by the small one, labelled."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..api import Prompt, generate
from ..array import to_numpy
from ..errors import InvalidInput, UsageError
from ..journal import hold_job
from ..model import IntArray, Model
from ..whole_file import whole_file
from .features import NEEDS, text_features
from .labels import Labels, answer_labels, judge_labels, mismatch_labels

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class CollectSettings:
    """How texts are written and labelled.

    Parameters
    ----------
    labels : {"mismatch", "answer", "judge"}
        "mismatch": every token that the small model would choose otherwise is divergent. "answer":
        those after which the large model no longer reaches its final answer. "judge": those whose
        sentence means something else, says a third model.
    max_tokens : int
        Of a text of the large model.
    continuation : int
        Most tokens of a continuation, for "answer" and "judge".
    checks : int
        Differing tokens per text that are tried or judged; the others are left out.
    top : int
        Largest logits of the small model that are kept.
    """

    labels: Literal["mismatch", "answer", "judge"] = "mismatch"
    max_tokens: int = 256
    continuation: int = 128
    checks: int = 12
    top: int = 100


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """One row per generated token of known label.

    Attributes
    ----------
    top_logits : float32 (N, top)
    hidden, embedding : float32 (N, D)
    labels : int64 (N,)
    texts : int64 (N,)
        Number of the text that a token belongs to.
    """

    top_logits: Floats
    hidden: Floats
    embedding: Floats
    labels: IntArray
    texts: IntArray


def collect(
    folder: Path,
    prompts: Sequence[Prompt],
    large: Model,
    small: Model,
    settings: CollectSettings,
    *,
    judge: Model | None = None,
    cancelled: Callable[[], bool] = lambda: False,
    progress: Callable[[], Any] = lambda: None,
) -> int:
    """Write and label a text per prompt into ``folder``; goes on where an earlier call stopped.

    Parameters
    ----------
    folder : Path
        Afterwards it holds ``job.json`` and one ``NNNNN.npz`` per text.
    prompts : sequence of str, messages or token ids
    large, small : Model
        ``small`` with hidden states and head.
    settings : CollectSettings
    judge : Model, optional
        For labels of that name.
    cancelled : callable
        Polled between texts.
    progress : callable
        Called after every text.

    Returns
    -------
    int
        How many texts are there.

    Raises
    ------
    UsageError
        No judge was given; or the folder holds texts of other models or settings.
    """
    if settings.labels == "judge" and judge is None:
        raise UsageError("--labels judge: name a chat model with --judge")
    small.require(NEEDS, who="train r2r", role="small")
    _check_job(folder, large, small, judge, settings)
    done = 0
    with small.session(needs=NEEDS) as session:
        for number, prompt in enumerate(prompts):
            path = folder / f"{number:05d}.npz"
            if not path.exists():
                if cancelled():
                    break
                arrays: dict[str, Any] = _text(prompt, large, small, session, judge, settings)
                with whole_file(path) as file:
                    np.savez(file, **arrays)
            done += 1
            progress()
    return done


def read_dataset(folder: Path, small: Model) -> Dataset:
    """Return what :func:`collect` wrote, without tokens of unknown label.

    Raises
    ------
    InvalidInput
        A file is damaged, or there is none.
    """
    parts: dict[str, list[Any]] = {k: [] for k in ("top_logits", "hidden", "labels", "choice")}
    texts = []
    for path in sorted(folder.glob("[0-9]*.npz")):
        try:
            with np.load(path, allow_pickle=False) as held:
                arrays = {name: held[name] for name in parts}
        except (OSError, ValueError, KeyError, EOFError) as exc:
            raise InvalidInput(f"{path}: damaged ({exc}); delete it and run again") from None
        known = arrays["labels"] >= 0
        for name, array in arrays.items():
            parts[name].append(array[known])
        texts.append(np.full(int(known.sum()), int(path.stem)))
    if not texts:
        raise InvalidInput(f"{folder}: holds no texts")
    joined = {name: np.concatenate(arrays) for name, arrays in parts.items()}
    return Dataset(
        top_logits=joined["top_logits"],
        hidden=joined["hidden"],
        embedding=np.asarray(to_numpy(small.embed(joined["choice"])), np.float32),
        labels=joined["labels"],
        texts=np.concatenate(texts),
    )


def _text(
    prompt: Prompt,
    large: Model,
    small: Model,
    session: Any,
    judge: Model | None,
    settings: CollectSettings,
) -> dict[str, npt.NDArray[Any]]:
    found = generate(large, prompt, profile="greedy", max_tokens=settings.max_tokens, truncate=True)
    ids, answer = list(found.prompt_token_ids), list(found.token_ids)
    if not answer:
        width = small.info.width
        return {
            "top_logits": np.zeros((0, settings.top), np.float32),
            "hidden": np.zeros((0, width), np.float32),
            "choice": np.zeros(0, np.int64),
            "labels": np.zeros(0, np.int64),
        }
    seen = text_features(small, session, ids, answer, top=settings.top)
    labels = _label(large, judge, ids, answer, seen.choice, settings)
    return {
        "top_logits": seen.top_logits,
        "hidden": seen.hidden,
        "choice": seen.choice,
        "labels": labels.divergent,
    }


def _label(
    large: Model,
    judge: Model | None,
    ids: Sequence[int],
    answer: Sequence[int],
    choice: IntArray,
    settings: CollectSettings,
) -> Labels:
    if settings.labels == "mismatch":
        return mismatch_labels(choice, answer)
    length, checks = settings.continuation, settings.checks
    if settings.labels == "answer":
        return answer_labels(large, ids, answer, choice, max_tokens=length, checks=checks)
    assert judge is not None
    return judge_labels(large, judge, ids, answer, choice, max_tokens=length, checks=checks)


def _check_job(
    folder: Path, large: Model, small: Model, judge: Model | None, settings: CollectSettings
) -> None:
    models: Mapping[str, Model | None] = {"large": large, "small": small, "judge": judge}
    job = {
        **{role: m.info.fingerprint for role, m in models.items() if m is not None},
        **asdict(settings),
    }
    hold_job(folder, job)
