"""CoIn: are the hidden reasoning tokens that somebody bills really there, and about the answer?

A provider commits to fingerprints of its tokens in a hash tree; an auditor asks for some of them,
checks that they were committed to, and lets small trained heads say whether sampled tokens belong
to their block and blocks to the visible answer.
"""

from . import files
from .embedding import Embedder, Fingerprints, fingerprints
from .heads import Heads, Verdict, read_heads
from .protocol import Challenge, Proof, Receipt, ask, commit, faults, prove, sampled_blocks
from .tree import HashTree, bound_root, leaf_hash, root_of

__all__ = [
    "Challenge",
    "Embedder",
    "Fingerprints",
    "HashTree",
    "Heads",
    "Proof",
    "Receipt",
    "Verdict",
    "ask",
    "bound_root",
    "commit",
    "faults",
    "files",
    "fingerprints",
    "leaf_hash",
    "prove",
    "read_heads",
    "root_of",
    "sampled_blocks",
]
