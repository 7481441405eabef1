"""``steersman audit``: commit to hidden reasoning tokens, prove some of them, check the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from steersman.core.errors import UsageError

from .. import common, output
from ..envelope import INVALID, PARTIAL
from ..options import (
    FILE,
    WIDE,
    file_option,
    overwrite_option,
    refuse_existing,
    require_safetensors,
    whole,
)


@click.group("audit")
def command() -> None:
    """Check a bill for hidden reasoning tokens (CoIn).

    The provider commits, the auditor asks, the provider proves, the auditor checks.
    """


_overwrite = overwrite_option()
_share = common.option("--share", type=common.Finite(1e-6, 1), default=0.1,
                       help="Of the blocks, two at least [0.1].")  # fmt: skip


def _say(envelope: common.Envelope, rows: list[list[Any]]) -> None:
    if not envelope.json:
        print(output.table(rows))
        envelope.note_artifacts()


@command.command("commit", context_settings=WIDE)
@click.argument("trace", metavar="TRACE", type=FILE)
@file_option("--receipt", required=True, help="For the auditor (.json).")
@file_option("--opening", required=True, help="To be kept by the provider (.safetensors).")
@common.option("--block", type=whole(1, 1 << 20), default=256, help="Tokens per block [256].")
@common.option(
    "--embedding-layer",
    type=whole(0, 4096),
    default=0,
    help="Vectors are means of states after this many layers; 0: of the tokens' embeddings [0].",
)
@_overwrite
@common.model_options
@common.output_options
def commit_command(
    trace: Path,
    receipt: Path,
    opening: Path,
    block: int,
    embedding_layer: int,
    overwrite: bool,
    model_args: common.ModelArgs,
) -> None:
    """Commit to a trace: a JSON object {"reasoning": "...", "answer": "..."}.

    \b
    steersman audit commit trace.json --receipt receipt.json --opening opening.safetensors
    steersman audit ask receipt.json --out challenge.json
    steersman audit prove opening.safetensors --challenge challenge.json --out proof.safetensors
    steersman audit check receipt.json --challenge challenge.json --proof proof.safetensors \\
        --answer answer.txt --heads coin.safetensors
    """  # fmt: skip
    with common.Envelope("audit commit") as envelope:
        envelope.inputs = {"trace": trace, "block": block, "embedding_layer": embedding_layer}
        refuse_existing(receipt, opening, overwrite=overwrite)
        require_safetensors("--opening", opening)
        from steersman.core.audit import Embedder, commit, files, fingerprints
        from steersman.core.audit.traces import parse_trace

        found = parse_trace(files.read_json(trace), str(trace))
        with common.load_model(model_args, envelope=envelope) as model:
            embedder = Embedder(model, embedding_layer)
            ids = model.tokenizer.encode(found.reasoning)
            prints = fingerprints(embedder, ids, block=block)
            answer_tokens = len(model.tokenizer.encode(found.answer))
            made = commit(
                prints, found.answer, answer_tokens=answer_tokens, embedder=embedder.facts
            )
        files.write_opening(opening, prints, made)
        files.write_json(receipt, made.as_dict())
        envelope.artifacts = {"receipt": receipt, "opening": opening}
        envelope.result = made.as_dict()
        _say(envelope, [["reasoning tokens", made.count], ["answer tokens", answer_tokens],
                        ["blocks", made.block_count], ["digest", made.digest.hex()]])  # fmt: skip


@command.command("ask", context_settings=WIDE)
@click.argument("receipt", metavar="RECEIPT", type=FILE)
@file_option("--out", required=True, help="The challenge (.json).")
@_share
@common.option("--tokens", type=whole(1, 1 << 20), default=16, help="Of each of these blocks [16].")
@common.option(
    "--round",
    "number",
    type=whole(1, 64),
    default=1,
    help="Each further round doubles both [1].",
)
@common.option(
    "--seed",
    type=whole(0, 2**64 - 1),
    help="Of the choice; who can guess it can cheat [drawn from the system].",
)
@_overwrite
@common.output_options
def ask_command(
    receipt: Path, out: Path, share: float, tokens: int, number: int, seed: int | None,
    overwrite: bool,
) -> None:  # fmt: skip
    """Draw the tokens that the provider of RECEIPT has to show, after it has committed."""
    with common.Envelope("audit ask") as envelope:
        envelope.inputs = {"receipt": receipt, "share": share, "tokens": tokens, "round": number}
        refuse_existing(out, overwrite=overwrite)
        from steersman.core.audit import ask, files

        held = files.read_receipt(receipt)
        challenge = ask(held, share=share, tokens=tokens, round=number, seed=seed)
        files.write_challenge(out, challenge)
        envelope.artifacts = {"challenge": out}
        envelope.result = {"tokens": len(challenge.indices)}
        _say(envelope, [["tokens asked for", f"{len(challenge.indices)} of {held.count}"]])


@command.command("prove", context_settings=WIDE)
@click.argument("opening", metavar="OPENING", type=FILE)
@file_option("--challenge", required=True)
@file_option("--out", required=True, help="The proof (.safetensors).")
@common.option(
    "--most",
    type=whole(1, 1 << 30),
    help="Refuse to show more tokens than this: vectors tell something of the text.",
)
@_overwrite
@common.output_options
def prove_command(
    opening: Path, challenge: Path, out: Path, most: int | None, overwrite: bool
) -> None:
    """Show the fingerprints that a challenge asks for, with their paths to the root."""
    with common.Envelope("audit prove") as envelope:
        envelope.inputs = {"opening": opening, "challenge": challenge}
        refuse_existing(out, overwrite=overwrite)
        require_safetensors("--out", out)
        from steersman.core.audit import files, prove

        prints, receipt = files.read_opening(opening)
        proof = prove(prints, receipt, files.read_challenge(challenge), most=most)
        files.write_proof(out, proof)
        envelope.artifacts = {"proof": out}
        envelope.result = {"tokens": len(proof.indices), "path": int(proof.siblings.shape[1])}
        _say(envelope, [["tokens shown", f"{len(proof.indices)} of {prints.count}"],
                        ["hashes per token", proof.siblings.shape[1]]])  # fmt: skip


@command.command("check", context_settings=WIDE)
@click.argument("receipt", metavar="RECEIPT", type=FILE)
@file_option("--challenge", required=True)
@file_option("--proof", required=True)
@file_option("--answer", required=True, help="The visible answer, as text, to the last byte.")
@file_option(
    "--heads",
    help="Made by steersman train coin [the number of tokens is checked alone].",
)
@common.model_options
@common.output_options
def check_command(
    receipt: Path,
    challenge: Path,
    proof: Path,
    answer: Path,
    heads: Path | None,
    model_args: common.ModelArgs,
) -> None:
    """Check a proof: that its tokens were committed to, and with --heads that they fit the answer.

    Ends with 0 if the trace passes, with 5 if it is rejected, with 7 if another round (audit ask
    --round) has to decide. That tokens were committed to does not show that a model wrote them;
    text on the topic of the answer can pass the heads.
    """  # fmt: skip
    with common.Envelope("audit check") as envelope:
        envelope.inputs = {"receipt": receipt, "proof": proof, "heads": heads}
        from steersman.core.audit import faults, files, read_heads, sampled_blocks
        from steersman.core.audit.protocol import repeated, repeated_runs

        held, asked = files.read_receipt(receipt), files.read_challenge(challenge)
        shown, said = files.read_proof(proof), common.read_text(answer)
        trained = None if heads is None else read_heads(heads)
        found = faults(held, asked, shown, said)
        result: dict[str, Any] = {"tokens": held.count, "faults": found, "outcome": "reject"}
        if not found:
            blocks = sampled_blocks(held, shown)
            result["repeated_blocks"] = [list(pair) for pair in repeated(blocks)]
            runs = repeated_runs(shown.indices, shown.leaves[:, held.width :])
            result["repeated_runs"] = runs
            result["outcome"] = "accept"
            if trained is not None:
                trained.check(held.embedder, where=str(heads))
                judged = trained.judge(blocks, _vector(said, held, model_args, envelope))
                result |= {"outcome": judged.outcome, "tokens_match": judged.tokens,
                           "answer_match": judged.answer, "honest": judged.honest}  # fmt: skip
            if result["repeated_blocks"]:
                envelope.warn("some blocks repeat others: " + ", ".join(
                    f"{a} and {b}" for a, b in repeated(blocks)[:10]))  # fmt: skip
        envelope.result = result
        envelope.exit_code = {"accept": 0, "reject": INVALID, "undecided": PARTIAL}[
            result["outcome"]
        ]
        rows: list[list[Any]] = [["outcome", result["outcome"]], ["tokens claimed", held.count],
                                 ["tokens shown", len(shown.indices)]]  # fmt: skip
        names = {"tokens_match": "tokens match their block", "answer_match":
                 "blocks match the answer", "honest": "looks honest"}  # fmt: skip
        rows += [
            [text, f"{result[k]:.3f}"] for k, text in names.items() if result.get(k) is not None
        ]
        if result.get("repeated_runs"):
            rows.append(["runs of 8 tokens seen before", f"{result['repeated_runs']:.1%}"])
        rows += [["fault", fault] for fault in found[:20]]
        _say(envelope, rows)


def _vector(
    answer: str, receipt: Any, model_args: common.ModelArgs, envelope: common.Envelope
) -> Any:
    from steersman.core.audit import Embedder

    with common.load_model(model_args, envelope=envelope) as model:
        embedder = Embedder(model, int(receipt.embedder.get("layer", 0)))
        for name, made in receipt.embedder.items():
            if embedder.facts.get(name) != made:
                raise UsageError(
                    f"the receipt's embedding has {name} {made!r}, {model.info.name} gives "
                    f"{embedder.facts.get(name)!r}; open the model that was agreed on"
                )
        return embedder.text(model.tokenizer.encode(answer))
