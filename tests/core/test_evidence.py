"""Which tokens of a prompt are evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toys import ToyTransformer, byte_tokenizer

from steersman.core import generate, stream
from steersman.core.api import encode_prompt
from steersman.core.errors import UsageError
from steersman.core.evidence import evidence_spans, with_evidence
from steersman.core.model import Model

TOKENS = byte_tokenizer()


def covered(ids: list[int], texts: list[str], tokenizer: Any = TOKENS) -> list[bytes]:
    spans = evidence_spans(tokenizer, np.array(ids), texts)
    return [b"".join(map(tokenizer.token_bytes, ids[a:b])) for a, b in spans]


def test_a_text_is_found_however_tokens_cut_it() -> None:
    ids = TOKENS.encode("say: the thing is blue. ok? the thing")
    assert covered(ids, ["thing is blue."]) == [b"thing is blue."]
    # A token that overlaps the beginning counts: " the" is one token here.
    assert covered(ids, ["he thing is"]) == [b" the thing is"]
    assert covered(ids, ["  blue.\n"]) == [b"blue."]


def test_every_place_counts_once() -> None:
    ids = TOKENS.encode("xyz xyz and more xyz")
    assert covered(ids, ["xyz"]) == [b"xyz", b"xyz", b"xyz"]
    assert covered(ids, ["xyz and", "and more"]) == [b"xyz and more"]
    assert covered(ids, ["xyz and", "and more", "xyz"]) == [b"xyz", b"xyz and more", b"xyz"]


def test_characters_of_several_bytes() -> None:
    ids = TOKENS.encode("a café 🙂 b")
    assert covered(ids, ["café 🙂"]) == ["café 🙂".encode()]


def test_control_tokens_are_not_text() -> None:
    ids = [*TOKENS.encode("one"), TOKENS.encode("<|im_end|>", special=True)[0]]
    with pytest.raises(UsageError, match="does not occur"):
        evidence_spans(TOKENS, ids, ["<|im_end|>"])
    assert evidence_spans(TOKENS, [ids[-1], *ids], ["one"]) == ((1, 4),)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["absent words"], r"evidence: 'absent words' does not occur"),
        ([" "], r"evidence: a text is"),
    ],
)
def test_bad_evidence_is_named(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evidence_spans(TOKENS, TOKENS.encode("some text"), texts)
    assert evidence_spans(TOKENS, TOKENS.encode("some text"), []) == ()


def test_documents_go_in_front_unless_they_are_there() -> None:
    assert with_evidence("Q?", ["doc one\n", "doc two"]) == "doc one\n\ndoc two\n\nQ?"
    assert with_evidence("doc one. Q?", ["doc one"]) == "doc one. Q?"
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}]
    assert with_evidence(chat, ["doc"]) == [chat[0], {"role": "user", "content": "doc\n\nQ?"}]
    assert with_evidence(chat, ["Be kind."]) == chat
    with pytest.raises(UsageError, match="no user message"):
        with_evidence(chat[:1], ["doc"])


def test_stream_takes_texts_and_refuses_absent_ones() -> None:
    model = ToyTransformer()
    options: dict[str, Any] = {"profile": "opera", "max_tokens": 2, "seed": 0}
    found = generate(model, "the sky is blue. why?", evidence=["sky is blue"], **options)
    assert len(found.token_ids) <= 2
    with pytest.raises(UsageError, match="evidence: 'green' does not occur in the prompt"):
        stream(model, "the sky is blue. why?", evidence=["green"], **options)
    with pytest.raises(UsageError, match="sequence of texts"):
        stream(model, "the sky is blue. why?", evidence="sky", **options)


@pytest.mark.weights
def test_real_prompts(llamacpp_model: Model) -> None:
    document = "The Panthers' defense gave up just 308 points — “ranking” sixth (6½ sacks)."
    chat = with_evidence([{"role": "user", "content": "How many points?"}], [document])
    ids = encode_prompt(llamacpp_model.tokenizer, chat)
    (span,) = evidence_spans(llamacpp_model.tokenizer, ids, [document])
    text = b"".join(map(llamacpp_model.tokenizer.token_bytes, ids[slice(*span)].tolist()))
    assert text.decode().strip() == document
