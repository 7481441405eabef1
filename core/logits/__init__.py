"""The logit chain: stages that map logits to logits, and the draw at its end.

Each stage is a pure array function (``apply_min_p``) with a frozen dataclass of its parameters
(``MinP``). Neutral parameters mean off: temperature t=1, top_k k=0, top_p p=1, min_p p=0,
typical_p p=1, top_n_sigma n=0, xtc probability=0, dry multiplier=0, penalties 1/0/0.
"""

from .chain import DRAW_STAGES, DRAW_TOKEN, Chain, Selection, Uniforms
from .dry import Dry, apply_dry
from .logit_bias import LogitBias, apply_logit_bias
from .min_p import MinP, apply_min_p
from .mirostat import Mirostat, apply_mirostat
from .penalties import Penalties, apply_penalties
from .processor import Processor, apply_processor
from .registry import STAGES, build_stage, stage_class
from .stage import Context, Stage
from .temperature import Temperature, apply_temperature
from .top_k import TopK, apply_top_k
from .top_n_sigma import TopNSigma, apply_top_n_sigma
from .top_p import TopP, apply_top_p
from .typical_p import TypicalP, apply_typical_p
from .xtc import XTC, apply_xtc

__all__ = [
    "DRAW_STAGES",
    "DRAW_TOKEN",
    "STAGES",
    "XTC",
    "Chain",
    "Context",
    "Dry",
    "LogitBias",
    "MinP",
    "Mirostat",
    "Penalties",
    "Processor",
    "Selection",
    "Stage",
    "Temperature",
    "TopK",
    "TopNSigma",
    "TopP",
    "TypicalP",
    "Uniforms",
    "apply_dry",
    "apply_logit_bias",
    "apply_min_p",
    "apply_mirostat",
    "apply_penalties",
    "apply_processor",
    "apply_temperature",
    "apply_top_k",
    "apply_top_n_sigma",
    "apply_top_p",
    "apply_typical_p",
    "apply_xtc",
    "build_stage",
    "stage_class",
]
