"""Existing logits processors run on every engine's arrays; logit bias finds its tokens."""

from __future__ import annotations

import math

import numpy as np
import pytest
from toys import small_tokenizer

from steersman.core.array import to_numpy
from steersman.core.errors import BackendError, UsageError
from steersman.core.logits import Chain, LogitBias, Processor, build_stage

X = np.array([[1.0, 2.0, 3.0, 4.0], [4.0, 3.0, 2.0, 1.0]], np.float32)
HISTORY = [np.array([0, 3]), np.array([2])]
WANT = X.copy()
WANT[0, [0, 3]] -= 10
WANT[1, 2] -= 10


def run(lib, stage):
    x = lib(X)
    got = Chain((stage,), fused=False).apply(x, history=HISTORY, uniforms=lambda *_: 0.0)
    assert type(got) is type(x)
    assert got.dtype == x.dtype
    np.testing.assert_array_equal(to_numpy(x), X)
    return to_numpy(got)


def test_transformers_processor(lib):
    torch = pytest.importorskip("torch")

    def penalise(input_ids, scores):
        assert isinstance(input_ids, torch.Tensor)
        assert input_ids.dtype == torch.int64
        assert input_ids.ndim == 2
        assert tuple(scores.shape) == (1, 4)
        scores.scatter_add_(1, input_ids, torch.full(input_ids.shape, -10.0))
        return scores

    np.testing.assert_array_equal(run(lib, Processor(function=penalise)), WANT)


def test_mlx_processor(lib):
    mx = pytest.importorskip("mlx.core")

    def penalise(tokens, logits):
        assert isinstance(tokens, mx.array)
        assert tokens.ndim == 1
        assert logits.shape == (1, 4)
        logits[:, tokens] = logits[:, tokens] - 10
        return logits

    np.testing.assert_array_equal(run(lib, Processor(function=penalise, convention="mlx")), WANT)


def test_llamacpp_processor(lib):
    def penalise(input_ids, scores):
        assert isinstance(scores, np.ndarray)
        assert scores.shape == (4,)
        assert scores.dtype == np.float32
        scores[input_ids] -= 10
        return scores

    stage = Processor(function=penalise, convention="llamacpp")
    np.testing.assert_array_equal(run(lib, stage), WANT)


def test_real_transformers_processor(lib):
    torch = pytest.importorskip("torch")
    processors = pytest.importorskip("transformers.generation.logits_process")
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty=1.3)
    want = [
        theirs(torch.tensor(tokens[None]), torch.from_numpy(X[row : row + 1].copy())).numpy()[0]
        for row, tokens in enumerate(HISTORY)
    ]
    np.testing.assert_allclose(run(lib, Processor(function=theirs)), want, rtol=1e-6)


@pytest.mark.parametrize("result", [None, np.zeros(3, np.float32), 7])
def test_a_wrong_answer_is_refused(result):
    stage = Processor(function=lambda ids, logits: result, convention="llamacpp")
    with pytest.raises(BackendError, match="returned shape"):
        Chain((stage,)).select(X, history=HISTORY, uniforms=lambda *_: 0.0)


def test_processors_are_checked():
    with pytest.raises(UsageError, match=r"^processor: function must be callable, got 'os.system'"):
        build_stage("processor", {"function": "os.system"})
    with pytest.raises(UsageError, match="convention must be one of transformers, mlx, llamacpp"):
        Processor(function=print, convention="vllm")


def test_logit_bias_looks_texts_up():
    tokenizer = small_tokenizer()
    text = next(
        piece.decode() for piece in tokenizer.pieces if len(tokenizer.encode(piece.decode())) == 1
    )
    token = tokenizer.encode(text)[0]
    stage = build_stage("logit_bias", {"bias": {text: -math.inf, token + 1: 2}})
    assert stage.needs_tokenizer
    with pytest.raises(UsageError, match="call bind"):
        stage(X, None)
    bound = stage.bind(tokenizer)
    assert bound.bias == {token: -math.inf, token + 1: 2.0}
    same = build_stage("logit_bias", {"bias": {text: 1.0}}, tokenizer=tokenizer)
    assert same.bias == {token: 1.0}


def test_logit_bias_refuses_what_is_no_single_token():
    tokenizer = small_tokenizer()
    text = tokenizer.pieces[0].decode() * 9
    with pytest.raises(UsageError, match=r"^logit_bias: .* is \d+ tokens of this model"):
        LogitBias(bias={text: 1.0}).bind(tokenizer)
    with pytest.raises(UsageError, match="outside the vocabulary"):
        LogitBias(bias={10**6: 1.0}).bind(tokenizer)
