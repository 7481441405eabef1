"""The strict GGUF reader: right on sound files, one clear error on all others."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import gguf_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steersman.backends.files import gguf_cursor as reader
from steersman.backends.files.gguf import GGML_TYPES, raw_tensor, read_header, read_tensor
from steersman.core.errors import InvalidInput, MissingFile, SteersmanError

gguf = pytest.importorskip("gguf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf_files.write_tokenizer_only(tmp_path_factory.mktemp("gguf") / "sound.gguf")


def _header(
    keys: bytes = b"", *, tensors: bytes = b"", n_keys: int = 0, n_tensors: int = 0
) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_keys) + keys + tensors


def _string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _tensor(name: bytes, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    head = _string(name) + struct.pack("<I", len(dims)) + struct.pack(f"<{len(dims)}Q", *dims)
    return head + struct.pack("<IQ", kind, offset)


def test_reads_what_the_package_wrote(sound: Path) -> None:
    header = read_header(sound)
    assert header.version == 3 and header.architecture == "llama"
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert list(tokens[:3]) == gguf_files.CONTROL and tokens[-1] == "Ġhello"
    np.testing.assert_array_equal(header.metadata["test.numbers"], np.float32([1.5, 2.5]))
    assert header.metadata["test.flag"] is True
    np.testing.assert_array_equal(
        read_tensor(header, "a.weight"), np.arange(12, dtype=np.float32).reshape(3, 4)
    )
    with pytest.raises(InvalidInput, match=r"tensor 'b' is missing"):
        read_tensor(header, "b")
    with pytest.raises(InvalidInput, match=r"test\.flag: expected int, found bool"):
        header.get("test.flag", int)


def test_block_sizes_equal_the_packages() -> None:
    theirs = {
        int(kind): (kind.name, *size)
        for kind, size in gguf.GGML_QUANT_SIZES.items()
        if kind.name != "Q8_1"  # only for activations
    }
    ours = {kind: size for kind, size in GGML_TYPES.items() if kind in theirs}
    assert ours == {kind: theirs[kind] for kind in ours}
    assert len(ours) >= 25


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16", "F16"])
def test_dequantises_as_the_package_does(kind: str, tmp_path: Path) -> None:
    number = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).normal(size=(3000, 128)).astype(np.float32)
    packed = gguf.quants.quantize(values, number)
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_tensor("w", packed, raw_dtype=number)
    gguf_files._close(writer)
    header = read_header(tmp_path / "q.gguf")
    assert header.tensors["w"].shape == (3000, 128)
    assert header.tensors["w"].type_name == kind
    np.testing.assert_array_equal(
        read_tensor(header, "w"), gguf.quants.dequantize(packed, number).astype(np.float32)
    )
    assert raw_tensor(header, "w").tobytes() == packed.tobytes()


_KEY = _string(b"k")
CASES = {
    "empty": (b"", "only 0 bytes"),
    "not gguf": (b"PK\x03\x04" * 10, "not a GGUF file"),
    "zeros after the magic": (b"GGUF" + bytes(100), "version 0"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(40), "version 1;"),
    "big endian": (b"GGUF" + struct.pack(">I", 3) + bytes(40), "big-endian"),
    "too many keys": (_header(n_keys=1 << 60), "metadata keys"),
    "too many tensors": (_header(n_tensors=1 << 60), "tensors"),
    # 49 bytes that make other readers run for ever
    "array of 2^63": (
        _header(_KEY + struct.pack("<IIQ", 9, 4, 1 << 63), n_keys=1),
        "array of 9223372036854775808",
    ),
    "strings of 2^63": (
        _header(_KEY + struct.pack("<IIQ", 9, 8, 1 << 63), n_keys=1),
        "array of 9223372036854775808 strings",
    ),
    "string inside array": (
        _header(_KEY + struct.pack("<IIQQ", 9, 8, 1, 1 << 62), n_keys=1),
        "leaves the file",
    ),
    "long string": (_header(_KEY + struct.pack("<IQ", 8, 1 << 63), n_keys=1), "limit 16777216"),
    "long key": (_header(struct.pack("<Q", 1 << 62), n_keys=1), "metadata key of"),
    "nested arrays": (_header(_KEY + struct.pack("<IIQ", 9, 9, 1), n_keys=1), "nested arrays"),
    "unknown type": (_header(_KEY + struct.pack("<I", 77), n_keys=1), "unknown value type 77"),
    "bad boolean": (_header(_KEY + struct.pack("<IB", 7, 9), n_keys=1), "not a boolean"),
    "key that is not UTF-8": (_header(_string(b"\xff\xfe") + bytes(9), n_keys=1), "not UTF-8"),
    "key twice": (_header((_KEY + struct.pack("<II", 4, 1)) * 2, n_keys=2), "stands there twice"),
    "alignment": (
        _header(_string(b"general.alignment") + struct.pack("<II", 4, 3), n_keys=1),
        "not a power of two",
    ),
    "dimensions": (
        _header(tensors=_string(b"t") + struct.pack("<I", 1 << 31), n_tensors=1),
        "2147483648 dimensions",
    ),
    "sizes that overflow": (
        _header(tensors=_tensor(b"t", (1 << 62, 1 << 62), 0, 0), n_tensors=1),
        "truncated",
    ),
    "empty dimension": (_header(tensors=_tensor(b"t", (0, 4), 0, 0), n_tensors=1), "does not fit"),
    "part of a block": (_header(tensors=_tensor(b"t", (33,), 2, 0), n_tensors=1), "does not fit"),
    "unknown tensor type": (
        _header(tensors=_tensor(b"t", (4,), 5, 0), n_tensors=1),
        "unknown type 5",
    ),
    "offset beyond the file": (
        _header(tensors=_tensor(b"t", (4,), 0, 1 << 40), n_tensors=1),
        "truncated",
    ),
    "odd offset": (_header(tensors=_tensor(b"t", (4,), 0, 1), n_tensors=1), "not a multiple"),
    "tensor twice": (
        _header(tensors=_tensor(b"t", (4,), 0, 0) * 2, n_tensors=2) + bytes(64),
        "twice",
    ),
    "overlap": (
        _header(tensors=_tensor(b"t", (8,), 0, 0) + _tensor(b"u", (4,), 0, 0), n_tensors=2)
        + bytes(64),
        "overlap",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_refuses(case: str, tmp_path: Path) -> None:
    data, message = CASES[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(InvalidInput) as caught:
        read_header(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", [b"a\nb\x1b[2J", b"k" * 60_000])
def test_a_strange_key_is_spoken_of_in_one_short_line(key: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key.gguf"
    path.write_bytes(_header(_string(key) + struct.pack("<I", 99), n_keys=1))
    with pytest.raises(InvalidInput, match="not a usable GGUF file") as caught:
        read_header(path)
    said = str(caught.value)
    assert said.isprintable()
    assert len(said) < 700


def test_the_known_bomb_is_49_bytes() -> None:
    assert len(CASES["array of 2^63"][0]) == 49


def test_limits_hold_over_the_whole_header(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "MAX_STRINGS", 5)
    one = struct.pack("<IIQ", 9, 8, 3) + _string(b"") * 3
    path = tmp_path / "many.gguf"
    path.write_bytes(_header(_string(b"a") + one + _string(b"b") + one, n_keys=2))
    with pytest.raises(InvalidInput, match=r"b: array of 3 strings \(limit 2\)"):
        read_header(path)


def test_refuses_what_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFile):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(InvalidInput, match="not a regular file"):
        read_header(tmp_path)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InvalidInput, match="not a regular file"):
            read_header(tmp_path / "pipe")


@pytest.mark.parametrize("keep", [10, 30, 100, 1000, 3000, -20])
def test_refuses_a_truncated_file(sound: Path, keep: int, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(sound.read_bytes()[:keep])
    with pytest.raises(InvalidInput):
        read_header(tmp_path / "cut.gguf")


@settings(max_examples=150, deadline=None)
@given(
    places=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=6),
    wide=st.booleans(),
)
def test_damage_gives_a_header_or_a_clear_error(
    sound: Path, places: list[tuple[float, int]], wide: bool
) -> None:
    data = bytearray(sound.read_bytes())
    for where, value in places:
        at = int(where * (len(data) - 9))
        data[at : at + (8 if wide else 1)] = bytes([value]) * (8 if wide else 1)
    path = sound.parent / "damaged.gguf"
    path.write_bytes(data)
    try:
        header = read_header(path)
        for name in header.tensors:
            read_tensor(header, name)
    except SteersmanError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(tail=st.binary(max_size=400))
def test_noise_gives_a_header_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, tail: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + tail)
    try:
        read_header(path)
    except InvalidInput as error:
        assert "\n" not in str(error)


def test_reads_llama_cpps_vocabularies(data_dir: Path) -> None:
    found = sorted((data_dir / "llama_cpp_vocabs").glob("*.gguf"))
    assert found
    for path in found:
        header = read_header(path)
        assert len(header.metadata["tokenizer.ggml.tokens"]) > 30_000
