"""Models that workers of a cluster open by name."""

from __future__ import annotations

import os
from pathlib import Path

from rerank_toys import JudgeModel


class MortalJudge(JudgeModel):
    """Ends its process at a word, unless ``flag`` says that this happened before."""

    def __init__(self, word: str, flag: Path) -> None:
        super().__init__()
        self.word, self.flag = word, flag

    def logits(self, text):
        if self.word in text and not self.flag.exists():
            self.flag.touch()
            os._exit(1)
        return super().logits(text)


def open_judge(*, context: int = 100_000, **rest):
    return JudgeModel(context=context)


def open_mortal(*, word: str, flag: str, **rest):
    return MortalJudge(word, Path(flag))


def open_nothing(**rest):
    from steersman.core.errors import MissingFile

    raise MissingFile("model.gguf: no such file")
