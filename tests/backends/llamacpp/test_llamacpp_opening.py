"""Opening models on llama.cpp, and their tokenizer.

The contract suite covers what all engines share; here is what is particular to this one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steersman.core.errors import (
    InvalidInput,
    MissingDependency,
    MissingFile,
    UsageError,
)
from steersman.core.model import Capability as C

pytest.importorskip("llama_cpp")
from steersman.backends.llamacpp import open_model, versions
from steersman.backends.llamacpp import threads as threads_module
from steersman.backends.llamacpp.probe import Facts

from .llamacpp_support import source

pytestmark = pytest.mark.weights


# -- opening ---------------------------------------------------------------------------------------


def test_info(llamacpp_model: Any) -> None:
    info = llamacpp_model.info
    assert (info.backend, info.architecture, info.dtype) == ("llamacpp", "llama", "Q4_1")
    assert (info.layers, info.width, info.heads, info.vocab_size) == (30, 576, 9, 49152)
    assert info.batch_invariant and info.trained_context == 8192
    assert llamacpp_model.capabilities == ~C.NONE
    assert info.threads == 1 and info.extra["setting"] == "reproducible"
    assert len(info.fingerprint) == 64
    assert "llama-cpp-python" in versions()


def test_importing_the_backend_imports_no_engine() -> None:
    code = (
        "import sys, steersman.backends.llamacpp as b; b.versions(); "
        "sys.exit('llama_cpp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_refused_sources(tmp_path: Path, llamacpp_model: Any) -> None:
    with pytest.raises(MissingFile):
        open_model(source(tmp_path / "none.gguf"))
    (tmp_path / "garbage.gguf").write_bytes(os.urandom(5000))
    for trusted in (True, False):
        with pytest.raises(InvalidInput) as caught:
            open_model(source(tmp_path / "garbage.gguf", trusted=trusted))
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="needs a GGUF file"):
        open_model(source(tmp_path, "hf"))
    good = source(Path(llamacpp_model.info.path))
    whole = good.path.read_bytes()
    (tmp_path / "short.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidInput):
        open_model(source(tmp_path / "short.gguf"))
    with pytest.raises(UsageError, match="did you mean 'setting'"):
        open_model(good, seting="fast")
    with pytest.raises(UsageError, match="setting"):
        open_model(good, setting="quick")
    with pytest.raises(UsageError, match="dtype"):
        open_model(good, dtype="float16")
    with pytest.raises(UsageError, match="device"):
        open_model(good, device="tpu")
    with pytest.raises(UsageError, match="trained for"):
        open_model(good, context=100_000)


def test_a_file_that_the_engine_rejects_is_one_line(tmp_path: Path, llamacpp_model: Any) -> None:
    raw = bytearray(Path(llamacpp_model.info.path).read_bytes())
    at = raw.index(b"general.architecture") + len("general.architecture") + 12
    assert raw[at : at + 5] == b"llama"
    raw[at : at + 5] = b"\x1b[31m"
    (tmp_path / "odd.gguf").write_bytes(raw)
    with pytest.raises(InvalidInput) as caught:
        open_model(source(tmp_path / "odd.gguf"))
    assert "llama.cpp cannot load this file" in str(caught.value)
    assert str(caught.value).isprintable()


def test_gpu_is_refused_without_one(monkeypatch: pytest.MonkeyPatch, llamacpp_model: Any) -> None:
    from steersman.backends.llamacpp import lib

    monkeypatch.setattr(lib.llama, "llama_supports_gpu_offload", lambda: False)
    with pytest.raises(MissingDependency):
        open_model(source(Path(llamacpp_model.info.path)), device="gpu")


def test_remembered_facts_are_checked() -> None:
    facts = Facts(batch_invariant=True, hidden=True, attentions=False, head=True, scale=1.5)
    assert Facts.from_json(facts.to_json()) == facts
    for damage in ({"scale": "1"}, {"hidden": 1}, {"scale": float("nan")}, {"more": True}):
        assert Facts.from_json(facts.to_json() | damage) is None
    assert Facts.from_json([1]) is None


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    meter = threads_module.LoadMeter()
    assert threads_module.choose_threads(3, meter)[0] == 3
    monkeypatch.setenv("STEERSMAN_THREADS", "5")
    assert threads_module.choose_threads(None, meter)[0] == 5
    monkeypatch.delenv("STEERSMAN_THREADS")
    monkeypatch.setattr(threads_module, "usable_cores", lambda: 8)
    for others, chosen in ((0.2, 8), (2.6, 5), (40.0, 1)):
        monkeypatch.setattr(meter, "others", lambda value=others, **_: value)
        assert threads_module.choose_threads(None, meter)[0] == chosen


# -- tokenizer -------------------------------------------------------------------------------------


def test_tokenizer(llamacpp_model: Any) -> None:
    tokenizer = llamacpp_model.tokenizer
    assert tokenizer.vocab_size == 49152
    assert (tokenizer.bos_id, tokenizer.add_bos) == (1, False)
    assert tokenizer.eos_ids == {0, 2, 4} and tokenizer.eos_ids <= tokenizer.special_ids
    assert len(tokenizer.special_ids) == 17
    assert "<|im_start|>" in tokenizer.chat_template
    for text in ("", "a\0b", "naïve 語 🙂 مرحبا नमस्ते", "\r\n\t ", "x" * 5000):
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))) == text.encode()
    assert all(tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size))


def test_control_tokens_only_when_asked_for(llamacpp_model: Any) -> None:
    tokenizer = llamacpp_model.tokenizer
    names = [tokenizer.token_name(i) for i in sorted(tokenizer.special_ids)]
    assert "<|im_start|>" in names
    plain = tokenizer.encode("".join(names))
    assert not tokenizer.special_ids & set(plain)
    assert tokenizer.encode("".join(names), special=True) == sorted(tokenizer.special_ids)


def test_text_and_ids_that_would_crash_the_engine(llamacpp_model: Any) -> None:
    tokenizer = llamacpp_model.tokenizer
    with pytest.raises(InvalidInput, match="surrogate"):
        tokenizer.encode("ab\ud800")
    for bad in (-1, 49152, 1 << 40):
        with pytest.raises(UsageError):
            tokenizer.token_bytes(bad)
