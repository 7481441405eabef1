"""Array functions on ``(..., V)``: the formulas that strategies, stages and scorers share.

Each is written once in array-API code. Where a library has something faster, the function carries a
twin for it and ``f.portable`` stays the plain form (see :mod:`.native`).
"""

from .activations import erf, gelu, layer_norm, softplus
from .categorical import categorical
from .cumulative import cumulative_sum, sum_before
from .gumbel import gumbel, gumbel_softmax
from .information import entropy, js_divergence, kl_divergence
from .native import Native, native
from .softmax import log_softmax, logsumexp, relative_probs, softmax
from .sorting import mask_out, smallest_set, top_k
from .tokens import target_logprobs, token_logprobs

__all__ = [
    "Native",
    "categorical",
    "cumulative_sum",
    "entropy",
    "erf",
    "gelu",
    "gumbel",
    "gumbel_softmax",
    "js_divergence",
    "kl_divergence",
    "layer_norm",
    "log_softmax",
    "logsumexp",
    "mask_out",
    "native",
    "relative_probs",
    "smallest_set",
    "softmax",
    "softplus",
    "sum_before",
    "target_logprobs",
    "token_logprobs",
    "top_k",
]
