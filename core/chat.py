"""Messages to token ids through the model's own chat template.

What a person or a document wrote can never become a control token, and the ids of ordinary messages
are exactly those of the rendered text.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from .control_tokens import ControlTokens
from .errors import InvalidInput, UsageError, did_you_mean
from .model import Tokenizer
from .template import render_template

ROLES = ("system", "user", "assistant", "tool")
MAX_MESSAGES = 10_000

Message = Mapping[str, str]


def check_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Return the messages as plain dicts.

    Raises
    ------
    InvalidInput
        There are none or too many, or one is not ``{"role": ..., "content": ...}`` with a known
        role and a string.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidInput(f"messages: expected a list, found {type(messages).__name__}")
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise InvalidInput(f"messages: {len(messages)} given, expected 1 to {MAX_MESSAGES}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise InvalidInput(f"messages[{i}]: expected an object with role and content")
        for key in message:
            if key not in ("role", "content"):
                hint = did_you_mean(str(key), ("role", "content"))
                raise InvalidInput(f"messages[{i}].{key}: unknown key{hint}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise InvalidInput(f"messages[{i}].role: {role!r}{did_you_mean(str(role), ROLES)}")
        if not isinstance(content, str):
            raise InvalidInput(
                f"messages[{i}].content: expected a string, found {type(content).__name__}"
            )
        checked.append({"role": str(role), "content": content})
    return checked


def render(
    template: str,
    messages: Sequence[Message],
    *,
    tokenizer: Tokenizer,
    add_generation_prompt: bool = True,
) -> str:
    """Return the text that a chat template makes of messages.

    Parameters
    ----------
    template : str
        Jinja source; untrusted, see :mod:`steersman.core.template`.
    messages : sequence of {"role", "content"}
    tokenizer : Tokenizer
        For the names of the beginning and end tokens.
    add_generation_prompt : bool
        End with the opening of the assistant's turn.

    Raises
    ------
    InvalidInput
        The messages are malformed, or the template fails or refuses them.
    """
    variables: dict[str, Any] = {
        "messages": check_messages(messages),
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.token_name(tokenizer.bos_id),
        "eos_token": "",
    }
    if tokenizer.eos_ids:
        variables["eos_token"] = tokenizer.token_name(_main_end(tokenizer))
    return render_template(template, variables)


def _main_end(tokenizer: Tokenizer) -> int:
    declared = getattr(tokenizer, "eos_id", None)
    return declared if declared in tokenizer.eos_ids else min(tokenizer.eos_ids)


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Return the token ids of messages in the model's chat format.

    Control tokens are read only where the template wrote them. To tell its text from the messages',
    the template is rendered a second time with an invisible mark between all characters of the
    messages: no control token can then arise from them, or across their edges. If a template looks
    into the messages, so that marks change what it does, fewer marks are set: at the edges, and at
    last only inside what spells a control token. The stretches between control tokens are encoded
    whole, so merges across the edges of a message are those of the plain text.

    Parameters
    ----------
    tokenizer : Tokenizer
    messages : sequence of {"role", "content"}
        Roles are ``system``, ``user``, ``assistant`` and ``tool``.
    add_generation_prompt : bool
        End with the opening of the assistant's turn.

    Returns
    -------
    list of int
        With BOS first if the model wants one, once.

    Raises
    ------
    UsageError
        The model has no chat template.
    InvalidInput
        The messages are malformed, or the template fails or refuses them.
    """
    template = tokenizer.chat_template
    if template is None:
        raise UsageError(
            "this model has no chat template; give raw text instead of messages (without --chat)"
        )
    source: str = template

    def rendered(contents: Sequence[str]) -> str:
        changed = [{**m, "content": c} for m, c in zip(plain, contents, strict=True)]
        return render(
            source, changed, tokenizer=tokenizer, add_generation_prompt=add_generation_prompt
        )

    plain = check_messages(messages)
    contents = [message["content"] for message in plain]
    control = _control_tokens(tokenizer)
    expected = rendered(contents)
    mark = _unused_mark(source, contents)
    levels: list[Callable[[str], str]] = [
        lambda text: _mark_all(text, mark),
        lambda text: _mark_edges(_mark_control(text, mark, control), mark),
        lambda text: _mark_control(text, mark, control),
    ]
    marked = ""
    for level in levels:
        # A template may fail on marked text where it accepts the plain one.
        with contextlib.suppress(InvalidInput):
            marked = rendered([level(content) for content in contents])
            if marked.replace(mark, "") == expected:
                break
    ids: list[int] = []
    at = 0
    for begin, end, token in control.find(marked):
        ids += _encode(tokenizer, marked[at:begin].replace(mark, ""))
        ids.append(token)
        at = end
    ids += _encode(tokenizer, marked[at:].replace(mark, ""))
    bos = tokenizer.bos_id
    if tokenizer.add_bos and bos is not None and ids[:1] != [bos]:
        ids.insert(0, bos)
    return ids


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text) if text else []


_known_control: WeakKeyDictionary[Any, ControlTokens] = WeakKeyDictionary()


def _control_tokens(tokenizer: Tokenizer) -> ControlTokens:
    with contextlib.suppress(TypeError):  # not hashable, or takes no weak references
        if (found := _known_control.get(tokenizer)) is not None:
            return found
    # A name of one character could not be broken up; no model has one.
    names = {tokenizer.token_name(i): i for i in tokenizer.special_ids}
    control = ControlTokens({name: i for name, i in names.items() if len(name) > 1})
    with contextlib.suppress(TypeError):
        _known_control[tokenizer] = control
    return control


def _unused_mark(template: str, contents: Sequence[str]) -> str:
    """Return a noncharacter that occurs nowhere; Unicode keeps U+FDD0..FDEF for such uses."""
    used = set(template).union(*contents)
    for code in range(0xFDD0, 0xFDF0):
        if chr(code) not in used:
            return chr(code)
    raise InvalidInput("messages: they use all 32 noncharacters U+FDD0 to U+FDEF")


def _mark_all(text: str, mark: str) -> str:
    # Outer spaces stay outside the marks, so that a template can still trim them.
    inner = text.strip()
    if not inner:
        return text
    begin = text.index(inner)
    return text[:begin] + mark + mark.join(inner) + mark + text[begin + len(inner) :]


def _mark_edges(text: str, mark: str) -> str:
    return re.sub(r"\A(\s*)(\S.*\S|\S)(\s*)\Z", rf"\1{mark}\2{mark}\3", text, flags=re.DOTALL)


def _mark_control(text: str, mark: str, control: ControlTokens) -> str:
    # Again, because breaking one token may leave another that overlapped it.
    while found := control.find(text):
        pieces, at = [], 0
        for begin, _end, _token in found:
            pieces += [text[at : begin + 1], mark]
            at = begin + 1
        text = "".join(pieces) + text[at:]
    return text
