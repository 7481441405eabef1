"""Random numbers keyed by (seed, row, position, draw).

Every number is a pure function of its key, so the same logits give the same token on every engine,
a replayed or rolled-back position draws the same number again, and a row in a batch draws what it
would draw alone. The generator is Philox 4x64, a counter-based generator with 64-bit key words
(Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), from NumPy.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..errors import UsageError

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Rng:
    """Counter-based uniforms.

    Parameters
    ----------
    seed : int
        0 <= seed < 2**64.
    """

    seed: int

    def __post_init__(self) -> None:
        if not 0 <= self.seed <= _MASK:
            raise UsageError(f"--seed {self.seed}: must be in 0..2**64-1")

    @classmethod
    def fresh(cls) -> Rng:
        """Return a generator with a seed from the operating system (below 2**32, to be retyped)."""
        return cls(secrets.randbelow(1 << 32))

    def child(self, number: int) -> Rng:
        """Return an independent generator, for texts that start anew from some position.

        Parameters
        ----------
        number : int
            0 is this generator itself.
        """
        if number == 0:
            return self
        # Rows count from 0, so that no text draws under this one.
        bits = np.random.Philox(
            key=np.array([self.seed, _MASK], np.uint64),
            counter=np.array([0, 0, 0, number & _MASK], np.uint64),
        )
        return Rng(int(bits.random_raw()))

    def uniforms(
        self, row: int, position: int, count: int, *, draw: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return ``count`` float64 uniforms in [0, 1) for one key."""
        bits = np.random.Philox(
            key=np.array([self.seed, row & _MASK], np.uint64),
            counter=np.array([0, 0, draw & _MASK, position & _MASK], np.uint64),
        )
        return np.random.Generator(bits).random(count)

    def uniform(self, row: int, position: int, *, draw: int = 0) -> float:
        """Return one uniform in [0, 1); ``draw`` tells several uses at one position apart."""
        # NumPy takes 18 µs to set up a generator for one number; these ten rounds take 6.
        c0, c1, c2, c3 = 1, 0, draw & _MASK, position & _MASK  # NumPy counts before it draws
        k0, k1 = self.seed, row & _MASK
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = (p1 >> 64) ^ c1 ^ k0, p1 & _MASK, (p0 >> 64) ^ c3 ^ k1, p0 & _MASK
            k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _MASK, (k1 + 0xBB67AE8584CAA73B) & _MASK
        return (c0 >> 11) * 2.0**-53
