"""A ``tokenizers`` tokenizer from the vocabulary inside a GGUF file.

Two families are built: byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``) and SentencePiece-style
BPE with byte fallback (``llama``: Llama 2, Mistral, Gemma). Ids equal llama.cpp's, which the tests
check on its own vectors and against the library itself.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from steersman.core.errors import InvalidInput, UsageError

from .gguf import GGUFHeader, StringArray

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
SPACE = "\u2581"  # SentencePiece's visible space

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORDS = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Regular expressions that cut a text, one after the other, before merging.
_CUTS: dict[str, tuple[str, ...]] = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt2": (_GPT2,),
    "digits": (r"\p{N}", _GPT2),
    "llama3": (_WORDS % "{1,3}",),
    "qwen2": (_WORDS % "",),
    "falcon": (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}"),
}
# ``tokenizer.ggml.pre`` -> a key of _CUTS.
_PRE = {
    "default": "default",
    "falcon": "falcon",
    "deepseek-coder": "deepseek-coder",
    **dict.fromkeys(["gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion"], "gpt2"),
    **dict.fromkeys(["jina-es", "jina-de", "jina-v1-en", "jina-v2-es", "jina-v2-de"], "gpt2"),
    **dict.fromkeys(["roberta-bpe", "granite-docling", "exaone4", "mellum", "modern-bert"], "gpt2"),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell"], "digits"),
    **dict.fromkeys(["exaone", "minerva-7b"], "digits"),
    **dict.fromkeys(["llama3", "llama-v3", "llama-bpe", "falcon3", "smaug-bpe", "dbrx"], "llama3"),
    **dict.fromkeys(["qwen2", "stablelm2", "deepseek-r1-qwen", "hunyuan", "megrez"], "qwen2"),
}
_WHOLE_WORDS_FIRST = {"llama3", "llama-v3", "llama-bpe", "falcon3"}

# Names that end a generation whatever the metadata say; the same ones llama.cpp looks for.
_END_NAMES = frozenset(
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>"]
    + ["<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]"]
    + ["<|end_of_text|>", "<end_of_utterance>", "<eos>", "<|end▁of▁sentence|>"]
)
# Fill-in-the-middle markers end a generation too; the first one found of each kind counts.
_FILL_NAMES = (
    ("fim_pad", ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]")),
    ("fim_rep", ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>")),
    ("fim_sep", ("<|file_sep|>",)),
)


def _strings(header: GGUFHeader, key: str) -> list[str]:
    array = header.need(key, StringArray)
    try:
        return [raw.decode("utf-8") for raw in array.raw]
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{header.path}: {key}: {error.object[:40]!r} is not UTF-8") from None


def vocabulary(header: GGUFHeader) -> tuple[list[str], np.ndarray]:
    """Return all tokens as written in the file, and their types (``NORMAL``, ``CONTROL``, ...).

    Raises
    ------
    InvalidInput
        The file holds no vocabulary, or the two arrays differ in length.
    """
    tokens = _strings(header, "tokenizer.ggml.tokens")
    types = header.get("tokenizer.ggml.token_type", np.ndarray)
    if types is None:
        types = np.full(len(tokens), NORMAL, np.int32)
    if len(types) != len(tokens) or not tokens:
        raise InvalidInput(f"{header.path}: {len(tokens)} tokens, but {len(types)} token types")
    return tokens, types


def end_ids(header: GGUFHeader) -> list[int]:
    """Return the ids that end a generation, from the metadata and from well-known names."""
    tokens = header.need("tokenizer.ggml.tokens", StringArray).raw
    count = len(tokens)
    ids = {
        i
        for name in ("eos", "eot", "eom")
        if (i := special_id(header, name)) is not None and i < count
    }
    where = {raw: i for i, raw in enumerate(tokens)}
    ids.update(where[n.encode()] for n in _END_NAMES if n.encode() in where)
    for key, names in _FILL_NAMES:
        found = special_id(header, key)
        if found is None:
            found = min((where[n.encode()] for n in names if n.encode() in where), default=None)
        if found is not None:
            ids.add(found)
    return sorted(ids)


def special_id(header: GGUFHeader, name: str) -> int | None:
    """Return ``tokenizer.ggml.<name>_token_id``, or None when absent or out of range."""
    value = header.get(f"tokenizer.ggml.{name}_token_id", int)
    if value is None or not 0 <= value < len(header.need("tokenizer.ggml.tokens", StringArray)):
        return None
    return int(value)


def adds_bos(header: GGUFHeader) -> bool:
    """Return whether the model expects its beginning-of-sequence token first."""
    by_family = header.get("tokenizer.ggml.model", str, "") == "llama"
    return bool(header.get("tokenizer.ggml.add_bos_token", bool, by_family))


def build_tokenizer(header: GGUFHeader) -> Any:
    """Return a ``tokenizers.Tokenizer`` with the vocabulary, cuts and merges of a GGUF file.

    Control tokens are added as special tokens, user-defined ones as plain added tokens.

    Raises
    ------
    UsageError
        The family or the pre-tokenizer is unknown here; the message names the backend that has it.
    InvalidInput
        The vocabulary is damaged.
    """
    from tokenizers import AddedToken

    family = header.need("tokenizer.ggml.model", str)
    builders = {"gpt2": _byte_level, "llama": _sentencepiece}
    if family not in builders:
        raise UsageError(
            f"{header.path}: tokenizer family {family!r} is read only by the llamacpp backend; "
            "use --backend llamacpp"
        )
    tokens, types = vocabulary(header)
    try:
        tokenizer = builders[family](header, tokens, types)
    except (InvalidInput, UsageError):
        raise
    except BaseException as error:
        if not is_library_error(error):
            raise
        raise InvalidInput(f"{header.path}: vocabulary does not fit together: {error}") from None
    special = [tokens[i] for i in np.flatnonzero((types == CONTROL) | (types == UNKNOWN))]
    plain = [tokens[i] for i in np.flatnonzero(types == USER_DEFINED)]
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in special if t]
    )
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain if t])
    return tokenizer


def is_library_error(error: BaseException) -> bool:
    """Whether the tokenizers library failed: it raises bare Exception, or panics in Rust."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _byte_level(header: GGUFHeader, tokens: list[str], types: np.ndarray) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    pre = header.get("tokenizer.ggml.pre", str, "default")
    if pre not in _PRE:
        raise UsageError(
            f"{header.path}: pre-tokenizer {pre!r} is read only by the llamacpp backend; "
            "use --backend llamacpp"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for line in _strings(header, "tokenizer.ggml.merges"):
        at = line.find(" ", 1)
        if at < 0:
            raise InvalidInput(f"{header.path}: tokenizer.ggml.merges: {line[:40]!r} has no space")
        left, right = line[:at], line[at + 1 :]
        # The library panics on a merge whose result is not a token.
        if left not in vocab or right not in vocab or left + right not in vocab:
            raise InvalidInput(f"{header.path}: tokenizer.ggml.merges: {line[:40]!r} has no token")
        merges.append((left, right))
    model = models.BPE(
        vocab,
        merges,
        ignore_merges=pre in _WHOLE_WORDS_FIRST,
    )
    tokenizer = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in _CUTS[_PRE[pre]]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(header: GGUFHeader, tokens: list[str], types: np.ndarray) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    scores = header.need("tokenizer.ggml.scores", np.ndarray)
    if len(scores) != len(tokens):
        raise InvalidInput(f"{header.path}: {len(tokens)} tokens, but {len(scores)} scores")
    unknown = special_id(header, "unknown")
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(
        vocab,
        score_merges(tokens, scores, types),
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = Tokenizer(model)
    visible = normalizers.Replace(" ", SPACE)
    strip: list[Any] = []
    if header.get("tokenizer.ggml.add_space_prefix", bool, True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), visible])
        strip = [decoders.Strip(" ", 1, 0)]
    else:
        tokenizer.normalizer = visible
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def score_merges(tokens: list[str], scores: np.ndarray, types: np.ndarray) -> list[tuple[str, str]]:
    """Return merge rules, best first, that give what merging by token score gives.

    SentencePiece joins the neighbouring pair whose joined token scores best; a rule for every way
    to cut a token in two, ordered by the token's score, says the same. Control tokens take no part,
    so no text can merge into one.
    """
    vocab = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    value = scores.tolist()
    rules = []
    for token, i in vocab.items():
        score = -value[i]
        for at in range(1, len(token)):
            left = vocab.get(token[:at])
            if left is not None and (right := vocab.get(token[at:])) is not None:
                rules.append((score, left, right))
    rules.sort()
    return [(tokens[left], tokens[right]) for _, left, right in rules]
