"""Receipts, openings, challenges and proofs as files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InvalidInput
from ..fingerprint import write_atomically
from ..read_file import decoded, read_bytes
from ..strict_json import parse_json
from ..tensor_file import read_tensors, save_tensors
from .embedding import Fingerprints
from .protocol import Challenge, Proof, Receipt

OPENING, PROOF = "coin-opening 1", "coin-proof 1"
MAX_BYTES = 64 << 20


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object; the file appears whole or not at all."""
    write_atomically(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read strict JSON.

    Raises
    ------
    MissingFile, InvalidInput
    """
    return parse_json(decoded(read_bytes(path, MAX_BYTES), str(path)), str(path))


def read_receipt(path: Path) -> Receipt:
    """Read a receipt."""
    return Receipt.from_dict(read_json(path), str(path))


def write_opening(path: Path, prints: Fingerprints, receipt: Receipt) -> None:
    """Write what the provider keeps to itself."""
    arrays = {"tokens": prints.token_vectors, "blocks": prints.block_vectors}
    save_tensors(path, arrays, {"receipt": receipt.as_dict()}, kind=OPENING)


def read_opening(path: Path) -> tuple[Fingerprints, Receipt]:
    """Read what :func:`write_opening` wrote."""
    arrays, facts = read_tensors(path, kind=OPENING, made_by="steersman audit commit")
    try:
        receipt = Receipt.from_dict(facts["receipt"], str(path))
        tokens, rows = arrays["tokens"], arrays["blocks"]
        if tokens.shape != (receipt.count, receipt.width):
            raise ValueError("its tokens do not fit its receipt")
        if rows.shape != (receipt.block_count, receipt.width):
            raise ValueError("its blocks do not fit its receipt")
    except (KeyError, ValueError) as error:
        raise InvalidInput(f"{path}: damaged: {error}") from None
    return Fingerprints(token_vectors=tokens, block_vectors=rows, block=receipt.block), receipt


def write_challenge(path: Path, challenge: Challenge) -> None:
    """Write a challenge."""
    write_json(path, {
        "receipt": challenge.digest.hex(), "round": challenge.round,
        "indices": list(challenge.indices),
    })  # fmt: skip


def read_challenge(path: Path) -> Challenge:
    """Read a challenge."""
    values = read_json(path)
    try:
        indices = values["indices"]
        if not isinstance(indices, list) or any(type(i) is not int or i < 0 for i in indices):
            raise ValueError("indices must be whole numbers from 0")
        if sorted(set(indices)) != indices:
            raise ValueError("indices must rise")
        return Challenge(
            digest=bytes.fromhex(values["receipt"]), indices=tuple(indices),
            round=int(values["round"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path}: not a challenge: {error}") from None


def write_proof(path: Path, proof: Proof) -> None:
    """Write a proof."""
    arrays: dict[str, Any] = {
        "indices": proof.indices, "leaves": proof.leaves, "siblings": proof.siblings,
        "right": proof.right.astype(np.uint8),
    }  # fmt: skip
    save_tensors(path, arrays, {"receipt": proof.digest.hex()}, kind=PROOF)


def read_proof(path: Path) -> Proof:
    """Read a proof; whether it holds is :func:`.protocol.faults`' to say."""
    arrays, facts = read_tensors(path, kind=PROOF, made_by="steersman audit prove")
    try:
        leaves, right = arrays["leaves"], arrays["right"]
        if leaves.dtype != np.float32 or arrays["indices"].dtype != np.int64:
            raise ValueError("its numbers have another format")
        if arrays["siblings"].dtype != np.uint8 or right.dtype != np.uint8 or (right > 1).any():
            raise ValueError("its paths have another format")
        return Proof(
            digest=bytes.fromhex(facts["receipt"]),
            indices=arrays["indices"],
            leaves=leaves,
            siblings=arrays["siblings"],
            right=right.astype(np.bool_),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"{path}: not a proof: {error}") from None
