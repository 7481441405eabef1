"""Every built-in profile on SmolLM2 and each engine, against transformers and a fresh start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steersman.core import generate, open_session
from steersman.core.decode.sessions import Sessions
from steersman.core.model import Model
from steersman.core.profile import builtin_folder, load_profile

pytestmark = pytest.mark.weights

PROFILES = sorted(path.stem for path in builtin_folder().glob("*.yaml"))
BEGUN = "Once upon a time"
FACT = "The capital of France is"
QUESTION = "What is the capital of France? Answer in one word."


def ask(question: str, *more: str) -> list[dict[str, str]]:
    """Return a chat: user and assistant in turn."""
    roles = ("user", "assistant")
    texts = (question, *more)
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


# -- every profile, every engine -------------------------------------------------------------------


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_runs_and_repeats_itself(profile: str, engine_model: Model) -> None:
    roles = dict.fromkeys(load_profile(profile).strategy.requires, engine_model)
    options: dict[str, Any] = {"seed": 5, "max_tokens": 3, "logprobs": 0, "models": roles}
    first, again = (generate(engine_model, BEGUN, profile=profile, **options) for _ in range(2))
    assert first.token_ids == again.token_ids
    assert 1 <= len(first.token_ids) <= 3
    assert [t.raw_logprob for t in first.tokens] == [t.raw_logprob for t in again.tokens]
    assert all(t.raw_logprob is not None and t.raw_logprob <= 0 for t in first.tokens)


def test_another_seed_gives_another_text(engine_model: Model) -> None:
    texts = {
        generate(engine_model, BEGUN, profile="creative", seed=seed, max_tokens=4).token_ids
        for seed in range(3)
    }
    assert len(texts) > 1


def test_engines_say_the_same_where_margins_are_clear(
    llamacpp_model: Model, torch_model: Model, mlx_model: Model
) -> None:
    prompt = "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,"
    texts = []
    for model in (llamacpp_model, torch_model, mlx_model):
        found = generate(model, prompt, profile="greedy", max_tokens=8, logprobs=2)
        # Best against second best: far more than the engines differ by.
        assert min(t.top[0].raw_logprob - t.top[1].raw_logprob for t in found.tokens) > 0.5
        texts.append(found.text)
    assert texts == [" 12, 13,"] * 3


# -- one cache for a whole conversation ------------------------------------------------------------


@pytest.fixture
def kept(engine_model: Model) -> Iterator[Sessions]:
    with open_session(engine_model) as sessions:
        yield sessions


def test_a_kept_cache_changes_no_answer(engine_model: Model, kept: Sessions) -> None:
    """All strategies in turn on one cache: each answers as if it had started afresh."""
    prompt = FACT
    for profile in ("beam", "balanced", "contrastive", "dola", "best-of-n", "contrastive"):
        options: dict[str, Any] = {"profile": profile, "seed": 2, "max_tokens": 2}
        here = generate(engine_model, prompt, session=kept, **options)
        afresh = generate(engine_model, prompt, **options)
        assert here.text == afresh.text, profile
        prompt += here.text
    # After all of them the cache is as good as a fresh prefill: same logits for the next token.
    options = {"profile": "greedy", "max_tokens": 1, "logprobs": 5}
    here = generate(engine_model, prompt, session=kept, **options)
    afresh = generate(engine_model, prompt, **options)
    assert here.timings.cached_tokens >= len(afresh.prompt_token_ids) - 5
    assert afresh.timings.cached_tokens == 0
    tolerance = 0 if engine_model.info.batch_invariant else 1e-3
    expected = {a.id: a.raw_logprob for a in afresh.tokens[0].top}
    got = {a.id: a.raw_logprob for a in here.tokens[0].top}
    assert got == pytest.approx(expected, abs=tolerance)


def test_a_chat_goes_on_after_best_of_n(engine_model: Model, kept: Sessions) -> None:
    options: dict[str, Any] = {"profile": "best-of-n", "seed": 4, "max_tokens": 4}
    chat = ask("Name a colour.")
    first = generate(engine_model, chat, session=kept, **options)
    chat = ask("Name a colour.", first.text, "Another one.")
    second = generate(engine_model, chat, session=kept, **options)
    assert second.token_ids == generate(engine_model, chat, **options).token_ids
    # What the first turn computed of its prompt is not computed again.
    assert second.timings.cached_tokens >= len(first.prompt_token_ids)


# -- transformers' own generate ------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf(torch_model: Model) -> Any:
    """The same weights in transformers itself."""
    transformers = pytest.importorskip("transformers")
    from steersman.backends.files.convert import as_hf_folder
    from steersman.core.locate import locate

    folder: Path = as_hf_folder(locate("smollm2", offline=True))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()


def theirs(hf: Any, ours: Model, prompt: str | list[dict[str, str]], **options: Any) -> list[int]:
    """Return transformers' new tokens, the end token included."""
    import torch

    from steersman.core.api import encode_prompt

    ids = torch.from_numpy(encode_prompt(ours.tokenizer, prompt))[None]
    with torch.no_grad():
        out = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            eos_token_id=sorted(ours.tokenizer.eos_ids),
            pad_token_id=2,
            **options,
        )
    return out[0, ids.shape[1] :].tolist()


CASES = [(BEGUN, 1.0, 8), (ask(QUESTION), 1.0, 14), (ask("Say yes or no."), 0.0, 12)]


@pytest.mark.parametrize(("prompt", "penalty", "limit"), CASES, ids=["text", "chat", "short"])
def test_beam_search_equals_transformers(
    prompt: Any, penalty: float, limit: int, torch_model: Model, hf: Any
) -> None:
    expected = theirs(
        hf,
        torch_model,
        prompt,
        num_beams=4,
        length_penalty=penalty,
        early_stopping=False,
        max_new_tokens=limit,
    )
    found = generate(
        torch_model,
        prompt,
        profile="beam",
        max_tokens=limit,
        overrides={"beam.length_penalty": penalty},
    )
    ended = found.finish_reason == "eos"
    assert ended == (expected[-1] in torch_model.tokenizer.eos_ids) == (prompt != BEGUN)
    assert list(found.token_ids) == (expected[:-1] if ended else expected)


def test_greedy_equals_transformers(torch_model: Model, hf: Any) -> None:
    for prompt, _, limit in CASES[:2]:
        expected = theirs(hf, torch_model, prompt, max_new_tokens=limit)
        found = generate(torch_model, prompt, profile="greedy", max_tokens=limit)
        ended = found.finish_reason == "eos"
        assert ended == (expected[-1] in torch_model.tokenizer.eos_ids)
        assert list(found.token_ids) == (expected[:-1] if ended else expected)
