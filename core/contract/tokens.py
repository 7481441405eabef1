"""Checks of the tokenizer: exact bytes, control tokens."""

from __future__ import annotations

from ..errors import InvalidInput, SteersmanError
from ..model import Capability
from .probe import Probe, Spec
from .report import Meter

TEXTS = {
    "English": "The quick brown fox, 3.14 times;\n\tdon't  panic!\n\n",
    "accents": "naïve façade — Ångström, e\u0301",
    "emoji": "ok 🙂👍🏽 👩‍👩‍👧‍👦 🇺🇳",
    "Arabic": "السلام عليكم ورحمة الله",
    "Hindi": "नमस्ते, आप कैसे हैं?",
    "Chinese": "你好,世界。今天天气很好。",
    "Japanese and Korean": "こんにちは カタカナ 안녕하세요",
    # What reading broken UTF-8 leaves: replacement characters stand for bytes that are no text.
    "broken UTF-8": b"caf\xc3 \xff\xfe \xf0\x9f\x99 end".decode(errors="replace"),
    "controls": "a\x00b\x1b[31mc\x7f\u202ed\u200be",
    "code": "def f(x):\n    return {x: [1, 2]}  # ok\r\n",
}
# ``encode`` takes any str that has a UTF-8 form. A lone surrogate, which stands for an undecodable
# byte of an argument or file name, has none: it must be refused alike on every engine.
SURROGATE = "a\udcffb"


def _bytes(probe: Probe, meter: Meter) -> None:
    tokenizer = probe.model.tokenizer
    pieces = (tokenizer.token_bytes(i) for i in probe.tokens if i not in tokenizer.special_ids)
    own = b"".join(pieces).decode(errors="ignore")
    meter.holds(bool(own), "tokens of plain text have no bytes")
    for name, text in {**TEXTS, "own": own}.items():
        try:
            ids = tokenizer.encode(text)
        except SteersmanError:  # a vocabulary that does not cover the text, and says so
            meter.holds(name != "own", "text made of the vocabulary's own tokens is refused")
            continue
        meter.holds(
            all(0 <= i < tokenizer.vocab_size for i in ids), f"{name}: ids outside the vocabulary"
        )
        joined = b"".join(tokenizer.token_bytes(i) for i in ids)
        # Vocabularies made from sentences may put a space before the text; nothing else.
        meter.holds(
            joined in (text.encode(), b" " + text.encode()), f"{name}: {joined!r} is not the text"
        )
    meter.holds(tokenizer.encode("") == [], "the empty text has tokens")
    try:
        tokenizer.encode(SURROGATE)
    except InvalidInput:
        return
    except Exception as error:
        meter.holds(False, f"a lone surrogate ends in {type(error).__name__}, not in InvalidInput")
    else:
        meter.holds(False, "a lone surrogate is encoded, though it has no UTF-8 form")


def _vocabulary(probe: Probe, meter: Meter) -> None:
    tokenizer, size = probe.model.tokenizer, probe.model.info.vocab_size
    meter.holds(tokenizer.vocab_size == size, f"{tokenizer.vocab_size} ids for {size} logits")
    step = max(1, size // 20000)
    wrong = [i for i in range(0, size, step) if not isinstance(tokenizer.token_bytes(i), bytes)]
    meter.holds(not wrong, f"token_bytes of {wrong[:5]} are not bytes")
    ends = tokenizer.eos_ids
    meter.holds(bool(ends), "no token ends a generation")
    for name, ids in (("eos", ends), ("special", tokenizer.special_ids)):
        bad = [i for i in ids if not 0 <= i < size]
        meter.holds(not bad, f"{name} ids {bad[:5]} outside the vocabulary")
    bos = tokenizer.bos_id
    meter.holds(bos is None or 0 <= bos < size, f"BOS id {bos} outside the vocabulary")


def _special(probe: Probe, meter: Meter) -> None:
    tokenizer = probe.model.tokenizer
    named = {i: tokenizer.token_name(i) for i in sorted(tokenizer.special_ids)[:40]}
    named = {i: name for i, name in named.items() if name}
    meter.holds(bool(named), "no control token has a name")
    plain = [i for i in probe.tokens if i not in tokenizer.special_ids][:3]
    around = "".join(tokenizer.token_name(i) for i in plain)
    for token, name in named.items():
        meter.holds(
            tokenizer.encode(name, special=True) == [token],
            f"{name!r} with special=True gives {tokenizer.encode(name, special=True)}, not {token}",
        )
        try:
            ids = tokenizer.encode(name)
        except SteersmanError:
            continue
        control = tokenizer.special_ids.intersection(ids)
        meter.holds(not control, f"{name!r} in plain text gives control tokens {sorted(control)}")
        joined = b"".join(tokenizer.token_bytes(i) for i in ids)
        meter.holds(
            joined.removeprefix(b" ") == name.encode(), f"{name!r} in plain text is {joined!r}"
        )
        inside = tokenizer.encode(f"{around}{name}", special=True)
        meter.holds(token in inside, f"{name!r} inside a text is not read as a control token")


CHECKS = (
    Spec(
        name="bytes",
        title="bytes of the tokens join to the text",
        needs=Capability.NONE,
        run=_bytes,
        measure="none",
    ),
    Spec(
        name="vocabulary",
        title="every id has bytes, and some id ends a generation",
        needs=Capability.NONE,
        run=_vocabulary,
        measure="none",
    ),
    Spec(
        name="special",
        title="control tokens are read only with special=True",
        needs=Capability.NONE,
        run=_special,
        measure="none",
    ),
)
