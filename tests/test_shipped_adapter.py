"""The adapter that comes with steersman: whole, licensed, and able to rank on every engine."""

import json

import pytest

from steersman.core import load, rerank
from steersman.core.adapters import adapter_names, find_adapter, rerank_options

NAME = "first-smollm2"
QUESTIONS = {
    "what do fleas eat": "Adult fleas live on the blood of their hosts.",
    "who wrote the play Hamlet": "Hamlet is a tragedy by William Shakespeare, written about 1600.",
    "what is the capital of Norway": "Oslo, the seat of government, is the capital of Norway.",
}
OTHERS = [
    "Income tax is paid in four parts, the last one in December.",
    "The engine has six cylinders and a turbocharger.",
    "Bake the bread for forty minutes until the crust is brown.",
]


def test_it_is_found_small_and_licensed(monkeypatch, tmp_path):
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path))
    assert NAME in adapter_names()
    folder = find_adapter(NAME)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000
    note = json.loads((folder / "steersman.json").read_text())
    assert note["licence"] and all(source["licence"] for source in note["data"])
    assert all(source["licence"] in (folder / "README.md").read_text() for source in note["data"])
    options = rerank_options(NAME)
    assert options["window"] == 4 and options["first_stage_weight"] == 1
    assert options["prompt"].answer.startswith("Answer:")


@pytest.mark.weights
@pytest.mark.parametrize("backend", ["llamacpp", "torch", "mlx"])
def test_it_ranks_by_content_where_the_plain_model_ranks_by_place(backend, request):
    """Chance puts 8 of 12 answers first once in 360 times; the model as it is gets 3."""
    request.getfixturevalue(f"{backend}_model")  # skips where the engine or the model is missing
    options = rerank_options(NAME) | {"first_stage_weight": 0.0}
    found = []
    with load("smollm2", backend=backend, adapter=NAME) as model:
        for question, answer in QUESTIONS.items():
            for place in range(4):
                passages = [*OTHERS[:place], answer, *OTHERS[place:]]
                found.append(rerank(model, question, passages, **options).indices.index(place))
    assert found.count(0) >= 8 and max(found) <= 2, found
