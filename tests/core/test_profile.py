"""Profiles: errors that name the place, effective values, overrides, and the folders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from steersman.core import strict_yaml
from steersman.core.decode import STRATEGIES, Sample
from steersman.core.errors import InvalidInput, MissingFile, ProfileError, UsageError
from steersman.core.logits import STAGES, Chain
from steersman.core.model import Capability
from steersman.core.parameters import Mismatch, convert, parameters
from steersman.core.profile import (
    Profile,
    find_profile,
    list_profiles,
    load_profile,
    new_profile,
    parse_value,
)
from steersman.core.profile_build import from_document

# A foreign function, which only Python can give.
BUILT_BY_NAME = sorted(set(STAGES) - {"processor"}, key=lambda s: (s == "mirostat", s))

GOOD = """\
description: >
  Two lines
  of text.
references: [arXiv:1]
logits:
  - temperature: {t: 0.8}
  - min_p: {p: 1e-1}
  - top_k
strategy:
  beam: {beams: 3}
generation: {max_tokens: 64, stop: ["###", "\\n\\n"]}
models:
  target: {model: smollm2, backend: torch, context: 512}
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEERSMAN_HOME", str(tmp_path))
    return tmp_path


def read(text: str) -> Profile:
    return from_document(strict_yaml.parse(text, source="x.yaml"), name="x")


def test_everything_a_profile_can_say() -> None:
    profile = read(GOOD)
    assert profile.description == "Two lines of text."
    assert [s.name for s in profile.stages] == ["temperature", "min_p", "top_k"]
    assert (profile.stages[0].t, profile.stages[1].p) == (0.8, 0.1)
    assert profile.stages[2] == STAGES["top_k"]()
    assert profile.strategy_name == "beam" and profile.strategy.beams == 3
    assert profile.strategy.chain.stages == profile.stages
    assert profile.max_tokens == 64 and profile.stop == ("###", "\n\n")
    assert profile.models == {"target": {"model": "smollm2", "backend": "torch", "context": 512}}
    origin = {s.key: s.origin for s in profile.settings()}
    assert origin["logits.1.min_p.p"] == "x.yaml:7"
    assert origin["logits.2.top_k.k"] == "default"
    assert origin["strategy.beam.beams"] == "x.yaml:10"
    assert origin["strategy.beam.length_penalty"] == "default"
    assert origin["generation.max_tokens"] == "x.yaml:11"


