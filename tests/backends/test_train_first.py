"""Training with the FIRST objective: loss, order of the data, resume, adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from steersman.backends.files.tokenizer import open_tokenizer  # noqa: E402
from steersman.backends.torch.train_first import (  # noqa: E402
    FirstTraining,
    batches,
    first_loss,
    learning_rate,
    open_trainable,
    save_merged,
    train_first,
)
from steersman.core.errors import InvalidInput, MissingFile, UsageError  # noqa: E402
from steersman.core.objectives import ranknet  # noqa: E402
from steersman.core.reranking.encoding import PromptEncoder  # noqa: E402
from steersman.core.reranking.examples import (  # noqa: E402
    IGNORE,
    RankingExample,
    encode_example,
    read_examples,
)
from steersman.core.reranking.prompt import Prompt  # noqa: E402

from .tiny_torch import write_tiny  # noqa: E402

FULL = FirstTraining(
    lora_rank=0, steps=6, batch=2, accumulation=2, warmup=2, learning_rate=2e-3, save_every=2
)
SHORT = Prompt(system="", opening="{query}", passage="[{letter}] {text}", closing="{query}:")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> PromptEncoder:
    return PromptEncoder(open_tokenizer(folder), SHORT)


def examples(encoder: PromptEncoder, count: int = 6) -> list[Any]:
    """The passage with the largest number is best."""
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        numbers = generator.permutation(9)[:4] + 1
        example = RankingExample(
            query="largest",
            passages=tuple(f"number {n}" for n in numbers),
            ranking=tuple(np.argsort(-numbers).tolist()),
        )
        made.append(encode_example(encoder, example, max_words=10, max_tokens=256))
    return made


def test_an_encoded_example(encoder: PromptEncoder) -> None:
    example = RankingExample(query="q", passages=("one", "two", "three"), ranking=(2, 0, 1))
    found = encode_example(encoder, example, max_words=5, max_tokens=200)
    tokenizer = encoder.tokenizer
    text = b"".join(map(tokenizer.token_bytes, found.ids[: found.place + 1])).decode()
    assert text.endswith("q:\n[")
    target = [i for i in found.labels if i != IGNORE]
    assert target[-1] in tokenizer.eos_ids
    assert b"".join(map(tokenizer.token_bytes, target[:-1])) == b"C] > [A] > [B]"
    assert found.ids[found.place + 1] == found.letters[2]
    assert found.ranks == (2, 3, 1)
    shorter = encode_example(encoder, example, max_words=5, max_tokens=len(found.ids) - 2)
    assert len(shorter.ids) < len(found.ids)
    with pytest.raises(InvalidInput, match="without their text"):
        encode_example(encoder, example, max_words=5, max_tokens=20)


def test_passages_of_equal_relevance_are_not_compared(
    encoder: PromptEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "windows.jsonl"
    row = {"query": "q", "passages": ["a", "b", "c"], "relevance": [0, 2, 0]}
    path.write_text(json.dumps(row) + "\n")
    (example,) = read_examples(path)
    found = encode_example(encoder, example, max_words=5, max_tokens=200)
    assert found.ranks == (2, 1, 2)
    scores = torch.tensor([3.0, 1.0, -1.0])
    pairs = [torch.nn.functional.softplus(scores[i] - scores[1]) / 3 for i in (0, 2)]
    assert float(ranknet(scores, torch.tensor(found.ranks))) == pytest.approx(float(sum(pairs)) / 3)


def test_the_objective_is_its_formula(folder: Path, encoder: PromptEncoder) -> None:
    model = open_trainable(folder, FULL)
    batch = examples(encoder, 2)
    total, lm, ranking = first_loss(model.eval(), batch, FULL)
    expected_lm, tokens, expected_rank = 0.0, 0, 0.0
    for example in batch:
        logits = model(torch.tensor([example.ids])).logits[0]
        labels = torch.tensor(example.labels)
        expected_lm += float(
            torch.nn.functional.cross_entropy(
                logits[:-1], labels[1:], ignore_index=IGNORE, reduction="sum"
            )
        )
        tokens += int((labels[1:] != IGNORE).sum())
        scores = logits[example.place, list(example.letters)]
        expected_rank += float(ranknet(scores, torch.tensor(example.ranks))) / len(batch)
    assert lm == pytest.approx(expected_lm / tokens, rel=1e-5)
    assert ranking == pytest.approx(expected_rank, rel=1e-4)
    assert float(total.detach()) == pytest.approx(lm + 10 * ranking, rel=1e-5)


def test_every_example_comes_once_per_round() -> None:
    seen = [i for update in range(3) for part in batches(6, FULL, update=update) for i in part]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert seen[:6] != seen[6:]
    rates = [learning_rate(FULL, i) for i in range(7)]
    assert rates[:3] == [1e-3, 2e-3, 2e-3]
    assert rates[6] == pytest.approx(0)


def test_a_stopped_training_goes_on_to_the_same_losses(
    folder: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    data = examples(encoder)
    noisy = FirstTraining(**{**vars(FULL), "neftune": 5.0})
    whole = train_first(open_trainable(folder, noisy), data, noisy, tmp_path / "a")
    assert [r.step for r in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[-1].loss < whole[0].loss

    class Killed(Exception):
        pass

    def die(report: Any) -> None:
        if report.step == 5:
            raise Killed

    with pytest.raises(Killed):  # between two checkpoints
        train_first(open_trainable(folder, noisy), data, noisy, tmp_path / "b", report=die)
    again = train_first(open_trainable(folder, noisy), data, noisy, tmp_path / "b")
    assert [r.loss for r in again] == [r.loss for r in whole]
    lines = (tmp_path / "b" / "losses.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UsageError, match="another learning_rate"):
        other = FirstTraining(**{**vars(noisy), "learning_rate": 1e-3})
        train_first(open_trainable(folder, other), data, other, tmp_path / "b")


def test_adapters_train_little_and_merge(
    folder: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    from steersman.core import load

    settings = FirstTraining(
        lora_rank=4, steps=3, accumulation=2, warmup=0, learning_rate=1e-2, checkpointing=True
    )
    model = open_trainable(folder, settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained < 0.2 * sum(p.numel() for p in model.parameters())
    data = examples(encoder)
    train_first(model, data, settings, tmp_path / "lora")
    ids = torch.tensor([data[0].ids])
    with torch.no_grad():
        expected = model(ids).logits[0, -1].numpy()
    save_merged(model, folder, tmp_path / "merged")
    from steersman.core.model import Forward

    with load(str(tmp_path / "merged"), backend="torch") as merged, merged.session() as session:
        found = session.forward(Forward(keep=0, tokens=ids.numpy())).logits[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_reading_examples(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    rows = [
        {"query": "q", "passages": ["a", "b"], "ranking": [1, 0]},
        {"query": "q", "passages": ["a", "b", "c"], "relevance": [0, 2, 2]},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [e.ranking for e in read_examples(path)] == [(1, 0), (1, 2, 0)]
    for bad, said in (
        ({**rows[0], "ranking": [1, 1]}, "each of 0..1 once"),
        ({**rows[0], "passages": ["a"]}, "expected 2 to 26"),
        ({**rows[0], "query": " "}, "query: expected"),
        ({**rows[1], "relevance": [1]}, "one number per passage"),
        ({"query": "q", "passages": ["a", "b"]}, "either 'ranking' or 'relevance'"),
        ([1], "JSON object"),
    ):
        path.write_text("\n" + json.dumps(bad))
        with pytest.raises(InvalidInput, match=rf"x.jsonl:2: .*{said}"):
            list(read_examples(path))
    with pytest.raises(MissingFile):
        list(read_examples(tmp_path / "none"))
