"""Window prompts put together from parts that are tokenised once.

The same passage stands in several windows, under another letter each time, and all windows of a
query share their beginning and end. A prompt is cut into

    head | ``[A]`` | `` text of the first passage\\n`` | ``[B]`` | `` text ...\\n`` | tail

and the ids of the parts are joined. That gives the ids of the whole text, exactly, if no token of
the vocabulary reaches across a cut: merges on both sides then cannot meet. A tokenizer with such a
token, a template that treats some passage in its own way, or a wording that cannot be cut so, gets
no parts and its prompts are encoded whole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from ..chat import render
from ..model import Tokenizer
from .identifiers import LETTERS
from .prompt import Prompt, cut_words, sanitise

Messages = list[dict[str, str]]
Ids = tuple[int, ...]
Value = TypeVar("Value")

_MOST_IDS = 2_000_000  # token ids that the kept parts may hold together, some 16 MB
_MOST_FRAMES = 256
_PROBE = "qzvx 7319 wjkp"
_TEXTS = (
    "",
    "a",
    "One, two.",
    '"Quoted" text',
    "x [1] - (A)",
    "7 % of 3,000",
    "<|im_end|> ü 語 :)",
)


@dataclass(frozen=True, slots=True)
class Frame:
    """What stands around the passages of a window: rendered text and ids."""

    head: str
    tail: str
    head_ids: Ids
    tail_ids: Ids


class Assembler:
    """Puts window prompts together; see the module. May be used by several threads at once.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt : Prompt
    encode_chat : callable
        From messages to the ids of the whole prompt.
    turns : callable
        From messages to those that the chat template is given.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Prompt,
        encode_chat: Callable[[Messages], list[int]],
        turns: Callable[[Messages], Messages],
    ) -> None:
        self._tokenizer, self._prompt = tokenizer, prompt
        self._encode_chat, self._turns = encode_chat, turns
        self._pieces: Kept[Ids | None] = Kept(_MOST_IDS, lambda ids: 1 + len(ids or ()))
        self._frames: Kept[Frame | None] = Kept(_MOST_FRAMES, lambda frame: 1)

    def encode(self, query: str, passages: Sequence[str], *, max_words: int) -> list[int] | None:
        """Return the ids of a window's prompt; None where it must be encoded whole."""
        if not self.safe or not passages:
            return None
        return self._join(query, passages, max_words)

    def warm(self, query: str, passages: Sequence[str], *, window: int, max_words: int) -> None:
        """Tokenise what the windows of a query are made of."""
        if not self.safe or len(passages) < 2:
            return
        self._frames.get((query, min(window, len(passages))), self._make_frame)
        for text in passages:
            self._pieces.get(cut_words(sanitise(text), max_words), self._make_piece)

    def _join(self, query: str, passages: Sequence[str], max_words: int) -> list[int] | None:
        frame = self._frames.get((query, len(passages)), self._make_frame)
        if frame is None:
            return None
        ids = list(frame.head_ids)
        lines = []
        for letter, mark, passage in zip(LETTERS, self._marks, passages):
            text = cut_words(sanitise(passage), max_words)
            piece = self._pieces.get(text, self._make_piece)
            if piece is None:
                return None
            ids += mark
            ids += piece
            lines.append(self._prompt.line(letter, text))
        ids += frame.tail_ids
        # A template may look into the text; then it is not the frame that this prompt needs.
        whole = self._render(self._prompt.around(query, len(passages), lines))
        return ids if whole == frame.head + "\n".join([*lines, ""]) + frame.tail else None

    @cached_property
    def safe(self) -> bool:
        """Whether prompts of this wording can be put together from parts at all."""
        before, field, after = self._prompt.passage.partition("{text}")
        mark = before.removesuffix(" ")
        closing = self._prompt.closing[:1]
        whole = (
            field
            and mark != before
            and mark.strip() == mark
            and mark[:1] not in ("", "{")
            and mark[-1:] != "}"
            and mark.count("{") == 1
            and "{" not in after
            and "\n" not in self._prompt.passage
            and closing.strip() not in ("", "{")
        )
        if not whole:
            return False
        crossings = ("\n" + mark[0], mark[-1] + " ", "\n" + closing)
        if _spanned(self._tokenizer, crossings) or not all(self._marks):
            return False
        for texts in (_TEXTS, _TEXTS[::-1], _TEXTS[:2]):
            ids = self._join("which [A] is it?", texts, 300)
            messages = self._prompt.messages("which [A] is it?", texts, max_words=300)
            if ids != self._encode_chat(messages):
                return False
        return True

    @cached_property
    def _marks(self) -> list[Ids]:
        """Ids of ``[A]``, ``[B]`` ... within a prompt; empty where they cannot be told apart."""
        found = (self._within("\n", self._mark(letter), " x") for letter in LETTERS)
        return [ids or () for ids in found]

    def _mark(self, letter: str) -> str:
        return self._prompt.line(letter, "\0").partition("\0")[0].removesuffix(" ")

    def _make_piece(self, text: str) -> Ids | None:
        mark = self._mark("A")
        rest = self._prompt.line("A", text)[len(mark) :]
        return self._within(mark[-1], rest + "\n", mark[0])

    def _make_frame(self, key: tuple[str, int]) -> Frame | None:
        query, num = key
        line = self._prompt.line("A", _PROBE)
        messages = self._prompt.around(query, num, [line])
        text = self._render(messages)
        piece = self._make_piece(_PROBE)
        if piece is None or text.count(line + "\n") != 1:
            return None
        ids = self._encode_chat(messages)
        middle = [*self._marks[0], *piece]
        places = [i for i in range(len(ids)) if ids[i : i + len(middle)] == middle]
        if len(places) != 1:
            return None
        head, _, tail = text.partition(line + "\n")
        end = places[0] + len(middle)
        return Frame(head, tail, tuple(ids[: places[0]]), tuple(ids[end:]))

    def _render(self, messages: Messages) -> str:
        template = self._tokenizer.chat_template
        if template is None or not self._prompt.chat:
            return "".join(message["content"] + "\n" for message in messages)
        return render(template, self._turns(messages), tokenizer=self._tokenizer)

    def _within(self, left: str, text: str, right: str) -> Ids | None:
        """Return the ids of ``text`` between two neighbours; None if they run into each other."""
        encode = self._tokenizer.encode
        before, after = encode(left), encode(right)
        ids = encode(left + text + right)
        if len(ids) < len(before) + len(after) or ids[: len(before)] != before:
            return None
        if ids[len(ids) - len(after) :] != after:
            return None
        return tuple(ids[len(before) : len(ids) - len(after)])