def test_least_profile_samples_the_model_as_it_is() -> None:
    profile = read("description: nothing")
    assert profile.strategy_name == "sample" and profile.stages == ()
    assert profile.max_tokens is None and profile.stop == ()


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_yaml_round_trip_of_every_strategy_and_stage(name: str) -> None:
    profile = read(f"strategy: {name}")
    for stage in BUILT_BY_NAME:
        profile = profile.override({stage: True})
    again = read(profile.to_yaml())
    assert again.stages == profile.stages and again.strategy == profile.strategy
    assert again.fingerprint == profile.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("logitz: []", r"x.yaml:1: logitz: unknown key, did you mean 'logits'\?"),
        (
            "logits:\n  - temperature: {t: 1}\n  - min_p:\n      q: 0.1",
            r"x.yaml:4: logits.1.min_p.q: unknown key(, did you mean|; known:) '?p",
        ),
        ("logits:\n  - min_pp: {}", r"x.yaml:2: logits.0.min_pp: unknown stage, did you mean"),
        ("logits: {min_p: {p: 1}}", r"x.yaml:1: logits: must be a list of stages"),
        ("logits:\n  - {min_p: {}, top_k: {}}", r"x.yaml:2: logits.0: must be one stage"),
        ("logits: [processor]", r"x.yaml:1: logits.0.processor: needs function"),
        ("logits: [{processor: {function: os.system}}]", r"function: cannot be set in a profile"),
        ("logits: [5]", r"x.yaml:1: logits.0: must be one stage"),
        ("logits:\n  - min_p: 0.1", r"x.yaml:2: logits.0.min_p: must hold parameters"),
        ("logits: [{min_p: {p: '0.1'}}]", r":1: logits.0.min_p.p: expected a number, got '0.1'"),
        ("logits: [{min_p: {p: yes}}]", r"min_p.p: expected a number, got true \(text needs"),
        ("logits: [{min_p: {p: .inf}}]", r"min_p.p: expected a finite number"),
        ("logits: [{min_p: {p: 2}}]", r"x.yaml:1: logits.0.min_p.p: p must be in \[0, 1\], got 2"),
        ("logits: [{top_k: {k: 1.5}}]", r"top_k.k: expected a whole number, got 1.5"),
        ("strategy: beem", r"x.yaml:1: strategy.beem: unknown, did you mean 'beam'"),
        ("\nstrategy: {beam: {beam: 4}}", r"x.yaml:2: strategy.beam.beam: .*did you mean 'beams'"),
        ("strategy: {beam: {chain: []}}", r"strategy.beam.chain: unknown key"),
        ("strategy: {beam: {beams: 0}}", r"strategy.beam.beams: beams must be in 1..128, got 0"),
        ("strategy: {best_of_n: {by: x}}", r"best_of_n.by: expected one of 'mean_logprob'"),
        ("generation: {max_token: 4}", r"generation.max_token: .*did you mean 'max_tokens'"),
        ("generation: {max_tokens: -1}", r"x.yaml:1: generation: max_tokens must be at least 0"),
        ("generation: {stop: [no]}", r"generation.stop: item 1: expected text, got false"),
        ("generation: {stop: ['']}", r"stop: a text must not be empty"),
        ("models: {taget: {}}", r"models.taget: unknown key, did you mean 'target'"),
        ("models: {target: {template: x}}", r"models.target.template: unknown key; known"),
        ("models: {target: {context: big}}", r"models.target.context: expected a whole number"),
        ("logits: [{mirostat: {}}, {min_p: {}}]", r"x.yaml:1: logits: .*mirostat must be the last"),
        ("- a", r"x.yaml:1: must hold keys"),
        ("", r"x.yaml:1: must hold keys"),
        ("description: [a]", r"x.yaml:1: description: expected text"),
    ],
)  # fmt: skip
def test_mistakes_name_line_key_and_remedy(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        read(text)
    assert "\n" not in str(caught.value)


# -- overrides ------------------------------------------------------------------------------


def values(profile: Profile) -> dict[str, Any]:
    return {s.key: s.value for s in profile.settings()}


def test_override_of_what_is_there() -> None:
    profile = read(GOOD)
    changed = profile.override(
        {
            "temperature.t": 0,
            "logits.1.p": 0.2,
            "logits.2.top_k.k": 7,
            "beam.beams": 5,
            "strategy.length_penalty": 0.5,
            "max_tokens": None,
            "generation.stop": "END",
        },
        origin="-o",
    )
    now = values(changed)
    assert now["logits.0.temperature.t"] == 0.0
    assert now["logits.1.min_p.p"] == 0.2 and now["logits.2.top_k.k"] == 7
    assert now["strategy.beam.beams"] == 5 and now["strategy.beam.length_penalty"] == 0.5
    assert changed.max_tokens is None and changed.stop == ("END",)
    assert changed.strategy.chain.stages == changed.stages
    assert {s.origin for s in changed.settings() if s.key == "logits.0.temperature.t"} == {"-o"}
    assert profile == read(GOOD)  # the original is untouched


def test_override_adds_and_removes_stages_with_their_origins() -> None:
    profile = read("logits: [{penalties: {repetition: 1.1}}, {temperature: {t: 0.7}}]")
    more = profile.override({"min_p.p": 0.1, "top_k": True}, origin="flag")
    assert [s.name for s in more.stages] == ["penalties", "top_k", "min_p", "temperature"]
    origin = {s.key: s.origin for s in more.settings()}
    assert origin["logits.2.min_p.p"] == "flag"
    assert origin["logits.3.temperature.t"] == "x.yaml:1"  # moved along with its stage
    less = more.override({"penalties": False, "top_k": False})
    assert [s.name for s in less.stages] == ["min_p", "temperature"]
    origin = {s.key: s.origin for s in less.settings()}
    assert origin["logits.0.min_p.p"] == "flag" and origin["logits.1.temperature.t"] == "x.yaml:1"
    assert less.override({"top_k": False}) == less


def test_override_switches_the_strategy_and_keeps_the_chain() -> None:
    profile = read(GOOD).override({"strategy": "best_of_n", "best_of_n.n": 2})
    assert profile.strategy == STRATEGIES["best_of_n"](n=2, chain=profile.strategy.chain)
    assert [s.name for s in profile.strategy.chain.stages] == ["temperature", "min_p", "top_k"]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("temprature.t", 1, "-o temprature.t: unknown key, did you mean 'temperature'"),
        ("temperature.tt", 1, "-o temperature.tt: unknown parameter 'tt'"),
        ("temperature.t", "hot", "expected a number, got 'hot'"),
        ("temperature.t", -1, "t must be in"),
        ("temperature", 0.5, "write on or off, or one of temperature.t"),
        ("contrastive.k", 2, "choose the other first: strategy=contrastive"),
        ("strategy", "beems", "unknown, did you mean 'beam'"),
        ("strategy", 3, "expected the name of a strategy"),
        ("beam.width", 3, "unknown parameter 'width'"),
        ("beam.chain", [], "unknown parameter 'chain'"),
        ("logits.9.p", 1, "no such stage; the chain has 3: 0 temperature, 1 min_p, 2 top_k"),
        ("logits.x.p", 1, "no such stage"),
        ("generation.stops", "x", "unknown key, did you mean 'stop'"),
        ("generation.stop", [""], "must not be empty"),
        ("max_tokens", -3, "at least 0"),
    ],
)
def test_override_mistakes(key: str, value: Any, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(GOOD).override({key: value}, origin="-o")
    assert message in str(caught.value)


def test_a_stage_that_occurs_twice_must_be_named_by_its_place() -> None:
    profile = read("logits: [{temperature: {t: 0.5}}, {min_p: {}}, {temperature: {t: 2.0}}]")
    with pytest.raises(UsageError, match=r"write logits\.0\.t or logits\.2\.t"):
        profile.override({"temperature.t": 1})
    assert profile.override({"logits.2.t": 3}).stages[2].t == 3.0


def test_strategy_without_a_chain_refuses_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Plain:
        """Takes no chain."""

        depth: int = 2
        requires: Mapping[str, Any] = dataclasses.field(
            default_factory=dict, metadata={"hidden": True}
        )

    monkeypatch.setitem(STRATEGIES, "plain", Plain)  # type: ignore[arg-type]
    assert read("strategy: {plain: {depth: 3}}").strategy == Plain(depth=3)
    with pytest.raises(ProfileError, match=r"logits: strategy 'plain' takes no logits chain"):
        read("logits: [min_p]\nstrategy: plain")
    with pytest.raises(UsageError, match="takes no logits chain"):
        read("strategy: plain").override({"min_p.p": 0.1})
    with pytest.raises(UsageError, match="takes no logits chain, and the profile has one"):
        read("logits: [min_p]").override({"strategy": "plain"})


def test_fingerprint_follows_what_changes_a_text() -> None:
    profile = read(GOOD)
    assert profile.fingerprint == read(GOOD.replace("Two", "Three")).fingerprint
    assert profile.fingerprint != profile.override({"temperature.t": 0.9}).fingerprint
    assert profile.fingerprint != profile.override({"stop": "x"}).fingerprint


# -- folders --------------------------------------------------------------------------------


def test_user_folder_comes_first(home: Path) -> None:
    folder = home / "config" / "profiles"
    folder.mkdir(parents=True)
    (folder / "greedy.yaml").write_text("description: mine\n")
    (folder / "broken.yaml").write_text("descriptoin: x\n")
    (folder / "-bad name.yaml").write_text("description: hidden\n")
    assert load_profile("greedy").description == "mine"
    listed = {e.name: e for e in list_profiles()}
    assert listed["greedy"].origin == "user" and listed["greedy"].shadows
    assert listed["balanced"].origin == "built-in" and not listed["balanced"].shadows
    assert "unknown key, did you mean 'description'" in (listed["broken"].error or "")
    assert "-bad name" not in listed


def test_names_and_paths(home: Path) -> None:
    with pytest.raises(MissingFile, match="'greddy': not found, did you mean 'greedy'"):
        load_profile("greddy")
    for outside in ("../greedy", "/etc/passwd", "a/b", "x.yaml"):
        with pytest.raises(MissingFile, match=r"no such file|ends in \.yaml"):
            find_profile(outside)
    path = home / "mine.yaml"
    path.write_text("logits: [{top_p: {p: 0.5}}]\n")
    assert load_profile(path).stages[0].p == 0.5
    assert load_profile(str(path)).name == "mine"


def test_new_copies_with_comments_and_never_replaces(home: Path) -> None:
    path = new_profile("mine", template="greedy")
    assert path == home / "config" / "profiles" / "mine.yaml"
    assert path.read_bytes() == find_profile("greedy").read_bytes()
    path.write_text("description: edited\n")
    with pytest.raises(InvalidInput, match="exists already"):
        new_profile("mine")
    assert path.read_text() == "description: edited\n"
    assert [p.name for p in path.parent.iterdir()] == ["mine.yaml"]  # nothing left behind
    for bad in ("", "../x", "a b", ".x", "x/y", "\x1b[2J", "x" * 101):
        with pytest.raises(UsageError, match="a name has letters"):
            new_profile(bad)
    with pytest.raises(MissingFile):
        new_profile("other", template="nowhere")


# -- types ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, float, 3.0),
        (3, int | float, 3),
        (True, bool | int, True),
        (None, int | None, None),
        (["a"], tuple[str, ...], ("a",)),
        ([1, "a"], tuple[int, str], (1, "a")),
        ([1], list[int], [1]),
        (["b", "a"], frozenset[str], frozenset("ab")),
        ({"5": float("-inf")}, Mapping[int, float], {5: float("-inf")}),
        ({"5": 1, "x": 2}, Mapping[int | str, float], {5: 1.0, "x": 2.0}),
        ("low", Literal["low", "high"] | tuple[int, ...], "low"),
        ([1, 2], Literal["low", "high"] | tuple[int, ...], (1, 2)),
        ({"a": [1]}, Mapping[str, tuple[float, ...]], {"a": (1.0,)}),
        ("anything", Any, "anything"),
    ],
)
def test_values_become_their_types(value: Any, hint: Any, expected: Any) -> None:
    got = convert(value, hint)
    assert got == expected and type(got) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint", "message"),
    [
        (True, int, "expected a whole number, got true"),
        (1, bool, "expected true or false, got 1"),
        (10**400, float, "too large"),
        ("x", int | None, "expected a whole number, got 'x'"),
        ("mid", Literal["low", "high"] | tuple[int, ...], "expected 'low' or 'high' or a list"),
        (["a", 1], tuple[str, ...], "item 2: expected text"),
        ([1], tuple[int, int], "expected 2 values, got 1"),
        ("ab", tuple[str, ...], "expected a list, got 'ab'"),
        ({"x": 1}, Mapping[int, float], "x: expected a whole number as key"),
        ({"1": "a"}, Mapping[int, float], "1: expected a number"),
        ([], Mapping[int, float], "expected names and values"),
        ("x", Path, "cannot be set in a profile"),
        ("x" * 500, int, "..."),
    ],
)
def test_values_that_do_not_fit(value: Any, hint: Any, message: str) -> None:
    with pytest.raises(Mismatch) as caught:
        convert(value, hint)
    assert message in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "cls", [*(STAGES[n] for n in BUILT_BY_NAME), *STRATEGIES.values()], ids=lambda c: c.__name__
)
def test_every_registered_parameter_has_a_type_that_profiles_can_fill(cls: type[Any]) -> None:
    thing = cls()
    for name, hint in parameters(cls).items():
        value = getattr(thing, name)
        plain = list(value) if isinstance(value, tuple) else value
        assert convert(plain, hint) == value, name


