#!/usr/bin/env python3
"""Memory and time of the loss over a large vocabulary: all logits at once, in blocks, filtered.

One loss with gradients of the hidden states and of the head, each arm in a process of its own, so
that its peak is its own (Linux). Hidden states are SmolLM2's on this project's own pages.

    scripts/bench_cross_entropy.py --tokens 512 2048
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ARMS: dict[str, dict[str, Any]] = {
    "plain": {"implementation": "plain"},
    "blocks": {"implementation": "blocks"},
    "blocks, filtered": {"implementation": "blocks", "filter_eps": 2.0**-12, "sort_vocab": True},
}


def memory(field: str) -> float:
    """Return a line of this process's status, in MiB: ``VmRSS`` now, ``VmHWM`` at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) / 1024
    raise LookupError(field)


def measure(arm: str, tokens: int, threads: int) -> dict[str, float]:
    """Compute one loss and its gradients in this process."""
    import torch

    from steersman.backends.torch.linear_cross_entropy import linear_cross_entropy
    from steersman.core import load
    from steersman.core.model import Capability, Forward

    torch.set_num_threads(threads)
    with load("smollm2", backend="torch", threads=threads) as model:
        pages = sorted((Path(__file__).parent.parent / "docs").rglob("*.md"))
        text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
        ids = model.tokenizer.encode(text)[:tokens]
        last = model.info.layers
        with model.session(needs=Capability.HIDDEN) as session:
            out = session.forward(Forward(keep=0, tokens=[ids], logits="none", hidden=(last,)))
        hidden = model.norm(out.hidden[last])[0].clone().requires_grad_()
        head = model.embedding.detach().clone().requires_grad_()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = memory("VmRSS")
    begun = time.perf_counter()
    loss = linear_cross_entropy(hidden[None], head, torch.tensor([list(ids)]), shift=1, **ARMS[arm])
    loss.backward()
    seconds = time.perf_counter() - begun
    return {
        "loss": float(loss.detach()),
        "mib": memory("VmHWM") - before,
        "seconds": seconds,
        "slope": float(hidden.grad.norm()),
    }


def main() -> None:
    """Run each arm in a child process and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.arm:
        print(json.dumps(measure(args.arm, args.tokens[0], args.threads)))
        return
    print(
        "| tokens | loss computed | MiB more than before | seconds | loss | norm of the gradient |"
    )
    print("|---|---|---|---|---|---|")
    for tokens in args.tokens:
        for arm in ARMS:
            command = [sys.executable, __file__, "--arm", arm, "--tokens", str(tokens)]
            command += ["--threads", str(args.threads)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            print(
                f"| {tokens} | {arm} | {found['mib']:.0f} | {found['seconds']:.2f} | "
                f"{found['loss']:.6f} | {found['slope']:.6f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
