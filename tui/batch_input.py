"""Lines of a generation batch: our own short form, and OpenAI batch lines."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeVar

from steersman.core.errors import InvalidInput, UsageError, did_you_mean
from steersman.core.evidence import with_evidence

MAX_LINE = 64 << 20

# Field of a line -> parameter of the profile that it sets.
_STAGE_FIELDS: Mapping[str, str] = {
    "temperature": "temperature.t",
    "top_p": "top_p.p",
    "top_k": "top_k.k",
    "min_p": "min_p.p",
    "presence_penalty": "penalties.presence",
    "frequency_penalty": "penalties.frequency",
}
_LIMIT_FIELDS = ("max_tokens", "max_completion_tokens")
_OWN_FIELDS = (
    "prompt", "messages", "id", "custom_id", "system", "profile", "seed", "stop", "logprobs",
    "evidence",
    *_LIMIT_FIELDS, *_STAGE_FIELDS,
)  # fmt: skip
# In a request body a field that is not understood would change the answer unseen, so it is an
# error; these have no effect on a local model, or only at the value given.
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "user": (),
    "metadata": (),
    "store": (),
    "service_tier": (),
    "n": (1, None),
    "stream": (False, None),
    "echo": (False, None),
    "response_format": ({"type": "text"}, None),
    "tools": ([], None),
    "logit_bias": ({}, None),
}
# Names that results use, so that a line's own extra fields cannot hide them.
RESULT_FIELDS = frozenset(
    ["text", "finish_reason", "token_ids", "prompt_tokens", "completion_tokens", "error",
     "steersman", "truncated"]
)  # fmt: skip

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One request of a batch.

    Attributes
    ----------
    line : int
        Line number in the input, from 1.
    prompt : str or list of messages
    overrides : mapping
        Parameters of the profile that this line sets.
    profile : str or None
        Profile that this line asks for.
    seed : int or None
    stop : tuple of str
    logprobs : int or None
    evidence : tuple of str
        Documents to answer from; the prompt holds them.
    kind : {"plain", "chat", "completion"}
        Shape of the result: ours, or that of an OpenAI batch answer.
    model : str or None
        What an OpenAI body names; not obeyed.
    passed : mapping
        Fields that are repeated in the result untouched.
    """

    line: int
    prompt: str | list[dict[str, str]]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    profile: str | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    evidence: tuple[str, ...] = ()
    kind: str = "plain"
    model: str | None = None
    passed: Mapping[str, Any] = field(default_factory=dict)


