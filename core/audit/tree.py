"""A hash tree over leaves in order: its root commits to every leaf, and to how many there are."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

LEAF, NODE, COUNT = b"\x00", b"\x01", b"\x02"
SIZE = 32


def leaf_hash(data: bytes, *, tagged: bool = True) -> bytes:
    """Return the SHA-256 of a leaf; ``tagged`` keeps leaves and inner nodes apart."""
    return hashlib.sha256((LEAF if tagged else b"") + data).digest()


def node_hash(left: bytes, right: bytes, *, tagged: bool = True) -> bytes:
    """Return the hash of an inner node."""
    return hashlib.sha256((NODE if tagged else b"") + left + right).digest()


def bound_root(root: bytes, count: int) -> bytes:
    """Return a root bound to the number of leaves.

    Without it the tree of n leaves equals that of n leaves and copies of the last one.
    """
    return hashlib.sha256(COUNT + struct.pack("<Q", count) + root).digest()


def depth_of(count: int) -> int:
    """Return the length of a path in a tree of ``count`` leaves."""
    return max(count - 1, 0).bit_length()


@dataclass(frozen=True, kw_only=True)
class Path:
    """What leads from a leaf to the root.

    Attributes
    ----------
    siblings : tuple of bytes
        From the leaf upwards.
    right : tuple of bool
        Whether the sibling stands to the right.
    """

    siblings: tuple[bytes, ...]
    right: tuple[bool, ...]


class HashTree:
    """All hashes of a tree.

    Parameters
    ----------
    leaves : sequence of bytes
        Leaf hashes, in order. The last one is repeated up to a power of two; without any the root
        is the hash of nothing.
    tagged : bool
        Use different prefixes for leaves and nodes.
    """

    def __init__(self, leaves: Sequence[bytes], *, tagged: bool = True) -> None:
        self.count = len(leaves)
        level = list(leaves) or [hashlib.sha256(b"").digest()]
        level += [level[-1]] * ((1 << depth_of(len(level))) - len(level))
        self._levels = [level]
        while len(level) > 1:
            pairs = zip(level[::2], level[1::2], strict=True)
            level = [node_hash(a, b, tagged=tagged) for a, b in pairs]
            self._levels.append(level)

    @property
    def root(self) -> bytes:
        """The hash that commits to all leaves."""
        return self._levels[-1][0]

    def path(self, index: int) -> Path:
        """Return the path of leaf ``index``, 0 <= index < count."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        siblings, right = [], []
        for level in self._levels[:-1]:
            siblings.append(level[index ^ 1])
            right.append(index % 2 == 0)
            index //= 2
        return Path(siblings=tuple(siblings), right=tuple(right))


def root_of(
    leaf: bytes, index: int, path: Path, *, count: int, tagged: bool = True
) -> bytes | None:
    """Return the root that a leaf hash and its path lead to.

    None where the path is not one of leaf ``index`` in a tree of ``count`` leaves: it is too long
    or too short, or its sides are not those of the index.
    """
    depth = depth_of(count)
    if not 0 <= index < count or len(path.siblings) != depth or len(path.right) != depth:
        return None
    found = leaf
    for level, (sibling, right) in enumerate(zip(path.siblings, path.right, strict=True)):
        if len(sibling) != SIZE or right != ((index >> level) % 2 == 0):
            return None
        pair = (found, sibling) if right else (sibling, found)
        found = node_hash(*pair, tagged=tagged)
    return found
