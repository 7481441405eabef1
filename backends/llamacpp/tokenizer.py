"""Text to ids and ids to exact bytes, by the vocabulary inside the GGUF file."""

from __future__ import annotations

import ctypes
from functools import cached_property

import numpy as np

from steersman.core.errors import BackendError, InvalidInput, UsageError

from .handles import ModelHandle
from .lib import llama

_MAX_TEXT = 1 << 30  # the engine counts bytes and tokens in int32


class LlamaTokenizer:
    """Implements ``steersman.core.model.Tokenizer`` on a loaded llama.cpp model.

    Safe to share between threads: the vocabulary is never written to.
    """

    def __init__(self, handle: ModelHandle) -> None:
        self._handle: ModelHandle | None = handle
        vocab = handle.vocab
        self._size = int(llama.llama_vocab_n_tokens(vocab))
        bos = int(llama.llama_vocab_bos(vocab))
        self._bos = bos if 0 <= bos < self._size else None
        self._add_bos = bool(llama.llama_vocab_get_add_bos(vocab)) and self._bos is not None
        eos = llama.llama_vocab_eos(vocab)
        # The one that chat templates mean by ``eos_token``.
        self.eos_id: int | None = eos if eos >= 0 else None
        template = llama.llama_model_chat_template(handle.pointer, None)
        self._template = None if template is None else template.decode("utf-8", "replace")
        self._bytes: dict[int, bytes] = {}

    def close(self) -> None:
        """Let go of the model; what was not looked up before raises UsageError from now on."""
        self._handle = None

    def _held(self) -> ModelHandle:
        handle = self._handle
        if handle is None:
            raise UsageError("tokenizer: its model is closed")
        return handle

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._size

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence id, if there is one."""
        return self._bos

    @property
    def add_bos(self) -> bool:
        """Whether prompts begin with ``bos_id``."""
        return self._add_bos

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template."""
        return self._template

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Control tokens."""
        handle = self._held()
        vocab, is_control = handle.vocab, llama.llama_vocab_is_control
        return frozenset(i for i in range(self._size) if is_control(vocab, i))

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""
        handle = self._held()
        vocab = handle.vocab
        named = {int(llama.llama_vocab_eos(vocab)), int(llama.llama_vocab_eot(vocab))}
        candidates = self.special_ids | {i for i in named if 0 <= i < self._size}
        return frozenset(i for i in candidates if llama.llama_vocab_is_eog(vocab, i))

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of ``text``; see the protocol.

        Raises
        ------
        InvalidInput
            The text holds a lone surrogate, which has no UTF-8 form, or is longer than 1 GiB.
        """
        handle = self._held()
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InvalidInput(
                f"text: lone surrogate {text[error.start]!a} at character {error.start}; "
                "it has no UTF-8 form"
            ) from None
        if not data:
            return []
        if len(data) > _MAX_TEXT:
            raise InvalidInput(f"text: {len(data)} bytes, at most {_MAX_TEXT} can be tokenised")
        room = len(data) + 16  # the vocabulary may put a space in front
        for _ in range(2):
            ids = np.empty(room, np.int32)
            pointer = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
            count = llama.llama_tokenize(
                handle.vocab, data, len(data), pointer, room, False, special
            )
            if count >= 0:
                return [int(i) for i in ids[:count]]
            room = -count
        raise BackendError("llama.cpp: the text could not be tokenised")

    def token_bytes(self, token: int) -> bytes:
        """Return the exact bytes of one token (control tokens: their name).

        Raises
        ------
        UsageError
            There is no such token.
        """
        known = self._bytes.get(token)
        if known is not None:
            return known
        token = int(token)
        if not 0 <= token < self._size:  # the engine would abort the process
            raise UsageError(f"token {token} outside 0..{self._size - 1}")
        handle = self._held()
        buffer = ctypes.create_string_buffer(64)
        size = llama.llama_token_to_piece(handle.vocab, token, buffer, 64, 0, True)
        if size < 0:
            buffer = ctypes.create_string_buffer(-size)
            size = llama.llama_token_to_piece(handle.vocab, token, buffer, -size, 0, True)
        if size < 0:
            raise BackendError(f"llama.cpp: no bytes for token {token}")
        piece = buffer.raw[:size]
        self._bytes[token] = piece
        return piece

    def token_name(self, token: int) -> str:
        """Return a control token's text, or the token's bytes decoded with replacement."""
        return self.token_bytes(token).decode("utf-8", "replace")
