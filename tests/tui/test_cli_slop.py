"""``steersman slop profile``: from texts to a profile that bans what they over-use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli_runner import Runner

from steersman.core.profile import load_profile

TEXTS = [
    f"A testament to the {thing}, the tapestry of {thing} shimmered in the moonlight."
    for thing in ("river", "forest", "city", "ocean", "garden")
]
PLAIN = "\n\n".join(
    f"We went to the {thing} and saw the {thing} in the rain, then drove home tired."
    for thing in ("river", "forest", "city", "ocean", "garden")
)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(monkeypatch, tmp_path_factory.mktemp("home"))


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    texts, human = tmp_path / "texts.jsonl", tmp_path / "human.txt"
    texts.write_text("".join(json.dumps({"text": t, "error": None}) + "\n" for t in TEXTS))
    human.write_text(PLAIN)
    return texts, human


def test_profile_is_ready_to_use(cli: Runner, files: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    texts, human = files
    out = tmp_path / "bans.yaml"
    found = cli("slop", "profile", str(texts), "--human-text", str(human), "--out", str(out))
    assert found.code == 0, found.err
    assert "testament" in found.out
    assert (tmp_path / "bans.svg").read_text().startswith("<?xml")
    profile = load_profile(out)
    assert profile.strategy_name == "antislop"
    assert {"testament", "tapestry", "shimmered"} <= set(profile.strategy.phrases)
    assert profile.strategy.factor == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "bans.svg", "bans.yaml", "human.txt", "texts.jsonl",
    ]  # fmt: skip
    again = cli("slop", "profile", str(texts), "--human-text", str(human), "--out", str(out))
    assert again.code == 2
    assert "exists" in again.err


def test_json_and_what_is_left_alone(cli: Runner, files: tuple[Path, Path], tmp_path: Path) -> None:
    texts, human = files
    allow = tmp_path / "allow.txt"
    allow.write_text("Tapestry\n")
    found = cli(
        "slop", "profile", str(texts), "--human-text", str(human), "--allow", str(allow),
        "--ngrams", "1", "--words", "2", "--json",
    )  # fmt: skip
    result = found.json["result"]
    assert "tapestry" not in {entry["text"] for entry in result["words"]}
    assert len(result["banned"]["ngrams"]) == 1
    assert result["texts"] == 5


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "name some files"),
        (["none.jsonl", "--human-text", "HUMAN"], 4, "none.jsonl: no such file"),
        (["TEXTS", "--human", "HUMAN", "--human-text", "HUMAN"], 2, "not together"),
        (["TEXTS", "--human", "TEXTS"], 5, "not a JSON file"),
        (["TEXTS", "--human-text", "HUMAN", "--plot", "x.gif"], 2, "must end in .png"),
    ],
)
def test_one_line_for_what_is_wrong(
    cli: Runner, files: tuple[Path, Path], arguments: list[str], code: int, said: str
) -> None:
    names = {"TEXTS": str(files[0]), "HUMAN": str(files[1])}
    found = cli("slop", "profile", *(names.get(a, a) for a in arguments))
    assert found.code == code, found.err
    assert said in found.err
    assert len(found.err.strip().splitlines()) == 1
