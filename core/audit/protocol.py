"""Commit to hidden tokens, be asked for some of them, prove them, and have the proof checked.

The provider commits before it learns what will be asked; the auditor never sees a token, only the
fingerprints of those it asked for.
"""

from __future__ import annotations

import hashlib
import math
import secrets
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ..decode.rng import Rng
from ..errors import InvalidInput, UsageError
from .embedding import Fingerprints, Floats, blocks, serialise
from .tree import SIZE, HashTree, Path, bound_root, depth_of, leaf_hash, root_of

RECEIPT = b"\x03"
NONCE = 32


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What the provider publishes.

    Attributes
    ----------
    root : bytes
        Of the tree, not bound yet.
    count : int
        Reasoning tokens claimed.
    block : int
        Tokens per block.
    width : int
        Length of a vector.
    nonce : bytes
        32 bytes of the session.
    answer_hash : bytes
        SHA-256 of the visible answer.
    answer_tokens : int
    embedder : mapping
        Facts of the agreed embedding.
    """

    root: bytes
    count: int
    block: int
    width: int
    nonce: bytes
    answer_hash: bytes
    answer_tokens: int
    embedder: Mapping[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> bytes:
        """One hash over root, counts, nonce and answer: what a signature would sign."""
        sizes = struct.pack("<QQQ", self.block, self.width, self.answer_tokens)
        return hashlib.sha256(
            RECEIPT + self.nonce + self.answer_hash + sizes + bound_root(self.root, self.count)
        ).digest()

    @property
    def block_count(self) -> int:
        """Number of blocks."""
        return math.ceil(self.count / self.block)

    def as_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {
            "root": self.root.hex(), "tokens": self.count, "block": self.block,
            "width": self.width, "nonce": self.nonce.hex(), "answer_sha256":
            self.answer_hash.hex(), "answer_tokens": self.answer_tokens,
            "embedder": dict(self.embedder), "digest": self.digest.hex(),
        }  # fmt: skip

    @classmethod
    def from_dict(cls, values: Any, where: str) -> Receipt:
        """Return the receipt that :meth:`as_dict` described.

        Raises
        ------
        InvalidInput
            It is damaged, or its digest does not fit the rest.
        """
        try:
            sizes = [values[k] for k in ("tokens", "block", "width", "answer_tokens")]
            if any(type(n) is not int or not 0 <= n < 1 << 40 for n in sizes) or not sizes[1]:
                raise ValueError("tokens, block, width and answer_tokens must be whole numbers")
            found = cls(
                root=bytes.fromhex(values["root"]), count=sizes[0], block=sizes[1],
                width=sizes[2], nonce=bytes.fromhex(values["nonce"]),
                answer_hash=bytes.fromhex(values["answer_sha256"]), answer_tokens=sizes[3],
                embedder=dict(values["embedder"]),
            )  # fmt: skip
            if {len(found.root), len(found.nonce), len(found.answer_hash)} != {SIZE}:
                raise ValueError("root, nonce and answer_sha256 must be 64 hex digits")
            if values["digest"] != found.digest.hex():
                raise ValueError("its digest does not fit its other fields")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InvalidInput(f"{where}: not a receipt: {error}") from None
        return found


def tree_of(prints: Fingerprints) -> HashTree:
    """Return the hash tree over the tokens' fingerprints."""
    return HashTree([leaf_hash(serialise(prints.leaf(i))) for i in range(prints.count)])


def commit(
    prints: Fingerprints, answer: str, *, answer_tokens: int, embedder: Mapping[str, Any],
    nonce: bytes | None = None,
) -> Receipt:  # fmt: skip
    """Return the receipt of a trace; ``nonce`` is drawn if None."""
    return Receipt(
        root=tree_of(prints).root,
        count=prints.count,
        block=prints.block,
        width=prints.block_vectors.shape[1],
        nonce=secrets.token_bytes(NONCE) if nonce is None else nonce,
        answer_hash=hashlib.sha256(answer.encode()).digest(),
        answer_tokens=answer_tokens,
        embedder=dict(embedder),
    )