def test_command_line_values() -> None:
    assert parse_value("0.5") == 0.5 and parse_value("[2, 4]") == [2, 4]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wrapper:
    """A strategy around another one."""

    inner: Any = dataclasses.field(default_factory=Sample, metadata={"strategy": True})
    chain: Chain = dataclasses.field(default_factory=Chain)

    requires: ClassVar[Mapping[str, Capability]] = {"target": Capability.LAST_LOGITS}
    max_rows: ClassVar[int] = 1


def test_a_strategy_inside_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STRATEGIES, "wrapper", Wrapper)  # type: ignore[arg-type]
    path = tmp_path / "nested.yaml"
    path.write_text(
        "logits: [{temperature: {t: 0.5}}]\nstrategy: {wrapper: {inner: {best_of_n: {n: 3}}}}\n"
    )
    profile = load_profile(path)
    assert profile.strategy.inner.n == 3
    assert profile.strategy.inner.chain == profile.strategy.chain == Chain(profile.stages)
    again = tmp_path / "again.yaml"
    again.write_text(profile.to_yaml())
    assert load_profile(again).strategy == profile.strategy

    changed = profile.override({"wrapper.inner.n": 5, "temperature.t": 0.7})
    assert changed.strategy.inner.n == 5
    assert changed.strategy.inner.chain.stages[0].t == 0.7
    assert isinstance(profile.override({"wrapper.inner": "sample"}).strategy.inner, Sample)
    with pytest.raises(UsageError, match="unknown parameter 'm'"):
        profile.override({"wrapper.inner.m": 5})

    path.write_text("strategy: {wrapper: {inner: {best_of_n: {m: 3}}}}\n")
    with pytest.raises(ProfileError, match=r"inner.best_of_n.m: unknown key"):
        load_profile(path)
