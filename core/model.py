"""The model contract: what a strategy may ask of a language model, on any engine.

A :class:`Model` is loaded weights plus a tokenizer; it is immutable and shared between threads.
A :class:`Session` is a cache of one or more rows on such a model; each belongs to one thread at a
time. The one verb of a session is :meth:`Session.forward`: *keep the first tokens of each row,
append these, and return that*. Going back, forking, draft trees, soft tokens and blocks with full
attention are all fields of the same small value, :class:`Forward`.

All checks of arguments live in :mod:`.session`, once, so that no adapter can be made to crash (or
to answer nonsense) by a bad index; adapters implement :meth:`Session._run` on a :class:`Plan`.

Conventions
-----------
- ``B`` rows, ``n`` new positions, ``S`` cached positions, ``V`` vocabulary, ``D`` width, ``L``
  layers, ``H`` attention heads.
- Token ids, lengths and indices are host integers (NumPy int64); ``-1`` is padding on the right.
- Logits are float32 arrays of the engine's own library, never shifted: the logits *of* position
  ``t`` predict the token *at* ``t + 1``, so the log-probability of token ``t`` comes from the
  logits of position ``t - 1``.
- Hidden state ``i`` (``0 <= i <= L``) is the residual stream after ``i`` layers: 0 is the (scaled)
  embedding, ``L`` the last layer's output *before* the final norm. ``Model.head`` applies the final
  norm and the projection to any of them, so ``head(hidden[L]) == logits``.
- Attention of layer ``i`` (``0 <= i < L``) is the softmax of block ``i``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol, Self

from .errors import CapabilityError
from .forward import PAD as PAD
from .forward import Array as Array
from .forward import Capability as Capability
from .forward import Forward as Forward
from .forward import IntArray as IntArray
from .forward import Output as Output
from .forward import Plan as Plan
from .layers import LayerChoice
from .session import Session as Session


class Tokenizer(Protocol):
    """Text to ids and ids to exact bytes."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids; equals the width of the logits."""

    @property
    def bos_id(self) -> int | None:
        """Beginning-of-sequence id, if there is one."""

    @property
    def add_bos(self) -> bool:
        """Whether the model was trained to see ``bos_id`` first."""

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends a generation."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Control tokens: printed as nothing, never produced from user text."""

    @property
    def chat_template(self) -> str | None:
        """Jinja source of the model's chat template."""

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Return the ids of ``text``, with no BOS added.

        ``special=True`` reads control tokens such as ``<|im_start|>`` as such: only for text that
        came out of a chat template, never for what a person or a document wrote.
        """

    def token_bytes(self, token: int) -> bytes:
        """Return the exact bytes of one token (control tokens: their name)."""

    def token_name(self, token: int) -> str:
        """Return a control token's text, or the token's bytes decoded with replacement."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """Facts about a loaded model, for messages, reports and cache keys.

    ``batch_invariant`` is True when logits do not depend on how a prompt is cut into calls or on
    the other rows of a batch, bit for bit, as far as a short probe at load time can tell.
    """

    name: str
    backend: str
    path: str
    architecture: str
    dtype: str
    device: str
    layers: int
    width: int
    heads: int
    vocab_size: int
    context: int
    trained_context: int
    batch_invariant: bool
    threads: int | None = None
    fingerprint: str = ""  # of the weights file: sha256, or size and mtime where that was enough
    extra: Mapping[str, str] = field(default_factory=dict)


class Model(ABC):
    """Loaded weights. Safe to share between threads; sessions are not.

    Attributes
    ----------
    info : ModelInfo
    tokenizer : Tokenizer
    capabilities : Capability
        What this loaded model offers.
    xp : module
        Array namespace of the arrays it returns (see :mod:`steersman.core.array`).
    prefill_chunk : int
        How many prompt tokens one call should hold so that a cancel is noticed soon.
    options : mapping
        Arguments of :func:`steersman.core.load` that opened it; empty for one made otherwise.
    """

    info: ModelInfo
    tokenizer: Tokenizer
    capabilities: Capability
    xp: Any
    prefill_chunk: int = 256
    options: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def session(
        self,
        *,
        max_rows: int = 1,
        needs: Capability = Capability.NONE,
        context: int | None = None,
    ) -> Session:
        """Open an empty cache.

        Parameters
        ----------
        max_rows : int
            Most rows (or leaves of a draft tree) that will ever be live at once.
        needs : Capability
            What will be asked; some engines set their cache up differently for trees, hidden
            states or attention. Asking for more than was named here raises CapabilityError.
        context : int, optional
            Most positions per row; the model's own context when None.
        """

    @abstractmethod
    def embed(self, tokens: IntArray | Sequence[int]) -> Array:
        """Return input embeddings (..., D), float32, in the scale that ``Forward.embeds`` takes."""

    @property
    @abstractmethod
    def embedding(self) -> Array:
        """The whole input embedding matrix (V, D), float32, same scale as ``embed``."""

    @abstractmethod
    def norm(self, hidden: Array) -> Array:
        """Apply the final norm to hidden states (..., D)."""

    @abstractmethod
    def head(self, hidden: Array) -> Array:
        """Apply the final norm and the output projection: (..., D) to float32 logits (..., V)."""

    def with_layers(self, layers: LayerChoice) -> Model | None:
        """Return a model of some of these layers that holds no weights of its own.

        None where the engine cannot share them; then ``load(..., layers=...)`` reads them again.
        Each of the two may be closed without harm to the other.

        Raises
        ------
        UsageError
            The choice does not fit the model (see :mod:`.layers`).
        """
        return None

    def close(self) -> None:  # noqa: B027 - optional for adapters
        """Free the engine's memory; using the model afterwards is an error."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def require(self, needs: Capability, *, who: str, role: str = "target") -> None:
        """Raise CapabilityError naming what is missing and who has it, if anything is missing."""
        missing = needs & ~self.capabilities
        if missing:
            from .backend import backends_offering  # late: reads the registry

            others = [name for name in backends_offering(missing) if name != self.info.backend]
            names = " and ".join(missing.names())
            hint = f"; backends that do: {', '.join(others)}" if others else ""
            raise CapabilityError(
                f"{who} needs {names} from {role!r}; "
                f"{self.info.name} on {self.info.backend} offers none{hint}"
            )