def lines(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield number and content of every line that is not blank."""
    number = 0
    while raw := file.readline(MAX_LINE + 1):
        number += 1
        if len(raw) > MAX_LINE:
            raise InvalidInput(f"line {number}: longer than {MAX_LINE >> 20} MiB")
        if raw.strip():
            yield number, raw


def read_training(name: str, take: Callable[[Item], T], *, chat: bool, thing: str) -> list[T]:
    """Return what ``take`` makes of every request of a file, for a training.

    Parameters
    ----------
    name : str
        File of JSON lines.
    take : callable
        Raises InvalidInput for a request that cannot be used.
    chat : bool
        Take prompts as chat messages.
    thing : str
        What the file is to hold, in the plural, for the message.

    Raises
    ------
    InvalidInput
        A line that cannot be used, with file and line; fewer than two.
    """
    found: list[T] = []
    try:
        with open(name, "rb") as file:
            for number, raw in lines(file):
                try:
                    found.append(take(parse(raw, line=number, chat=chat)))
                except InvalidInput as exc:
                    raise InvalidInput(f"{name}:{number}: {exc}") from None
    except OSError as exc:
        raise InvalidInput(f"{name}: cannot be read: {exc.strerror}") from None
    if len(found) < 2:
        raise InvalidInput(f"{name}: holds {len(found)} {thing}; some hundred are needed")
    return found


def parse(raw: bytes, *, line: int, chat: bool = False, system: str | None = None) -> Item:
    """Return the request of one line.

    Raises
    ------
    InvalidInput
        What is wrong with it, without the line number.
    """
    try:
        data = json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
    except UnicodeDecodeError as exc:
        raise InvalidInput(f"not UTF-8 text (byte {exc.start} of the line)") from None
    except json.JSONDecodeError as exc:
        raise InvalidInput(f"not valid JSON: {exc.msg} (column {exc.colno})") from None
    except RecursionError:
        raise InvalidInput("not valid JSON: nested too deep") from None
    if not isinstance(data, dict):
        raise InvalidInput(f"must be a JSON object, got {type(data).__name__}")
    if "body" in data:
        return _openai(data, line)
    return _own(data, line, chat, system)


def _own(data: dict[str, Any], line: int, chat: bool, system: str | None) -> Item:
    passed = {k: v for k, v in data.items() if k not in _OWN_FIELDS}
    passed = {k: data[k] for k in ("id", "custom_id") if k in data} | passed
    taken = sorted(RESULT_FIELDS & set(passed))
    if taken:
        raise InvalidInput(f"{taken[0]}: results use this name; rename the field")
    settings = _settings(data)
    prompt = _prompt(data, chat, _text(data, "system") or system)
    return Item(
        line=line,
        prompt=_with_evidence(prompt, settings.get("evidence", ())),
        profile=_text(data, "profile"),
        passed=passed,
        **settings,
    )


def _openai(data: dict[str, Any], line: int) -> Item:
    body = data["body"]
    if not isinstance(body, dict):
        raise InvalidInput(f"body: must be an object, got {type(body).__name__}")
    url = data.get("url", "")
    if url and not str(url).endswith(("/chat/completions", "/completions")):
        raise InvalidInput(
            f"url: {url!r} is not served; use /v1/chat/completions or /v1/completions"
        )
    known = ["model", "top_logprobs", *_OWN_FIELDS, *_WITHOUT_EFFECT]
    for name, value in body.items():
        if name not in known:
            raise InvalidInput(f"body.{name}: not supported{did_you_mean(name, _OWN_FIELDS)}")
        allowed = _WITHOUT_EFFECT.get(name, ())
        if allowed and value not in allowed:
            raise InvalidInput(f"body.{name}: {value!r} is not supported")
    is_chat = "messages" in body
    settings = _settings({k: v for k, v in body.items() if k != "logprobs"})
    wanted = body.get("logprobs")
    if wanted is True or (wanted is None and body.get("top_logprobs") is not None):
        settings["logprobs"] = _integer(body.get("top_logprobs") or 0, "top_logprobs", 0, 1000)
    elif wanted is not None and wanted is not False:
        settings["logprobs"] = _integer(wanted, "logprobs", 0, 1000)
    return Item(
        line=line,
        prompt=_with_evidence(_prompt(body, False, None), settings.get("evidence", ())),
        kind="chat" if is_chat else "completion",
        model=_text(body, "model"),
        passed={"custom_id": data.get("custom_id")},
        **settings,
    )


def _prompt(data: Mapping[str, Any], chat: bool, system: str | None) -> str | list[dict[str, str]]:
    if ("prompt" in data) == ("messages" in data):
        raise InvalidInput("must hold one of 'prompt' and 'messages'")
    messages: list[dict[str, str]] = []
    if "prompt" in data:
        prompt = data["prompt"]
        if isinstance(prompt, list) and len(prompt) == 1:
            prompt = prompt[0]
        if not isinstance(prompt, str):
            raise InvalidInput(f"prompt: must be text, got {type(prompt).__name__}")
        _check_text(prompt, "prompt")
        if not chat and system is None:
            return prompt
        messages = [{"role": "user", "content": prompt}]
    else:
        given = data["messages"]
        if not isinstance(given, list) or not given:
            raise InvalidInput("messages: must be a list of at least one message")
        messages = [_message(m, i) for i, m in enumerate(given)]
    if system is not None and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _message(message: Any, place: int) -> dict[str, str]:
    where = f"messages[{place}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InvalidInput(f"{where}: must be an object with 'role' and 'content'")
    content = message.get("content")
    if isinstance(content, list):  # parts, as chat APIs allow
        if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
            raise InvalidInput(f"{where}.content: only parts of type 'text' are supported")
        content = "".join(str(p.get("text", "")) for p in content)
    if not isinstance(content, str):
        raise InvalidInput(f"{where}.content: must be text, got {type(content).__name__}")
    _check_text(content, f"{where}.content")
    extra = set(message) - {"role", "content", "name"}
    if extra:
        raise InvalidInput(f"{where}.{min(extra)}: not supported")
    return {"role": message["role"], "content": content}


def _settings(data: Mapping[str, Any]) -> dict[str, Any]:
    overrides: dict[str, Any] = {}
    for name, key in _STAGE_FIELDS.items():
        if data.get(name) is not None:
            overrides[key] = data[name]
            if name.endswith("_penalty"):
                overrides["penalties.last_n"] = -1  # these count the whole text
    for name in _LIMIT_FIELDS:
        if data.get(name) is not None:
            overrides["generation.max_tokens"] = _integer(data[name], name, 0, 1 << 24)
    settings: dict[str, Any] = {"overrides": overrides}
    if data.get("seed") is not None:
        settings["seed"] = _integer(data["seed"], "seed", 0, 2**64 - 1)
    stop = data.get("stop")
    if stop is not None:
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
            raise InvalidInput("stop: must be text or a list of texts, none of them empty")
        settings["stop"] = tuple(stops)
    if data.get("logprobs") is not None:
        settings["logprobs"] = _integer(data["logprobs"], "logprobs", 0, 1000)
    evidence = data.get("evidence")
    if evidence is not None:
        texts = [evidence] if isinstance(evidence, str) else evidence
        if not isinstance(texts, list) or not all(isinstance(t, str) for t in texts):
            raise InvalidInput("evidence: must be text or a list of texts")
        for text in texts:
            _check_text(text, "evidence")
        settings["evidence"] = tuple(texts)
    return settings


def _with_evidence(
    prompt: str | list[dict[str, str]], evidence: tuple[str, ...]
) -> str | list[dict[str, str]]:
    try:
        return with_evidence(prompt, evidence) if evidence else prompt
    except UsageError as exc:
        raise InvalidInput(str(exc)) from None


def _integer(value: Any, name: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidInput(f"{name}: must be a whole number in {low}..{high}, got {value!r}")
    return value


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise InvalidInput(f"{name}: must be text, got {type(value).__name__}")
    return value


def _check_text(text: str, name: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidInput(f"{name}: holds a lone surrogate (\\ud800..\\udfff)") from None
