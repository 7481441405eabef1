"""A byte-exact tokenizer with multi-byte pieces and control tokens, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from steersman.core.errors import InvalidInput

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The two halves of a smiling face: neither is valid UTF-8 alone.
SMILE = (b"\xf0\x9f", b"\x99\x82")


class ToyTokenizer:
    """Longest match over byte pieces; control tokens come after the pieces.

    Parameters
    ----------
    pieces : sequence of bytes
        Token ``i`` stands for ``pieces[i]``.
    controls : sequence of str
        Names of the control tokens, with the ids that follow the pieces.
    eos, bos : str
        Which of them end and begin a sequence.
    """

    def __init__(
        self,
        pieces: Sequence[bytes],
        *,
        controls: Sequence[str] = ("<bos>", "<eos>"),
        eos: Sequence[str] = ("<eos>",),
        bos: str | None = "<bos>",
        add_bos: bool = False,
        chat_template: str | None = None,
    ) -> None:
        self.pieces = tuple(pieces)
        self.controls = tuple(controls)
        self.vocab_size = len(self.pieces) + len(self.controls)
        self._control_ids = {name: len(self.pieces) + i for i, name in enumerate(self.controls)}
        self._ids = {piece: i for i, piece in enumerate(self.pieces)}
        self._longest = max(map(len, self.pieces))
        self.eos_ids = frozenset(self._control_ids[name] for name in eos)
        self.bos_id = None if bos is None else self._control_ids[bos]
        self.add_bos = add_bos
        self.special_ids = frozenset(self._control_ids.values())
        self.chat_template = chat_template

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if special:
            for name, token in self._control_ids.items():
                before, found, after = text.partition(name)
                if found:
                    tail = self.encode(after, special=True)
                    return [*self.encode(before, special=True), token, *tail]
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InvalidInput(f"text: {error.reason} at character {error.start}") from None
        ids = []
        while data:
            for size in range(min(self._longest, len(data)), 0, -1):
                if data[:size] in self._ids:
                    ids.append(self._ids[data[:size]])
                    data = data[size:]
                    break
            else:
                raise InvalidInput(f"text: no token for byte {data[0]:#04x}")
        return ids

    def token_bytes(self, token: int) -> bytes:
        if not 0 <= token < self.vocab_size:
            raise IndexError(token)
        if token < len(self.pieces):
            return self.pieces[token]
        return self.controls[token - len(self.pieces)].encode()

    def token_name(self, token: int) -> str:
        return self.token_bytes(token).decode(errors="replace")


def small_tokenizer() -> ToyTokenizer:
    """13 tokens: a few letters, a pair, "é" whole, a smile in two halves, BOS and EOS."""
    pieces = [b"a", b"b", b"c", b"d", b"ab", b" ", b"\n", b".", b"\xc3\xa9", *SMILE]
    return ToyTokenizer(pieces)


def byte_tokenizer() -> ToyTokenizer:
    """Every byte, some longer pieces, and ChatML control tokens: encodes any text (V = 268)."""
    longer = [b"the ", b" the", b"ing", b"\xc3\xa9", *SMILE, b"ab", b"  "]
    return ToyTokenizer(
        [bytes([i]) for i in range(256)] + longer,
        controls=("<bos>", "<eos>", "<|im_start|>", "<|im_end|>"),
        eos=("<eos>", "<|im_end|>"),
        chat_template=CHATML,
    )
