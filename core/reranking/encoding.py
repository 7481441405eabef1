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
from .pieces import Assembler
from .prompt import Prompt, merge_system


class PromptEncoder:
    """Encodes windows for one tokenizer.

    Passages are tokenised once and prompts put together from the parts, where the tokenizer is
    found to keep the parts apart (:mod:`.pieces`); else every prompt is encoded whole. The ids are
    the same. May be used by several threads at once.

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
        self.identifiers: Identifiers = find_identifiers(tokenizer, prompt.answer)

    def encode(self, query: str, passages: Sequence[str], *, max_words: int) -> list[int]:
        """Return the ids of a prompt, with the assistant's turn open and ``[`` at its end."""
        ids = self._assembler.encode(query, passages, max_words=max_words)
        if ids is None:
            return self.encode_whole(query, passages, max_words=max_words)
        return [*ids, *self.identifiers.opening]

    def encode_whole(self, query: str, passages: Sequence[str], *, max_words: int) -> list[int]:
        """Return what :meth:`encode` returns, from the text of the whole prompt."""
        messages = self.prompt.messages(query, passages, max_words=max_words)
        return [*self._encode_chat(messages), *self.identifiers.opening]

    def warm(self, query: str, passages: Sequence[str], *, window: int, max_words: int) -> None:
        """Tokenise the parts of a query's windows before they are asked for."""
        self._assembler.warm(query, passages, window=window, max_words=max_words)

    @cached_property
    def _assembler(self) -> Assembler:
        return Assembler(self.tokenizer, self.prompt, self._encode_chat, self._turns)

    def _encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if self._plain:
            text = "".join(message["content"] + "\n" for message in messages)
            return [int(i) for i in encode_prompt(self.tokenizer, text)]
        return encode_chat(self.tokenizer, self._turns(messages))

    def _turns(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """Return the messages with the roles that the template knows."""
        if self._plain or self._system_role:
            return messages
        return merge_system(messages)

    @property
    def _plain(self) -> bool:
        return self.tokenizer.chat_template is None or not self.prompt.chat

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