class Kept(OrderedDict[Any, Value]):
    """Values made on demand, the longest unused ones dropped beyond a total weight."""

    def __init__(self, most: int, weigh: Callable[[Value], int]) -> None:
        super().__init__()
        self._most, self._weigh, self._held = most, weigh, 0
        self._lock = threading.Lock()

    def get(self, key: Any, make: Callable[[Any], Value]) -> Value:  # type: ignore[override]
        """Return the value of ``key``, made by ``make(key)`` if it is not here."""
        with self._lock:
            if key in self:
                self.move_to_end(key)
                return self[key]
        value = make(key)  # two threads may both make it
        with self._lock:
            if key not in self:
                self[key] = value
                self._held += self._weigh(value)
            while self._held > self._most and len(self) > 1:
                _, old = self.popitem(last=False)
                self._held -= self._weigh(old)
        return value


_spans: WeakKeyDictionary[Any, dict[tuple[str, ...], bool]] = WeakKeyDictionary()


def _spanned(tokenizer: Tokenizer, pairs: tuple[str, ...]) -> bool:
    """Whether some token holds one of these pairs of characters: a cut there might split it."""
    try:
        known = _spans.setdefault(tokenizer, {})
    except TypeError:  # takes no weak references
        known = {}
    if pairs not in known:
        wanted = [pair.encode() for pair in pairs]
        tokens = map(tokenizer.token_bytes, range(tokenizer.vocab_size))
        known[pairs] = any(any(pair in token for pair in wanted) for token in tokens)
    return known[pairs]
