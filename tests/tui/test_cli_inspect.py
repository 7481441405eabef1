"""The commands that look: score, models, doctor, profiles, paths, prompt, completion."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runner import Runner, scripted
from toys import ToyTransformer

from steersman.tui import environment


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Runner:
    runner = Runner(monkeypatch, tmp_path)
    runner.use(lambda: scripted([b"one", b" two"]))
    return runner


# -- score ----------------------------------------------------------------------------------


def oracle(model: ToyTransformer, ids: list[int]) -> list[float]:
    """Log-probability of each token but the first, from a call per prefix."""
    from steersman.core.model import Forward

    found = []
    for end in range(1, len(ids)):
        with model.session() as session:
            logits = np.asarray(session.forward(Forward(keep=0, tokens=[ids[:end]])).logits)[0]
        shifted = logits - logits.max()
        found.append(float(shifted[ids[end]] - np.log(np.exp(shifted).sum())))
    return found


def test_score_is_the_models_own_probability(run: Runner) -> None:
    run.use(lambda: ToyTransformer(context=64))
    (run.home / "t.txt").write_bytes("naïve the ing\n".encode())
    done = run("score", "t.txt", "--json")
    assert done.code == 0, done.err
    result = done.json["result"]
    expected = oracle(ToyTransformer(context=64), result["token_ids"])
    assert result["logprobs"][0] is None
    assert result["logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    assert result["nll"] == pytest.approx(-sum(expected), abs=1e-3)
    assert result["perplexity"] == pytest.approx(math.exp(result["nll"] / len(expected)))
    scored_bytes = result["bytes"] - len(result["token_bytes"][0])
    assert result["bits_per_byte"] == pytest.approx(result["nll"] / math.log(2) / scored_bytes)
    assert b"".join(map(bytes, result["token_bytes"])) == (run.home / "t.txt").read_bytes()
    assert result["windows"] == 1 and result["stride"] is None
    table = run("score", "t.txt").out
    assert len(table.splitlines()) == len(result["token_ids"]) + 8
    assert "perplexity" in table and "nats" in table
    assert "logprob" not in run("score", "t.txt", "--summary").out


def test_score_of_a_long_text_scores_every_token_once(run: Runner) -> None:
    run.use(lambda: ToyTransformer(context=32))
    text = "abcdefgh " * 12
    whole = run("score", "-", "--json", stdin=text).json["result"]
    assert whole["windows"] > 1 and whole["stride"] == 16
    assert whole["scored"] == whole["num_tokens"] - 1 == len(whole["token_ids"]) - 1
    for flag in ("4", "31"):
        done = run("score", "-", "--stride", flag, "--json", stdin=text)
        result = done.json["result"]
        assert result["stride"] == int(flag) and result["scored"] == whole["scored"]
        assert result["windows"] == 1 + math.ceil((whole["num_tokens"] - 32) / int(flag))
    assert run("score", "-", "--stride", "32", stdin=text).code == 2
    assert run("score", "-", stdin="").code == 5


# -- models, doctor, paths ------------------------------------------------------------------


def test_models(run: Runner) -> None:
    done = run("models", "--json")
    by_name = {m["name"]: m for m in done.json["result"]}
    assert by_name["smollm2"]["origin"] == "known" and by_name["smollm2"]["licence"]
    assert "smollm2" in run("models").out
    installed = run("models", "--installed", "--json").json["result"]
    assert all(m["installed"] for m in installed)


def test_doctor_says_what_is_missing_and_how_to_get_it(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines = [
        environment.Engine(name="llamacpp", missing=("llama_cpp",), install="pip install A"),
        environment.Engine(name="torch", missing=("torch",), install="pip install B"),
    ]
    monkeypatch.setattr(environment, "engines", lambda: iter(engines))
    done = run("doctor", "--json")
    got = done.json
    assert done.code == 3 == got["exit_code"]
    assert got["errors"][0]["message"] == "no engine works; run: pip install A"
    assert got["result"]["engines"]["torch"]["install"] == "pip install B"
    text = run("doctor").out
    assert "pip install A" in text and "pip install B" in text


def test_doctor_is_content_with_one_engine_and_warns_of_a_broken_one(
    run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices(name: str) -> list[str]:
        if name == "torch":
            raise OSError("libcudart.so: cannot open")
        return ["cpu"]

    engines = [
        environment.Engine(name=n, missing=(), install=f"pip install {n}", versions={n: "1.0"})
        for n in ("llamacpp", "torch")
    ]
    monkeypatch.setattr(environment, "engines", lambda: iter(engines))
    monkeypatch.setattr(environment, "devices", devices)
    monkeypatch.setattr(environment, "version_of", lambda name: "99.0")
    (run.home / "config" / "profiles").mkdir(parents=True)
    (run.home / "config" / "profiles" / "bad.yaml").write_text("x: 1\n")
    done = run("doctor")
    assert done.code == 0, done.err
    assert "libcudart.so" in done.err and "reinstall with: pip install torch" in done.err
    assert "bad.yaml:1: x: unknown key" in done.err
    monkeypatch.setattr(environment, "devices", lambda name: devices("torch"))
    assert run("doctor").code == 3
    assert run("doctor", "--no-devices").code == 0


@pytest.mark.parametrize(
    ("package", "version", "bad"),
    [
        ("llama-cpp-python", "0.2.71", "CVE-2024-34359"),
        ("llama-cpp-python", "0.3.9", "GGUF"),
        ("llama-cpp-python", "0.3.36", None),
        ("llama-cpp-python", "0.3.100+cu124", None),
        ("jinja2", "3.1.5", "CVE-2025-27516"),
        ("jinja2", "3.1.6", None),
        ("jinja2", "3.2", None),
        ("torch", "2.5.1+cpu", "CVE-2025-32434"),
        ("torch", "2.13.0+cpu", None),
    ],
)
def test_versions_known_to_be_bad(
    package: str, version: str, bad: str | None, run: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "version_of", lambda n: version if n == package else None)
    found = environment.known_problems()
    assert [bad in entry.why for _, _, entry in found] == ([True] if bad else [])
    done = run("doctor", "--no-devices", "--json")
    messages = [e["message"] for e in done.json["errors"]]
    assert any(f"{package} {version}: " in m and "pip install" in m for m in messages) == bool(bad)


def test_paths(run: Runner) -> None:
    result = run("paths", "--json").json["result"]
    assert result["config"]["path"] == str(run.home / "config")
    assert result["profiles (built-in)"]["exists"] is True
    run.patch.setenv("HF_HOME", "/somewhere")
    run.patch.delenv("HF_HUB_CACHE", raising=False)
    assert run("paths", "--json").json["result"]["hub cache"]["path"] == "/somewhere/hub"
    assert str(run.home) in run("paths").out


# -- prompt ---------------------------------------------------------------------------------


def test_prompt_show(run: Runner) -> None:
    done = run("prompt", "show", "-p", "ab", "-s", "S", "--json")
    assert done.code == 0, done.err
    result = done.json["result"]
    expected = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nab<|im_end|>\n"
    assert result["text"] == expected + "<|im_start|>assistant\n"
    special = [t["token"] for t in result["tokens"] if t["special"]]
    assert special == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]
    raw = run("prompt", "show", "-p", "<eos>", "--json").json["result"]
    assert raw["text"] == "<eos>" and not any(t["special"] for t in raw["tokens"])
    shown = run("prompt", "show", "-", "--chat", stdin="ab\n").out
    assert "<|im_start|>user\nab<|im_end|>" in shown and "control" in shown
    assert run("prompt", "show").code == 2


# -- profiles -------------------------------------------------------------------------------


def test_profiles_new_path_show_validate_diff(run: Runner) -> None:
    made = run("profiles", "new", "mine", "--from", "greedy")
    path = run.home / "config" / "profiles" / "mine.yaml"
    assert made.out.strip() == str(path) and path.exists()
    assert run("profiles", "new", "mine").code == 5
    assert run("profiles", "path", "mine").out.strip() == str(path)
    assert run("profiles", "path").out.strip() == str(path.parent)
    assert run("profiles", "show", "mine").out == path.read_text()
    assert run("profiles", "diff", "mine", "greedy").out == "no difference\n"
    path.write_text("logits: [{temperature: {t: 0.3}}, {top_k: {k: 5}}]\n")
    differences = {
        d["key"]: (d["first"], d["second"])
        for d in run("profiles", "diff", "mine", "greedy", "--json").json["result"]["differences"]
    }
    assert differences["temperature.t"] == (0.3, 0.0) and differences["top_k.k"] == (5, None)
    assert differences["logits"] == ("temperature, top_k", "temperature")
    effective = run("profiles", "show", "mine", "-o", "top_k.k=9").out
    rows = {line.split()[0]: line.split()[1:] for line in effective.splitlines()}
    assert rows["logits.0.temperature.t"] == ["0.3", f"{path}:1"]
    assert rows["logits.1.top_k.k"] == ["9", "flag"]
    assert "mine" in run("profiles", "list").out
    assert run("profiles", "validate").code == 0
    path.write_text("logitz: []\n")
    bad = run("profiles", "validate", "mine", "greedy", "--json")
    assert bad.code == 5 and list(bad.json["validation"]["invalid"]) == ["mine"]
    assert bad.json["validation"]["valid"] == ["greedy"]
    assert run("profiles", "validate", "nowhere").code == 4


# -- completion -----------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, run: Runner) -> None:
    script = run("completion", shell).out
    assert "_STEERSMAN_COMPLETE" in script
    assert run("completion", shell, "--json").json["result"]["install"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("pro", ["plain,profiles", "plain,prompt"]),
        ("generate --profile dol", ["plain,dola"]),
        ("generate --profile ./my", ["file,./my"]),
        ("check --profile min", ["plain,mine"]),
        ("generate --backend t", ["plain,torch"]),
        ("rerank --adapter ran", ["plain,ranker"]),
        ("rerank --adapter out/", ["dir,out/"]),
        ("generate --model no-such", ["file,no-such"]),
    ],
)
def test_completion_completes(words: str, offered: list[str], tmp_path: Path) -> None:
    config = tmp_path / "config"
    (config / "adapters" / "ranker").mkdir(parents=True)
    (config / "adapters" / "ranker" / "adapter_config.json").write_text("{}")
    (config / "profiles").mkdir()
    (config / "profiles" / "mine.yaml").write_text("strategy: {sample: {}}\n")
    (config / "profiles" / "mine;x.yaml").write_text("strategy: {sample: {}}\n")
    code = "import sys; from steersman.tui.cli import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"_STEERSMAN_COMPLETE": "bash_complete", "COMP_WORDS": f"steersman {words}",
             "COMP_CWORD": str(len(words.split())), "PATH": "/usr/bin:/bin",
             "STEERSMAN_HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.split() == offered, done.stderr


def test_envelopes_have_one_shape(run: Runner) -> None:
    (run.home / "t.txt").write_text("one two")
    shapes = set()
    for args in (
        ["generate", "-p", "x"], ["score", "t.txt"], ["models"], ["doctor", "--no-devices"],
        ["paths"], ["profiles", "list"], ["profiles", "validate"], ["prompt", "show", "-p", "x"],
        ["completion", "bash"],
    ):  # fmt: skip
        done = run(*args, "--output", "json")
        got = json.loads(done.out)
        assert done.out.count("\n") == 1 and got["status"] == "ok", args
        assert " ".join(args).startswith(got["command"])
        shapes.add(tuple(got))
    assert len(shapes) == 1
