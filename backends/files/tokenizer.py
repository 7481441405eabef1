"""The core's tokenizer on a ``tokenizer.json``: exact token bytes, guarded control tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from steersman.core.control_tokens import ControlTokens
from steersman.core.errors import InvalidInput, MissingDependency, MissingFile, UsageError

from . import gguf_tokenizer
from .gguf import GGUFHeader, StringArray

MAX_JSON_BYTES = 1 << 28
_SPACE = gguf_tokenizer.SPACE
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Added tokens that steer a chat although their file does not mark them as special.
_TURN_MARK = re.compile(r"<\|[^|\s]+\|>|<(?:start|end)_of_turn>")


@lru_cache(maxsize=1)
def byte_of_character() -> Mapping[str, int]:
    """Return the table by which byte-level BPE writes bytes as printable characters (GPT-2)."""
    printable = [*range(ord("!"), 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    hidden = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(0x100 + i): byte for i, byte in enumerate(hidden)})
    return table


def _byte_level_bytes(token: str) -> bytes:
    table = byte_of_character()
    try:
        return bytes(table[c] for c in token)
    except KeyError:  # not written in the byte alphabet: an added token
        return token.encode()


def _visible_space_bytes(token: str) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token)
    return bytes([int(match[1], 16)]) if match else token.replace(_SPACE, " ").encode()


class HFTokenizer:
    """:class:`steersman.core.model.Tokenizer` on a ``tokenizers.Tokenizer``.

    Encoding may be called from several threads.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer
        Owned by this object from now on; it is set to read control tokens as plain text.
    vocab_size : int
        Width of the logits, at least the number of tokens.
    bos_id, add_bos, eos_ids, chat_template
        See the protocol.
    eos_id : int, optional
        The end token that chat templates mean by ``eos_token``.
    control_ids : iterable of int
        Ids of control tokens besides those that the tokenizer marks as special.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        vocab_size: int | None = None,
        bos_id: int | None = None,
        add_bos: bool = False,
        eos_ids: Iterable[int] = (),
        eos_id: int | None = None,
        chat_template: str | None = None,
        control_ids: Iterable[int] = (),
    ) -> None:
        added = tokenizer.get_added_tokens_decoder()
        control = set(control_ids) | set(eos_ids)
        unmarked = [
            token
            for i, token in added.items()
            if not token.special and (i in control or _TURN_MARK.fullmatch(token.content))
        ]
        if unmarked:
            for token in unmarked:
                token.special = True
            tokenizer.add_special_tokens(unmarked)
            added = tokenizer.get_added_tokens_decoder()
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        size = max(vocab.values(), default=-1) + 1
        self._tokens: list[str] = [""] * max(size, vocab_size or 0)
        for token, i in vocab.items():
            self._tokens[i] = token
        self._added: dict[int, str] = {i: token.content for i, token in added.items()}
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._names = {self._added[i]: i for i in self._special}
        self._strip = {i: (t.lstrip, t.rstrip) for i, t in added.items() if t.lstrip or t.rstrip}
        self._find = ControlTokens(self._names).find
        self._to_bytes: Callable[[str], bytes] = (
            _byte_level_bytes if _is_byte_level(tokenizer) else _visible_space_bytes
        )
        self._bos_id, self._add_bos = bos_id, add_bos and bos_id is not None
        self._eos_ids = frozenset(eos_ids)
        self.eos_id = eos_id
        self._template = chat_template

    @property
    def vocab_size(self) -> int:
        return len(self._tokens)

    @property
    def bos_id(self) -> int | None:
        return self._bos_id

    @property
    def add_bos(self) -> bool:
        return self._add_bos

    @property
    def eos_ids(self) -> frozenset[int]:
        return self._eos_ids

    @property
    def special_ids(self) -> frozenset[int]:
        return self._special

    @property
    def chat_template(self) -> str | None:
        return self._template

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of ``text`` without BOS; see the protocol.

        Raises
        ------
        InvalidInput
            The text holds a lone surrogate, which has no UTF-8 form.
        """
        if not special:
            return self._plain(text)
        ids: list[int] = []
        at = 0
        for begin, end, token in self._find(text):
            left, right = self._strip.get(token, (False, False))
            piece = text[at:begin]
            ids += self._plain(piece.rstrip() if left else piece)
            ids.append(token)
            at = end + (len(text[end:]) - len(text[end:].lstrip()) if right else 0)
        return ids + self._plain(text[at:])

    def _plain(self, text: str) -> list[int]:
        if not text:
            return []
        try:
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        except (TypeError, UnicodeEncodeError):  # which of the two depends on the library's version
            at = next((i for i, c in enumerate(text) if "\ud800" <= c <= "\udfff"), None)
            if at is None:
                raise
            raise InvalidInput(
                f"text: lone surrogate {text[at]!a} at character {at}; it has no UTF-8 form"
            ) from None
        if self._special.isdisjoint(ids):
            return ids
        # A vocabulary whose merges spell a control token: cut such a token into its characters.
        safe: list[int] = []
        for i in ids:
            if i in self._special:
                for character in self._tokens[i]:
                    pieces = self._tokenizer.encode(character, add_special_tokens=False).ids
                    safe += [p for p in pieces if p not in self._special]
            else:
                safe.append(i)
        return safe

    def _check(self, token: int) -> None:
        if not 0 <= token < len(self._tokens):
            raise UsageError(f"token {token} outside 0..{len(self._tokens) - 1}")

    def token_bytes(self, token: int) -> bytes:
        """Return the exact bytes of one token; an id without a token has none."""
        self._check(token)
        if token in self._added:
            return self._added[token].encode()
        return self._to_bytes(self._tokens[token])

    def token_name(self, token: int) -> str:
        """Return a control token's text, or the token's bytes decoded with replacement."""
        return self.token_bytes(token).decode("utf-8", "replace")


def _is_byte_level(tokenizer: Any) -> bool:
    parts = (tokenizer.pre_tokenizer, tokenizer.decoder)
    return any(part is not None and b"ByteLevel" in _state(part) for part in parts)


def _state(part: Any) -> bytes:
    state = part.__getstate__()
    return state if isinstance(state, bytes) else str(state).encode()


def open_tokenizer(source: Path | GGUFHeader) -> HFTokenizer:
    """Open the tokenizer of a Hugging Face folder or of a GGUF file.

    Parameters
    ----------
    source : Path or GGUFHeader
        A folder with ``tokenizer.json``, or a header from ``read_header``.

    Raises
    ------
    MissingFile
        The folder has no ``tokenizer.json``.
    InvalidInput
        A file in it cannot be read.
    UsageError
        The GGUF file's tokenizer family is not supported here.
    """
    try:
        import tokenizers
    except ImportError:
        raise MissingDependency(
            'tokenizers is not installed; run: pip install "steersman[torch]"'
        ) from None
    if isinstance(source, GGUFHeader):
        return HFTokenizer(
            gguf_tokenizer.build_tokenizer(source),
            vocab_size=len(source.need("tokenizer.ggml.tokens", StringArray)),
            bos_id=gguf_tokenizer.special_id(source, "bos"),
            add_bos=gguf_tokenizer.adds_bos(source),
            eos_ids=gguf_tokenizer.end_ids(source),
            eos_id=gguf_tokenizer.special_id(source, "eos"),
            chat_template=source.get("tokenizer.chat_template", str),
        )
    path = source / "tokenizer.json"
    if not path.is_file():
        raise MissingFile(f"{path}: no such file; the folder needs a fast tokenizer")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InvalidInput(f"{path}: {path.stat().st_size} bytes (limit {MAX_JSON_BYTES})")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:
        if not gguf_tokenizer.is_library_error(error):
            raise
        raise InvalidInput(f"{path}: not a tokenizer: {error}") from None
    config = read_json(source / "tokenizer_config.json", missing_ok=True)
    model = read_json(source / "config.json", missing_ok=True)
    generation = read_json(source / "generation_config.json", missing_ok=True)
    model = {**model, **_mapping(model.get("text_config"))}
    bos = _token_id(tokenizer, config.get("bos_token"))
    if bos is None:
        bos = next((i for i in _ids(model.get("bos_token_id"))), None)
    ends = {*_ids(model.get("eos_token_id")), *_ids(generation.get("eos_token_id"))}
    end = _token_id(tokenizer, config.get("eos_token"))
    ends |= {end} if end is not None else set()
    size = model.get("vocab_size")
    return HFTokenizer(
        tokenizer,
        vocab_size=size if isinstance(size, int) and 0 < size < 1 << 24 else None,
        bos_id=bos,
        add_bos=_adds_bos(tokenizer, config, bos),
        eos_ids=ends,
        eos_id=end,
        chat_template=_template(source, config),
    )


def read_json(path: Path, *, missing_ok: bool = False) -> dict[str, Any]:
    """Read a JSON object from a small file.

    Raises
    ------
    MissingFile
        It does not exist and ``missing_ok`` is False.
    InvalidInput
        It is too large, not JSON, or not an object.
    """
    if not path.is_file():
        if missing_ok:
            return {}
        raise MissingFile(f"{path}: no such file")
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InvalidInput(f"{path}: {path.stat().st_size} bytes (limit {MAX_JSON_BYTES})")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise InvalidInput(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]


def _token_id(tokenizer: Any, entry: Any) -> int | None:
    """Return the id of a token given as a string or as an object with ``content``."""
    content = entry.get("content") if isinstance(entry, dict) else entry
    found = tokenizer.token_to_id(content) if isinstance(content, str) else None
    return None if found is None else int(found)


def _adds_bos(tokenizer: Any, config: Mapping[str, Any], bos: int | None) -> bool:
    declared = config.get("add_bos_token")
    if bos is None or isinstance(declared, bool):
        return bool(declared)
    ids = tokenizer.encode("a", add_special_tokens=True).ids
    return bool(ids) and ids[0] == bos


def _template(folder: Path, config: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file() and beside.stat().st_size <= 1 << 24:
        return beside.read_text(encoding="utf-8", errors="replace")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named ones
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
