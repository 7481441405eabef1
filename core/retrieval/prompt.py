"""The one-word prompt of PromptReps, and its token ids in the model's own chat format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from .. import strict_yaml
from ..chat import Message, render
from ..errors import ContextOverflow, InvalidInput
from ..model import Tokenizer
from ..reranking.prompt import merge_system

Kind = Literal["passage", "query"]
_MARK = "\ufdd0"  # a noncharacter: it stands where the text goes while a template is rendered


@dataclass(frozen=True, kw_only=True)
class WordPrompt:
    """Wording of the prompt that asks for one word.

    ``{kind}`` is "passage" or "query", ``{Kind}`` the same with a capital. ``text`` must hold
    ``{text}`` once. ``answer`` begins the assistant's turn: the prompt ends with it, without an end
    of turn and without a blank, so that the next token is the word.

    Notes
    -----
    The wording is the published one; line breaks are real ones, where the published prompt files
    hold a backslash and an n.
    """

    system: str = "You are an AI assistant that can understand human language."
    text: str = (
        '{Kind}: "{text}". Use one word to represent the {kind} in a retrieval task. '
        "Make sure your word is in lowercase."
    )
    answer: str = 'The word is: "'

    def __post_init__(self) -> None:
        if self.text.count("{text}") != 1:
            raise InvalidInput("prompt: text: must hold {text} once")
        if self.answer != self.answer.rstrip():
            raise InvalidInput("prompt: answer: must not end in a blank")

    def messages(self, kind: Kind) -> list[dict[str, str]]:
        """Return the messages with a mark where the text goes."""
        user = self.text.replace("{kind}", kind).replace("{Kind}", kind.capitalize())
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": user.replace("{text}", _MARK)}]


class WordEncoder:
    """Encodes prompts for one tokenizer: head, text and tail apart from each other.

    So the head is the same for all texts (and computed once), and a text that is cut never takes
    the question with it. What a text holds can never become a control token.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt : WordPrompt
    max_tokens : int
        Tokens kept of each text, at least 1.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: WordPrompt, *, max_tokens: int) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.parts: dict[str, tuple[list[int], list[int]]] = {
            kind: _head_and_tail(tokenizer, prompt, kind) for kind in ("passage", "query")
        }

    def head(self, kind: Kind) -> list[int]:
        """Return the ids in front of the text."""
        return self.parts[kind][0]

    def rest(self, text: str, kind: Kind) -> list[int]:
        """Return the ids of a text, cut to ``max_tokens``, and of the question behind it."""
        text = text.strip()
        ids = [int(i) for i in self.tokenizer.encode(text)] if text else []
        return ids[: self.max_tokens] + self.parts[kind][1]

    def check_context(self, context: int) -> None:
        """Raise ContextOverflow if a text of full length does not fit."""
        longest = max(len(head) + len(tail) for head, tail in self.parts.values())
        if longest + self.max_tokens > context:
            raise ContextOverflow(
                f"retrieval: a text of {self.max_tokens} tokens and its prompt need "
                f"{longest + self.max_tokens} positions and {context} are free; raise --ctx-size "
                "or lower --passage-tokens"
            )


def _head_and_tail(
    tokenizer: Tokenizer, prompt: WordPrompt, kind: Kind
) -> tuple[list[int], list[int]]:
    template = tokenizer.chat_template
    messages = prompt.messages(kind)
    if template is None:
        # A base model: the same text without turns.
        rendered = "".join(f"{message['content']}\n" for message in messages)
    else:
        rendered = _rendered(tokenizer, template, messages, prompt.system)
    head, mark, tail = rendered.partition(_MARK)
    if not mark or _MARK in tail:
        raise InvalidInput("chat template: does not print a user's message once, as it is")
    # The template's text and the prompt's wording are the only ones read with control tokens.
    head_ids = [int(i) for i in tokenizer.encode(head, special=True)] if head else []
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and head_ids[:1] != [bos]:
        head_ids.insert(0, bos)
    return head_ids, [int(i) for i in tokenizer.encode(tail + prompt.answer, special=True)]


def _rendered(
    tokenizer: Tokenizer, template: str, messages: Sequence[Mapping[str, str]], system: str
) -> str:
    """Render; a template that refuses or drops a system message gets it in the user's turn."""

    def text(chosen: Sequence[Message]) -> str:
        return render(template, chosen, tokenizer=tokenizer)

    try:
        rendered = text(messages)
    except InvalidInput:
        return text(merge_system(messages))
    return rendered if system in rendered else text(merge_system(messages))


def read_word_prompt(path: str | Path) -> WordPrompt:
    """Read a :class:`WordPrompt` from a YAML file with any of ``system``, ``text``, ``answer``.

    Raises
    ------
    MissingFile
    InvalidInput
        Not strict YAML, or not a mapping of these names to text.
    """
    document = strict_yaml.read(path, error_type=InvalidInput)
    known = [f.name for f in fields(WordPrompt)]
    if not isinstance(document.data, dict):
        document.error((), f"must be a mapping with {', '.join(known)}")
    document.check_keys((), known)
    for name, value in document.data.items():
        if not isinstance(value, str):
            document.error((name,), f"must be text, got {value!r}")
    try:
        return WordPrompt(**document.data)
    except InvalidInput as error:
        raise InvalidInput(f"{path}: {error}") from None