@dataclass(frozen=True, kw_only=True)
class Challenge:
    """Which tokens the auditor wants to see.

    Attributes
    ----------
    digest : bytes
        Of the receipt.
    indices : tuple of int
        Rising; the last token of the claim is always among them.
    round : int
        From 1.
    """

    digest: bytes
    indices: tuple[int, ...]
    round: int = 1


def ask(
    receipt: Receipt, *, share: float = 0.1, tokens: int = 16, round: int = 1,
    seed: int | None = None,
) -> Challenge:  # fmt: skip
    """Draw what to ask for, after the commitment.

    Parameters
    ----------
    receipt : Receipt
    share : float in (0, 1]
        Of the blocks, two at least; doubled with every further round, up to all.
    tokens : int
        Per block; doubled likewise.
    round : int
        From 1.
    seed : int, optional
        The auditor's randomness; drawn from the system if None. A provider who can guess it can
        tailor leaves.
    """
    if not 0 < share <= 1 or tokens < 1 or round < 1:
        raise UsageError("audit: share must be in (0, 1], tokens and round at least 1")
    rng = Rng(secrets.randbits(64) if seed is None else seed)
    spans = blocks(receipt.count, receipt.block)
    factor = 1 << min(round - 1, 32)
    wanted = min(len(spans), max(2, math.ceil(share * len(spans))) * factor)
    order = np.argsort(rng.uniforms(0, round, len(spans)), kind="stable")
    found = {receipt.count - 1} if receipt.count else set()
    for number in order[:wanted]:
        begin, end = spans[int(number)]
        places = np.argsort(rng.uniforms(1 + int(number), round, end - begin), kind="stable")
        found |= {begin + int(p) for p in places[: tokens * factor]}
    return Challenge(digest=receipt.digest, indices=tuple(sorted(found)), round=round)


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Fingerprints that were asked for, with their paths.

    Attributes
    ----------
    digest : bytes
        Of the receipt.
    indices : int64 (k,)
    leaves : float32 (k, 2 d)
    siblings : uint8 (k, depth, 32)
    right : bool (k, depth)
    """

    digest: bytes
    indices: npt.NDArray[np.int64]
    leaves: Floats = field(repr=False)
    siblings: npt.NDArray[np.uint8] = field(repr=False)
    right: npt.NDArray[np.bool_] = field(repr=False)


def prove(
    prints: Fingerprints, receipt: Receipt, challenge: Challenge, *, most: int | None = None
) -> Proof:
    """Answer a challenge.

    Parameters
    ----------
    most : int, optional
        Refuse to show more leaves: vectors tell something about the text they are of.

    Raises
    ------
    UsageError
        The challenge is of another receipt, asks for too much, or for tokens that are not there.
    """
    if challenge.digest != receipt.digest:
        raise UsageError("audit: the challenge belongs to another receipt")
    if most is not None and len(challenge.indices) > most:
        raise UsageError(
            f"audit: the challenge asks for {len(challenge.indices)} tokens, more than {most}"
        )
    if any(not 0 <= i < prints.count for i in challenge.indices):
        raise UsageError(f"audit: the challenge asks for tokens outside 0..{prints.count - 1}")
    tree = tree_of(prints)
    paths = [tree.path(i) for i in challenge.indices]
    depth, k = depth_of(prints.count), len(paths)
    flat = b"".join(b"".join(path.siblings) for path in paths)
    return Proof(
        digest=receipt.digest,
        indices=np.asarray(challenge.indices, np.int64),
        leaves=np.stack([prints.leaf(i) for i in challenge.indices])
        if k else np.zeros((0, 2 * receipt.width), np.float32),
        siblings=np.frombuffer(flat, np.uint8).reshape(k, depth, SIZE),
        right=np.array([path.right for path in paths], np.bool_).reshape(k, depth),
    )  # fmt: skip


def faults(receipt: Receipt, challenge: Challenge, proof: Proof, answer: str) -> list[str]:
    """Return what is wrong with a proof; nothing if every number in it was committed to.

    This shows that the provider committed to so many fingerprints before it was asked, not that a
    model wrote the tokens.
    """
    found = []
    if not challenge.digest == proof.digest == receipt.digest:
        found.append("challenge, proof and receipt do not belong together")
    if hashlib.sha256(answer.encode()).digest() != receipt.answer_hash:
        found.append("the answer is not the one that was committed to")
    if proof.indices.tolist() != list(challenge.indices):
        return [*found, "the proof is not of the tokens that were asked for"]
    k, depth = len(proof.indices), depth_of(receipt.count)
    if (
        proof.leaves.shape != (k, 2 * receipt.width)
        or proof.siblings.shape != (k, depth, SIZE)
        or proof.right.shape != (k, depth)
        or not np.isfinite(proof.leaves).all()
    ):
        return [*found, "the proof has not the shape that the receipt asks for"]
    if receipt.count == 0 and receipt.root != HashTree([]).root:
        found.append("a receipt of no tokens has another root")
    seen: dict[int, bytes] = {}
    for row, index in enumerate(map(int, proof.indices)):
        path = Path(
            siblings=tuple(s.tobytes() for s in proof.siblings[row]),
            right=tuple(bool(r) for r in proof.right[row]),
        )
        leaf = leaf_hash(serialise(proof.leaves[row]))
        if root_of(leaf, index, path, count=receipt.count) != receipt.root:
            found.append(f"token {index}: its fingerprint does not lead to the root")
        number = index // receipt.block
        vector = serialise(proof.leaves[row, : receipt.width])
        if seen.setdefault(number, vector) != vector:
            found.append(f"token {index}: names another vector for block {number} than its "
                         "neighbours")  # fmt: skip
    return found


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One block as far as the auditor has seen it.

    Attributes
    ----------
    number : int
    vector : float32 (d,)
        Of the block.
    tokens : float32 (n, d)
        Of the tokens that were asked for.
    """

    number: int
    vector: Floats = field(repr=False)
    tokens: Floats = field(repr=False)


