"""Reading GGUF values one after the other, each length checked before anything is allocated."""

from __future__ import annotations

import mmap
import os
import stat
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from steersman.core.errors import InvalidInput, MissingFile

MAX_KEY_BYTES = 1 << 16
MAX_STRING_BYTES = 1 << 24
MAX_STRINGS = 1 << 22  # in all arrays together
MAX_ARRAY_BYTES = 1 << 28
MAX_HEADER_BYTES = 1 << 29
MAX_MESSAGE = 300

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS: Mapping[int, tuple[struct.Struct, str]] = {
    0: (struct.Struct("<B"), "<u1"),
    1: (struct.Struct("<b"), "<i1"),
    2: (struct.Struct("<H"), "<u2"),
    3: (struct.Struct("<h"), "<i2"),
    4: (struct.Struct("<I"), "<u4"),
    5: (struct.Struct("<i"), "<i4"),
    6: (struct.Struct("<f"), "<f4"),
    7: (struct.Struct("<B"), "<u1"),
    10: (struct.Struct("<Q"), "<u8"),
    11: (struct.Struct("<q"), "<i8"),
    12: (struct.Struct("<d"), "<f8"),
}
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class StringArray(Sequence[str]):
    """Strings of a metadata array, kept as bytes and decoded when they are looked at.

    Bytes that are not UTF-8 decode to lone surrogates, so that ``raw`` and ``str`` say the same.
    """

    def __init__(self, raw: list[bytes]) -> None:
        self.raw = raw

    def __len__(self) -> int:
        return len(self.raw)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if isinstance(index, slice):
            return StringArray(self.raw[index])
        return self.raw[index].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (raw.decode("utf-8", "surrogateescape") for raw in self.raw)

    def __repr__(self) -> str:
        return f"<{len(self.raw)} strings>"


def open_regular(path: Path) -> int:
    """Open ``path`` for reading and return its descriptor; only regular files are accepted.

    Raises
    ------
    MissingFile
        There is no such file.
    InvalidInput
        It is a folder, a pipe or a device, or cannot be read.
    """
    try:
        # Without O_NONBLOCK a named pipe would wait for its writer.
        fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise MissingFile(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{path}: cannot be read ({error})") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise InvalidInput(f"{path}: not a regular file")
    return fd


class Cursor:
    """Reads a buffer forwards; running past its end is an InvalidInput."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = min(len(buffer), MAX_HEADER_BYTES)
        self.strings_left = MAX_STRINGS
        self.at = 0

    def fail(self, what: str) -> InvalidInput:
        # Names in ``what`` come from the file and may be long.
        said = what if len(what) <= MAX_MESSAGE else f"{what[:MAX_MESSAGE]} ..."
        return InvalidInput(f"{self.path}: not a usable GGUF file: {said}")

    def left(self) -> int:
        return self.size - self.at

    def unpack(self, form: struct.Struct) -> Any:
        if form.size > self.size - self.at:
            raise self.fail(f"its header goes on beyond byte {self.size}")
        (value,) = form.unpack_from(self.buffer, self.at)
        self.at += form.size
        return value

    def u32(self) -> int:
        return int(self.unpack(_U32))

    def u64(self) -> int:
        return int(self.unpack(_U64))

    def string(self, what: str, limit: int) -> bytes:
        length = self.u64()
        if length > limit:
            raise self.fail(f"{what} of {length} bytes (limit {limit})")
        if length > self.left():
            raise self.fail(f"{what} of {length} bytes, {self.left()} are left in the file")
        raw = self.buffer[self.at : self.at + length]
        self.at += length
        return raw

    def name(self, what: str) -> str:
        raw = self.string(what, MAX_KEY_BYTES)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"{what} {raw[:40]!r} is not UTF-8") from None

    def scalar(self, key: str, kind: int) -> Any:
        value = self.unpack(_SCALARS[kind][0])
        if kind == _BOOL:
            if value > 1:
                raise self.fail(f"{key}: {value} is not a boolean")
            return bool(value)
        return value

    def value(self, key: str) -> Any:
        kind = self.u32()
        key = key if key.isprintable() else repr(key)  # it is only spoken of here
        if kind == _STRING:
            return self.string(key, MAX_STRING_BYTES).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            raise self.fail(f"{key}: unknown value type {kind}")
        return self.scalar(key, kind)

    def array(self, key: str) -> Any:
        kind, count = self.u32(), self.u64()
        if kind == _STRING:
            return StringArray(self.strings(key, count))
        if kind not in _SCALARS:
            what = "nested arrays are" if kind == _ARRAY else f"element type {kind} is"
            raise self.fail(f"{key}: {what} not supported")
        form, dtype = _SCALARS[kind]
        nbytes = count * form.size
        if nbytes > min(self.left(), MAX_ARRAY_BYTES):
            raise self.fail(f"{key}: array of {count} elements, {self.left()} bytes are left")
        values = np.frombuffer(self.buffer, dtype, count, self.at).copy()
        self.at += nbytes
        return values.astype(np.bool_) if kind == _BOOL else values

    def strings(self, key: str, count: int) -> list[bytes]:
        if count > self.strings_left or count * 8 > self.left():
            raise self.fail(
                f"{key}: array of {count} strings (limit {self.strings_left}), "
                f"{self.left()} bytes are left"
            )
        self.strings_left -= count
        buffer, at = self.buffer, self.at
        end = min(self.size, at + 8 * count + MAX_ARRAY_BYTES)
        unpack, out = _U64.unpack_from, []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + unpack(buffer, at)[0]
                if at > end:
                    where = "leaves the file" if at > self.size else "is too long"
                    raise self.fail(f"{key}: a string of {at - begin} bytes {where}")
                out.append(buffer[begin:at])
        except struct.error:
            raise self.fail(f"{key}: the file ends inside an array of {count} strings") from None
        self.at = at
        return out
