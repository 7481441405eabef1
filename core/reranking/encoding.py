"""From a window to token ids, in the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

from ..api import encode_prompt
from ..chat import encode_chat
from ..errors import InvalidInput
from ..model import Tokenizer
from .identifiers import Identifiers, find_identifiers
from .prompt import Prompt, merge_system


class PromptEncoder:
    """Encodes windows for one tokenizer.

    Parameters
    ----------
    tokenizer : Tokenizer
    prompt : Prompt
        The wording.

    Attributes
    ----------
    identifiers : Identifiers
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt) -> None:
        self.tokenizer, self.prompt = tokenizer, prompt
        self.identifiers: Identifiers = find_identifiers(tokenizer)

    def encode(self, query: str, passages: Sequence[str], *, max_words: int) -> list[int]:
        """Return the ids of a prompt, with the assistant's turn open and ``[`` in it."""
        messages = self.prompt.messages(query, passages, max_words=max_words)
        return [*self._encode_chat(messages), *self.identifiers.opening]

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if self.tokenizer.chat_template is None:
            # A base model: the same text without turns.
            text = "".join(message["content"] + "\n" for message in messages)
            return [int(i) for i in encode_prompt(self.tokenizer, text)]
        if not self._system_role:
            messages = merge_system(messages)
        return encode_chat(self.tokenizer, messages)

    @cached_property
    def _system_role(self) -> bool:
        return _has_system_role(self.tokenizer)


def _has_system_role(tokenizer: Any) -> bool:
    """Whether the chat template renders a system message: some raise, some drop it."""
    user = {"role": "user", "content": "b"}
    try:
        with_system = encode_chat(tokenizer, [{"role": "system", "content": "Rank."}, user])
        other = encode_chat(tokenizer, [{"role": "system", "content": "Order these."}, user])
    except InvalidInput:
        return False
    return with_system != other