def sampled_blocks(receipt: Receipt, proof: Proof) -> list[Sampled]:
    """Return the blocks of a proof without :func:`faults`."""
    numbers = proof.indices // receipt.block
    d = receipt.width
    return [
        Sampled(
            number=int(n),
            vector=proof.leaves[numbers == n][0, :d],
            tokens=proof.leaves[numbers == n][:, d:],
        )
        for n in np.unique(numbers)
    ]


def repeated(found: Sequence[Sampled], *, above: float = 0.9995) -> list[tuple[int, int]]:
    """Return pairs of sampled blocks that are the same or nearly so, by cosine."""
    if not found:
        return []
    vectors = np.stack([s.vector for s in found]).astype(np.float64)
    norms = np.sqrt((vectors**2).sum(axis=1, keepdims=True))
    unit = vectors / np.where(norms > 0, norms, 1)
    near = np.triu(unit @ unit.T, 1) > above
    return [(found[i].number, found[j].number) for i, j in np.argwhere(near)]


def repeated_runs(
    indices: npt.NDArray[np.int64], tokens: npt.NDArray[np.float32], *, length: int = 8
) -> float:
    """Return the share of runs of tokens that stood earlier among those shown.

    Parameters
    ----------
    indices : int64 (k,)
        Places of the shown tokens, rising; only tokens that follow each other make a run.
    tokens : float32 (k, d)
        Their vectors; equal tokens have equal ones.
    length : int
        Tokens of a run.

    Returns
    -------
    float in [0, 1]
        0 where no run is shown.
    """
    names = [serialise(vector) for vector in tokens]
    seen: set[tuple[bytes, ...]] = set()
    count = again = 0
    for begin in range(len(names) - length + 1):
        if indices[begin + length - 1] - indices[begin] != length - 1:
            continue
        run = tuple(names[begin : begin + length])
        count += 1
        again += run in seen
        seen.add(run)
    return again / count if count else 0.0
