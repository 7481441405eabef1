"""A GGUF model on llama.cpp behind the model contract."""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from steersman.backends.files.gguf import GGUFHeader
from steersman.core.array import to_numpy
from steersman.core.errors import BackendError, InvalidInput, UsageError
from steersman.core.fingerprint import remember, remembered, stamp, weights_fingerprint
from steersman.core.layers import kept_facts
from steersman.core.locate import ModelSource
from steersman.core.model import Capability, IntArray, Model, ModelInfo

from . import lib
from .handles import FloatArray, ModelHandle
from .lib import llama
from .probe import Facts, probe
from .session import LlamaSession
from .tokenizer import LlamaTokenizer
from .weights import Weights

DEFAULT_CONTEXT = 8192  # caches grow on demand, so a large limit costs nothing until it is used
_SECTIONED_ROPE = (8, 24, 40)  # M-RoPE kinds: soft tokens would need four positions each


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How contexts are set up.

    Attributes
    ----------
    name : str
    micro_batch : int
        Tokens per graph. From 64 on the engine's attention takes a tiled kernel, whose results
        differ from those of shorter calls.
    flash : int
        1: flash attention always, the only kind whose results do not depend on the number of
        tokens; -1: the engine decides.
    prefill_chunk : int
    """

    name: str
    micro_batch: int
    flash: int
    prefill_chunk: int


SETTINGS = {
    "reproducible": Setting(name="reproducible", micro_batch=63, flash=1, prefill_chunk=252),
    "fast": Setting(name="fast", micro_batch=512, flash=-1, prefill_chunk=512),
}


class LlamaModel(Model):
    """A loaded GGUF file.

    Parameters
    ----------
    handle : ModelHandle
    header : GGUFHeader
    source : ModelSource
    kept : sequence of int, optional
        Layers of the source that the file holds; all of them if None.
    setting : Setting
    context : int, optional
        Most positions per row; at most what the model was trained for.
    device : str
    threads : int
    reason : str
        Why this many threads.
    """

    xp = np
    tokenizer: LlamaTokenizer

    def __init__(
        self,
        handle: ModelHandle,
        header: GGUFHeader,
        *,
        source: ModelSource,
        kept: Sequence[int] | None = None,
        setting: Setting,
        context: int | None,
        device: str,
        threads: int,
        reason: str,
    ) -> None:
        pointer, path, name = handle.pointer, source.path, source.name
        if llama.llama_model_has_encoder(pointer) or not llama.llama_model_has_decoder(pointer):
            raise InvalidInput(
                f"{path}: an encoder ({header.architecture}); only decoders can generate"
            )
        trained = int(llama.llama_model_n_ctx_train(pointer))
        if context is not None and context > trained:
            raise UsageError(
                f"context: {context} is more than the {trained} positions {name} was trained for"
            )
        self._handle: ModelHandle | None = handle
        self._sessions: weakref.WeakSet[LlamaSession] = weakref.WeakSet()
        self.opening = threading.Lock()
        self.setting = setting
        self.prefill_chunk = setting.prefill_chunk
        self.tokenizer = LlamaTokenizer(handle)
        self.takes_embeddings = llama.llama_model_rope_type(pointer) not in _SECTIONED_ROPE
        self._recurrent = bool(
            llama.llama_model_is_recurrent(pointer) or llama.llama_model_is_hybrid(pointer)
        )
        layers, width = (
            int(llama.llama_model_n_layer(pointer)),
            int(llama.llama_model_n_embd(pointer)),
        )
        heads = int(llama.llama_model_n_head(pointer))
        self.bytes_per_cell = _bytes_per_cell(header, layers, width, max(heads, 1))
        facts: Any = kept_facts(
            name,
            weights_fingerprint(path),
            {"setting": setting.name, "threads": reason},
            kept,
        )
        self.info = ModelInfo(
            backend="llamacpp",
            path=str(path),
            architecture=header.architecture,
            dtype=_file_type(pointer),
            device=device,
            layers=layers,
            width=width,
            heads=heads,
            vocab_size=self.tokenizer.vocab_size,
            context=context or min(trained, DEFAULT_CONTEXT),
            trained_context=trained,
            batch_invariant=False,
            threads=threads,
            **facts,
        )
        self.weights = Weights(
            header, width=width, vocab_size=self.tokenizer.vocab_size, threads=threads
        )
        self.capabilities = ~Capability.NONE  # for the probe only
        facts = self._facts(stamp(header.path))
        self.weights.scale = facts.scale
        self.info = replace(self.info, batch_invariant=facts.batch_invariant)
        self.capabilities = self._offered(facts)

    def _facts(self, file: str) -> Facts:
        key = f"{file}|{self.setting.name}|{lib.llama_cpp.__version__}|{self.info.device}"
        facts = Facts.from_json(remembered("llamacpp").get(key))
        if facts is None:
            facts = probe(self)
            remember("llamacpp", key, facts.to_json())
        return facts

    def _offered(self, facts: Facts) -> Capability:
        c = Capability
        offered = c.LAST_LOGITS | c.ALL_LOGITS | c.ROLLBACK | c.ROWS | c.FORK
        if not self._recurrent:
            offered |= c.TREE | c.BLOCK
        for has, flag in (
            (facts.hidden and facts.scale > 0, c.HIDDEN),  # hidden state 0 is the embedding
            (facts.attentions, c.ATTENTIONS),
            (facts.scale > 0, c.EMBEDS),
            (facts.head and facts.scale > 0, c.HEAD),
        ):
            if has:
                offered |= flag
        return offered

    @property
    def handle(self) -> ModelHandle:
        """The engine's model.

        Raises
        ------
        UsageError
            The model is closed.
        """
        handle = self._handle
        if handle is None:
            raise UsageError(f"model {self.info.name}: already closed")
        return handle

    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> LlamaSession:
        """Open an empty cache; see the contract.

        Raises
        ------
        UsageError
            More than 256 rows, more positions than the model's context, or the model is closed.
        BackendError
            There is no memory for it.
        """
        if context is None:
            context = self.info.context
        if not 1 <= context <= self.info.context:
            raise UsageError(
                f"session: context {context} outside 1..{self.info.context}; "
                "open the model with a larger context"
            )
        _ = self.handle
        session = LlamaSession(self, max_rows=max_rows, needs=needs, context=context)
        self._sessions.add(session)
        return session

    def embed(self, tokens: IntArray | Sequence[int]) -> FloatArray:
        """Return input embeddings (..., D), float32, in the scale that ``Forward.embeds`` takes."""
        self._offers(Capability.EMBEDS, "embed")
        ids = np.asarray(tokens)
        if ids.size and ids.dtype.kind not in "iu":
            raise UsageError(f"embed: tokens must be integers, got {ids.dtype}")
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self.info.vocab_size:
            raise UsageError(f"embed: a token outside 0..{self.info.vocab_size - 1}")
        return self.weights.embed(ids)

    @property
    def embedding(self) -> FloatArray:
        """The whole input embedding matrix (V, D), float32, same scale as ``embed``."""
        self._offers(Capability.EMBEDS, "embedding")
        return self.weights.embedding

    def norm(self, hidden: Any) -> FloatArray:
        """Apply the final norm to hidden states (..., D)."""
        states = self._states(hidden, "norm")
        return self.weights.norm(states.reshape(-1, self.info.width)).reshape(states.shape)

    def head(self, hidden: Any) -> FloatArray:
        """Apply the final norm and the output projection: (..., D) to float32 logits (..., V)."""
        states = self._states(hidden, "head")
        logits = self.weights.head(states.reshape(-1, self.info.width))
        return logits.reshape(*states.shape[:-1], self.info.vocab_size)

    def _states(self, hidden: Any, who: str) -> FloatArray:
        self._offers(Capability.HEAD, who)
        states = np.asarray(to_numpy(hidden), np.float32)
        if states.ndim < 1 or states.shape[-1] != self.info.width:
            raise UsageError(f"{who}: states {states.shape}, expected (..., {self.info.width})")
        return states

    def _offers(self, need: Capability, who: str) -> None:
        _ = self.handle
        self.require(need, who=who)

    def close(self) -> None:
        """Close every session, then free the weights; twice is fine."""
        for session in list(self._sessions):
            session.close()
        self._handle = None
        self.tokenizer.close()
        self.weights.close()


def _bytes_per_cell(header: GGUFHeader, layers: int, width: int, heads: int) -> int:
    """Return the size of one position's keys and values, 16 bits each (an upper estimate)."""
    arch = header.architecture
    groups = header.metadata.get(f"{arch}.attention.head_count_kv", heads)
    per_layer = int(np.max(np.asarray(groups)))
    sizes = [
        header.get(f"{arch}.attention.{name}_length", int, width // heads)
        for name in ("key", "value")
    ]
    return int(2 * layers * per_layer * sum(sizes))


def _file_type(pointer: int | None) -> str:
    name = llama.llama_ftype_name(llama.llama_model_ftype(pointer))
    return name.decode("utf-8", "replace") if name else "unknown"


def load_handle(path: Path, *, gpu_layers: int) -> ModelHandle:
    """Load weights.

    Raises
    ------
    InvalidInput
        The engine cannot read the file.
    """
    try:
        return ModelHandle(path, gpu_layers=gpu_layers)
    except BackendError as error:
        raise InvalidInput(f"{path}: llama.cpp cannot load this file: {error}") from None


def context_option(value: int | None) -> int | None:
    """Check the ``context`` option."""
    if value is not None and (not isinstance(value, int) or not 8 <= value < math.inf):
        raise UsageError(f"context: must be a whole number of at least 8, got {value!r}")
    return value
