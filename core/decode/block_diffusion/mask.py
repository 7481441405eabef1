"""Which token stands for "not yet known"."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import UsageError
from ...model import Tokenizer

_NAMES = ("<|mask|>", "<|mdm_mask|>", "<mask>", "[mask]", "|<mask>|", "<|mask_token|>")
_SPARE = ("reserved", "unused", "extra_id")


def find_mask(tokenizer: Tokenizer, wanted: int | str, eos_ids: Iterable[int]) -> int:
    """Return the id of the mask token.

    Parameters
    ----------
    wanted : int or str
        An id; the text of one token; or "auto": a control token that is called mask, else one that
        is reserved, else one that the chat template does not use, else any that ends no text.
    eos_ids : iterable of int
        Ids that end a text: none of them can be the mask.

    Raises
    ------
    UsageError
        There is no such token.
    """
    ends = set(eos_ids)
    if isinstance(wanted, int):
        if not 0 <= wanted < tokenizer.vocab_size:
            raise UsageError(
                f"block_diffusion: mask {wanted} is outside the vocabulary "
                f"0..{tokenizer.vocab_size - 1}"
            )
        found = wanted
    elif wanted == "auto":
        return _spare_control(tokenizer, ends)
    else:
        ids = tokenizer.encode(wanted, special=True)
        if len(ids) != 1:
            raise UsageError(
                f"block_diffusion: mask {wanted!r} is {len(ids)} tokens of this model; "
                "name the one token, or its id, that the model was adapted with"
            )
        found = ids[0]
    if found in ends:
        raise UsageError(
            f"block_diffusion: mask {wanted!r} ends a text; "
            "name the token that the model was adapted with"
        )
    return found


def _spare_control(tokenizer: Tokenizer, ends: set[int]) -> int:
    names = {token: tokenizer.token_name(token) for token in tokenizer.special_ids - ends}
    template = tokenizer.chat_template or ""

    def rank(token: int) -> tuple[int, int]:
        name = names[token].lower()
        if name in _NAMES:
            return 0, token
        if any(word in name for word in _SPARE):
            return 1, token
        # Later control tokens are the rarer ones.
        return (2 if token != tokenizer.bos_id and names[token] not in template else 3), -token

    if not names:
        raise UsageError(
            "block_diffusion: mask: this model has no mask token and no control token to spare; "
            "name a token, or its id, that texts never contain"
        )
    return min(names, key=rank)
