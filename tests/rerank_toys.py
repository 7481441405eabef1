"""A model that judges passages exactly, through the same prompt and logits as a real one.

``JudgeModel`` reads its own prompt: every line ``[X] ... worth N ...`` gives the letter X the value
N. After ``[`` its logits rank the letters by that value; further tokens spell the permutation.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
from toys import CHATML, ToyTokenizer, byte_tokenizer

from steersman.core.model import Capability, Model, ModelInfo, Output, Plan, Session

_LINE = re.compile(r"^\[([A-Z])\] ?(.*)$", re.MULTILINE)
_WORTH = re.compile(r"worth (-?\d+(?:\.\d+)?)")


def worth(text: str) -> float:
    """The value that the judge sees in a passage; 0 where none is written."""
    found = _WORTH.search(text)
    return float(found[1]) if found else 0.0


def spell(letters: list[str]) -> str:
    return " > ".join(f"[{letter}]" for letter in letters)


class JudgeModel(Model):
    """See the module.

    Parameters
    ----------
    bias : callable
        Added to the logit of letter ``j``: a liking that has nothing to do with the passage.
    answer : callable
        From the letters in true order to the text that generation spells.
    """

    xp = np
    prefill_chunk = 64

    def __init__(
        self,
        *,
        context: int = 100_000,
        capabilities: Capability = ~Capability.NONE,
        tokenizer: ToyTokenizer | None = None,
        batch_invariant: bool = True,
        bias: Callable[[int], float] = lambda j: 0.0,
        answer: Callable[[list[str]], str] = spell,
    ) -> None:
        self.tokenizer = tokenizer or byte_tokenizer()
        self.capabilities = capabilities
        self.bias = bias
        self.answer = answer
        self.prompts: list[str] = []  # what was read, once per request for logits
        self.tokens_run = 0
        self.calls = 0
        self.info = ModelInfo(
            name="judge",
            backend="toy",
            path="",
            architecture="toy",
            dtype="float32",
            device="cpu",
            layers=1,
            width=1,
            heads=1,
            vocab_size=self.tokenizer.vocab_size,
            context=context,
            trained_context=context,
            batch_invariant=batch_invariant,
            fingerprint="judge-1",
        )

    def session(self, *, max_rows=1, needs=Capability.NONE, context=None):
        room = self.info.context if context is None else context
        return _JudgeSession(self, max_rows=max_rows, needs=needs, context=room)

    def text(self, tokens) -> str:
        return b"".join(self.tokenizer.token_bytes(int(t)) for t in tokens).decode(errors="replace")

    def logits(self, text: str) -> np.ndarray:
        opening = "<|im_start|>assistant\n" if self.tokenizer.chat_template else "only.\n"
        prompt, _, answer = text.rpartition(opening)
        marked = dict(_LINE.findall(prompt))
        row = np.full(self.tokenizer.vocab_size, -30.0, np.float32)
        if answer == "[":
            for letter in map(chr, range(65, 91)):
                value = worth(marked[letter]) if letter in marked else -20.0
                row[self.letter_id(letter)] = value + self.bias(ord(letter) - 65)
            return row
        order = sorted(marked, key=lambda letter: -worth(marked[letter]))
        full = self.answer(order)
        if full.startswith(answer) and len(full) > len(answer):
            row[self.tokenizer.encode(full[len(answer) :])[0]] = 10.0
        else:
            row[min(self.tokenizer.eos_ids)] = 10.0
        return row

    def letter_id(self, letter: str) -> int:
        return self.tokenizer.encode(letter)[0]

    def embed(self, tokens):
        raise AssertionError("a reranker needs no embeddings")

    @property
    def embedding(self):
        raise AssertionError("a reranker needs no embeddings")

    def norm(self, hidden):
        raise AssertionError("a reranker needs no hidden states")

    def head(self, hidden):
        raise AssertionError("a reranker needs no hidden states")


class _JudgeSession(Session):
    def _run(self, plan: Plan) -> Output:
        model = self.model
        assert isinstance(model, JudgeModel)
        model.tokens_run += int(plan.counts.sum())
        model.calls += plan.width > 0
        if plan.logits == "none":
            return Output()
        logits = np.zeros((plan.batch, model.tokenizer.vocab_size), np.float32)
        for row, count in enumerate(plan.counts):
            if count:
                kept = self.row_tokens(int(plan.rows[row]))[: plan.base[row]]
                text = model.text(np.concatenate([kept, plan.tokens[row, :count]]))
                if plan.batch == 1 or text.endswith("["):
                    model.prompts.append(text)
                logits[row] = model.logits(text)
        return Output(logits=logits)


def merging_tokenizer() -> ToyTokenizer:
    """A tokenizer that makes one token of a bracket and a letter."""
    pieces = [bytes([i]) for i in range(256)] + [b"[A", b"[B", b" A", b" B"]
    return ToyTokenizer(
        pieces,
        controls=("<bos>", "<eos>", "<|im_start|>", "<|im_end|>"),
        eos=("<eos>", "<|im_end|>"),
        chat_template=CHATML,
    )


def passages(values) -> list[str]:
    """Passages whose worth is known."""
    return [f"passage number {i} is worth {value}" for i, value in enumerate(values)]
