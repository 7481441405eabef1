"""Prompts put together from parts have exactly the ids of their whole text."""

import random
import threading

import pytest
from rerank_toys import JudgeModel, merging_tokenizer
from toys import CHATML, ToyTokenizer, byte_tokenizer

from steersman.core.reranking import Prompt, rerank
from steersman.core.reranking.encoding import PromptEncoder
from steersman.core.reranking.pieces import Kept
from steersman.core.reranking.prompt import sanitise, shorten

ALPHABET = [
    *" \n\t[]()AB abc.,;:'\"-—é語🙂\u200b\u0301\ufeff<|>0123456789{}%\\/",
    *("<|im_end|>", "<|im_start|>assistant\n", "  ", "[A]", "[ B ]", "\r\n", "'s", "'ll"),
    *("Title: Content: ", "Title: ", "...", "word", "Über", "\u00a0", "\u3000"),
]  # fmt: skip


def windows(count: int, seed: int = 0):
    draw = random.Random(seed)
    for _ in range(count):
        texts = ["".join(draw.choices(ALPHABET, k=draw.randint(0, 25))) for _ in range(5)]
        query = "".join(draw.choices(ALPHABET, k=draw.randint(1, 20)))
        yield query, texts[: draw.randint(1, 5)], draw.choice([0, 1, 3, 300])


def check(encoder: PromptEncoder, count: int) -> int:
    """Compare many windows, and return how many were put together from parts."""
    joined = 0
    for query, texts, words in windows(count):
        whole = encoder.encode_whole(query, texts, max_words=words)
        assert encoder.encode(query, texts, max_words=words) == whole, (query, texts)
        joined += encoder._assembler.encode(query, texts, max_words=words) is not None
    return joined


@pytest.mark.weights
def test_real_tokenizers(engine_model):
    assert check(PromptEncoder(engine_model.tokenizer, Prompt()), 60) == 60


@pytest.mark.parametrize("make", [byte_tokenizer, merging_tokenizer])
def test_toy_tokenizers(make):
    assert check(PromptEncoder(make(), Prompt()), 100) == 100


def spanning(piece: bytes) -> ToyTokenizer:
    pieces = [bytes([i]) for i in range(256)] + [piece]
    controls = ("<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
    eos = ("<eos>", "<|im_end|>")
    return ToyTokenizer(pieces, controls=controls, eos=eos, chat_template=CHATML)


@pytest.mark.parametrize("piece", [b"\n[", b"] ", b".\n[B", b"\nS"])
def test_a_token_across_a_cut_means_whole_prompts(piece):
    encoder = PromptEncoder(spanning(piece), Prompt())
    assert not encoder._assembler.safe
    assert check(encoder, 30) == 0


@pytest.mark.parametrize("piece", [b".\n", b" w", b"[A]", b"A]"])
def test_tokens_within_a_part_do_no_harm(piece):
    assert check(PromptEncoder(spanning(piece), Prompt()), 30) == 30


def test_a_tokenizer_that_looks_at_its_neighbours_is_found_out():
    class Starting(ToyTokenizer):
        """Puts a token in front of every text, as some tokenizers do with a blank."""

        def encode(self, text, *, special=False):
            return [0, *super().encode(text, special=special)] if text else []

    base = byte_tokenizer()
    tokenizer = Starting(
        base.pieces, controls=base.controls, eos=("<eos>",), chat_template=base.chat_template
    )
    encoder = PromptEncoder(tokenizer, Prompt())
    check(encoder, 20)


def test_a_template_that_looks_into_the_text():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML.replace(
        "{{ message['content'] }}",
        "{% if 'Über' in message['content'] %}!{% endif %}{{ message['content'] | trim }}",
    )
    encoder = PromptEncoder(tokenizer, Prompt())
    assert 0 < check(encoder, 100) < 100


@pytest.mark.parametrize(
    "wording",
    [
        {"passage": "{text} [{letter}]"},
        {"passage": "[{letter}]\n{text}"},
        {"passage": "{letter}: {text}"},
        {"passage": "[{letter}] {text} {text}"},
        {"passage": "Doc [{letter}]: {text} -"},
        {"closing": "{query}"},
        {"closing": ""},
        {"closing": " Rank them."},
        {"opening": "", "system": ""},
        {"opening": "[A] qzvx 7319 wjkp\n"},
    ],
    ids=str,
)
def test_other_wordings(wording):
    check(PromptEncoder(byte_tokenizer(), Prompt(**wording)), 30)


def test_without_a_chat_template():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    assert check(PromptEncoder(tokenizer, Prompt()), 30) == 30


def test_a_passage_is_tokenised_once():
    model = JudgeModel()
    encode, seen = model.tokenizer.encode, []
    model.tokenizer.encode = lambda text, **more: (seen.append(text), encode(text, **more))[1]
    texts = [f"unlike {i} worth {i}" for i in range(30)]
    rerank(model, "q", texts, window=8, stride=2)
    for text in texts:
        assert sum(text + "\n" in call for call in seen) == 1


def test_kept_values_are_bounded_and_shared_by_threads():
    kept: Kept[tuple[int, ...]] = Kept(100, len)
    threads = [
        threading.Thread(target=lambda: [kept.get(i % 37, lambda k: (k,) * 10) for i in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(map(len, kept.values())) <= 100
    assert all(value == (key,) * 10 for key, value in kept.items())
    assert kept.get("long", lambda k: (0,) * 500) and list(kept) == ["long"]


def test_a_huge_passage_is_shortened_before_anything_else():
    text = "word " * 100 + "x" * 10_000_000
    assert shorten(text, 300).split()[:100] == ["word"] * 100
    assert len(shorten(text, 300)) < 30_000
    assert shorten("short  text", 300) == "short  text"
    assert len(shorten("語" * 10_000_000, 300)) < 30_000
    for size in (10, 1000, 50_000):
        words = " ".join(f"w{i}" for i in range(size))
        assert sanitise(shorten(words, 300)).split()[:300] == words.split()[:300]
    ranking = rerank(JudgeModel(), "q", ["worth 1 " + "word " * 2_000_000, "worth 2"])
    assert ranking.indices == (1, 0)
