"""The same representations from every engine, batched or alone, on the real model."""

import numpy as np
import pytest

from steersman.core import build_index, search
from steersman.core.retrieval import PromptReps, Representer, WordPrompt

pytestmark = pytest.mark.weights
TEXTS = ["Fleas feed on the blood of animals.", "Taxes."]
SETTINGS = PromptReps(prompt=WordPrompt(system=""), max_tokens=16)


def test_batched_equals_alone(engine_model):
    with Representer(engine_model, SETTINGS, rows=2) as representer:
        both = representer.represent(TEXTS)
    with Representer(engine_model, SETTINGS, rows=1) as representer:
        alone = representer.represent(TEXTS[:1])
    for one, other in zip(both, alone):
        np.testing.assert_allclose(one.dense, other.dense, atol=1e-4)
        assert one.sparse.tokens.tolist() == other.sparse.tokens.tolist()
        assert np.abs(one.sparse.impacts - other.sparse.impacts).max() <= 1
        assert len(one.sparse.tokens) >= 3


@pytest.mark.parametrize("backend", ["mlx", "llamacpp"])
def test_engines_agree_up_to_rounding(request, torch_model, backend):
    """Engines differ by rounding; llama.cpp also quantises activations to 8 bits."""
    found = []
    for model in (torch_model, request.getfixturevalue(f"{backend}_model")):
        with Representer(model, SETTINGS) as representer:
            found.append(representer.represent(TEXTS[:1]))
    for one, other in zip(*found):
        assert float(one.dense @ other.dense) > (0.9999 if backend == "mlx" else 0.98)


def test_an_index_is_built_and_searched(engine_model, tmp_path):
    pytest.importorskip("faiss")
    index = build_index(engine_model, dict(enumerate(TEXTS)), tmp_path / "i", settings=SETTINGS)
    assert search(engine_model, index, "animals")[0].docid == "0"
