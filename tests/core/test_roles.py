"""Roles: which models a profile opens, what they share, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from role_toys import PROFILE, Openings, mean_law, registered
from toys import TableModel, enumerate_texts

from steersman.core import generate, load_profile, load_roles
from steersman.core.decode.sessions import Sessions
from steersman.core.errors import (
    Cancelled,
    CapabilityError,
    MissingFile,
    ProfileError,
    UsageError,
)
from steersman.core.model import Capability
from steersman.core.profile import Profile
from steersman.core.roles import Roles, check_roles, opened_as, overlaid, role_options


@pytest.fixture(autouse=True)
def mean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with registered(monkeypatch):
        yield


def profile(tmp_path: Path, models: str = "", body: str = PROFILE) -> Profile:
    path = tmp_path / "mean.yaml"
    path.write_text(f"{body}{models}", encoding="utf-8")
    return load_profile(str(path))


TARGET = {"model": "big", "backend": "torch", "threads": 2, "dtype": "float32", "context": 64}


# -- what is opened for a role ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # nothing: the target's own
        ("{}", TARGET),
        # the same weights with some layers: everything else as for the target
        ('{layers: "0-1,4"}', {**TARGET, "layers": "0-1,4"}),
        ("{layers: 3, dtype: bfloat16}", {**TARGET, "layers": 3, "dtype": "bfloat16"}),
        # another model on the same engine: not the target's context
        (
            "{model: small}",
            {"model": "small", "backend": "torch", "threads": 2, "dtype": "float32"},
        ),
        # another engine: its number format is its own
        (
            "{model: small, backend: llamacpp}",
            {"model": "small", "backend": "llamacpp", "threads": 2},
        ),
        (
            "{backend: mlx, threads: 1}",
            {"model": "big", "backend": "mlx", "threads": 1, "context": 64},
        ),
    ],
)
def test_a_role_is_as_the_target_unless_the_profile_says_otherwise(
    said: str, expected: dict[str, Any], tmp_path: Path
) -> None:
    found = role_options(profile(tmp_path, f"models: {{draft: {said}}}"), TARGET)
    assert found == {"target": TARGET, "draft": expected}


def test_what_is_given_is_stronger_and_another_model_has_other_layers(tmp_path: Path) -> None:
    loaded = profile(tmp_path, 'models: {draft: {layers: "0-1", threads: 1}}')
    found = role_options(loaded, TARGET, {"draft": {"model": "small"}})["draft"]
    assert found["model"] == "small" and found["threads"] == 1 and "layers" not in found
    found = role_options(loaded, TARGET, {"draft": {"layers": "2-3"}})["draft"]
    assert found["model"] == "big" and found["layers"] == "2-3" and found["threads"] == 1
    assert overlaid({"model": "a", "layers": 3}, {"model": "a"}) == {"model": "a", "layers": 3}


def test_a_role_without_a_model_names_key_and_flag(tmp_path: Path) -> None:
    loaded = profile(tmp_path)
    with pytest.raises(CapabilityError, match=r"'draft'.*--draft-model NAME.*models\.draft"):
        role_options(loaded, TARGET)
    other = loaded.override({"mean.role": "second"})
    with pytest.raises(CapabilityError, match=r"--model-for second=NAME.*models\.second"):
        role_options(other, TARGET)
    with pytest.raises(CapabilityError, match="--draft-model"):
        Sessions(TableModel()).prepare(loaded.strategy, name="mean")


def test_unknown_roles_name_the_known_ones(tmp_path: Path) -> None:
    loaded = profile(tmp_path)
    with pytest.raises(UsageError, match=r"--model-for draftt: strategy mean has the roles "
                       r"target, draft, did you mean 'draft'"):  # fmt: skip
        check_roles(["draftt"], loaded, said="--model-for", all_known=True)
    plain = load_profile("greedy")
    with pytest.raises(UsageError, match="strategy sample has no role but target"):
        check_roles(["draft"], plain, said="--model-for", all_known=False)
    check_roles(["draft"], plain, said="--model-for", all_known=True)  # mean has it


def test_profiles_refuse_bad_layers_and_roles(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"mean\.yaml:4.*models\.draft\.layers.*rising range"):
        profile(tmp_path, 'models: {draft: {layers: "4-1"}}')
    with pytest.raises(ProfileError, match="did you mean 'draft'"):
        profile(tmp_path, "models: {drafft: {layers: 2}}")
    kept = profile(tmp_path, "models: {draft: {layers: [0, 2], setting: fast}}").models["draft"]
    assert kept == {"layers": (0, 2), "setting": "fast"}


def test_sameness_is_of_files_engine_and_options(tmp_path: Path) -> None:
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"GGUF" + bytes(40))
    same = {"model": str(gguf), "backend": "llamacpp"}
    assert opened_as(same) == opened_as({**same, "dtype": "auto", "context": None})
    assert opened_as(same) == opened_as({**same, "model": f"{tmp_path}/./m.gguf"})
    assert opened_as({**same, "layers": 2}) == opened_as({**same, "layers": "0-1"})
    for other in ({"layers": 2}, {"context": 9}, {"backend": "torch"}):
        assert opened_as(same) != opened_as({**same, **other})


# -- opening, sharing, freeing --------------------------------------------------------------------


def wanted(loaded: Profile, **target: Any) -> dict[str, dict[str, Any]]:
    return role_options(loaded, {"model": "big", **target})


def test_the_same_weights_are_opened_once(tmp_path: Path) -> None:
    openings = Openings()
    with load_roles(
        profile(tmp_path, "models: {draft: {}}"), model="big", opener=openings
    ) as roles:
        assert roles["draft"] is roles["target"] is roles.target
        assert openings.names == ["big"]
    assert openings.open == []


def test_an_open_target_stays_the_callers(tmp_path: Path) -> None:
    openings = Openings()
    target = openings(model="big", backend="torch")
    loaded = profile(tmp_path, "models: {draft: {layers: 1}}")
    with load_roles(loaded, target, opener=openings) as roles:
        assert roles.target is target
        assert openings.asked[-1] == {"model": "big", "backend": "torch", "layers": 1}
        assert openings.names == ["big", "big layers 1"]
    assert openings.open == [target]
    with pytest.raises(UsageError, match="threads: not with an open target"):
        load_roles(loaded, target, opener=openings, threads=2)
    with pytest.raises(UsageError, match="was not opened by load"):
        load_roles(loaded, TableModel(), opener=openings)


def test_layers_of_an_open_model_share_its_weights(tmp_path: Path) -> None:
    class Sharing(TableModel):
        def with_layers(self, layers: Any) -> TableModel:
            self.taken = layers
            return TableModel(seed=2)

    openings = Openings(lambda **_: Sharing())
    with load_roles(
        profile(tmp_path, 'models: {draft: {layers: "0-1"}}'), model="big", opener=openings
    ) as roles:
        assert len(openings.asked) == 1
        assert roles["draft"] is not roles.target and roles.target.taken == "0-1"


def test_changing_profiles_reuses_frees_and_reports(tmp_path: Path) -> None:
    openings, seen = Openings(), []
    one = load_profile("greedy")
    two = profile(tmp_path, "models: {draft: {model: small}}")
    roles = Roles(opener=openings)

    def change(loaded: Profile) -> None:
        asked = wanted(loaded)
        roles.prepare(loaded, asked, opening=lambda *what: seen.append(what))

    change(one)
    target, cache = roles.target, roles.sessions
    assert not roles.ready(wanted(two))
    change(two)
    assert roles.target is target and roles.sessions is cache and roles.ready(wanted(two))
    assert openings.names == ["big", "small"]
    assert seen == [("target", "big"), ("draft", "small")]
    change(one)
    assert openings.names == ["big"]  # the draft's memory is freed
    roles.close()
    assert openings.open == []


@pytest.mark.parametrize("how", ["missing", "cancelled", "lacking"])
def test_a_change_that_fails_leaves_what_was(how: str, tmp_path: Path) -> None:
    openings = Openings()
    one = load_profile("greedy")
    two = profile(tmp_path, "models: {target: {model: other}, draft: {model: small}}")
    roles = Roles(opener=openings)
    roles.prepare(one, wanted(one))
    before = dict(roles.models)
    error: type[Exception] = {
        "missing": MissingFile, "cancelled": Cancelled, "lacking": CapabilityError
    }[how]  # fmt: skip
    if how == "missing":
        openings.fail = "small"
    if how == "lacking":
        openings.make = lambda **_: TableModel(without=Capability.LAST_LOGITS)
    with pytest.raises(error):
        roles.prepare(
            two,
            role_options(two, {"model": "other"}),
            cancelled=lambda: how == "cancelled" and len(openings.open) == 3,
        )
    assert roles.models == before and openings.names == ["big"]


# -- what it is for: decoding with two models -----------------------------------------------------


def test_two_models_decode_as_their_mean(tmp_path: Path) -> None:
    """Exact law of the first two tokens, by enumeration, by chi-square; it errs once in 1000."""
    openings = Openings(lambda **o: TableModel(seed=1 if o["model"] == "big" else 2))
    loaded = profile(tmp_path, "models: {draft: {model: small}}")
    with load_roles(loaded, model="big", opener=openings) as roles:
        first, second = roles["target"], roles["draft"]
        prompt = [3, 4]
        mixed = TableModel(table=np.stack([
            mean_law(first, second, [i] if i < 13 else []) for i in range(14)
        ]))  # fmt: skip
        law = dict(enumerate_texts(mixed, prompt, 2))
        count, seeds = dict.fromkeys(law, 0), 300
        (eos,) = first.tokenizer.eos_ids
        for seed in range(seeds):
            done = generate(
                roles.target, prompt, profile=loaded, session=roles.sessions, seed=seed,
                max_tokens=2,
            )  # fmt: skip
            text = done.token_ids if done.finish_reason == "length" else (*done.token_ids, eos)
            count[text] += 1
    likely = [t for t, p in law.items() if p * seeds >= 5]
    rest = 1 - sum(law[t] for t in likely)
    observed = np.array([*(count[t] for t in likely), seeds - sum(count[t] for t in likely)])
    expected = seeds * np.array([*(law[t] for t in likely), rest])
    assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


def test_every_role_reuses_its_cache_in_a_later_turn(tmp_path: Path) -> None:
    openings = Openings(lambda **o: TableModel(seed=1 if o["model"] == "big" else 2))
    loaded = profile(tmp_path, "models: {draft: {model: small}}")
    with load_roles(loaded, model="big", opener=openings) as roles:
        prompt = [3, 4, 5, 6, 7, 8]
        ban = {"logit_bias.bias": {str(i): -np.inf for i in roles.target.tokenizer.eos_ids}}
        first = generate(
            roles.target, prompt, profile=loaded, session=roles.sessions, seed=0, max_tokens=3,
            overrides=ban,
        )  # fmt: skip
        assert first.finish_reason == "length"
        before = {role: roles[role].calls["tokens"] for role in roles}
        again = [*prompt, *first.token_ids, 5]
        generate(roles.target, again, profile=loaded, session=roles.sessions, seed=0, max_tokens=1)
        # The last token of an answer was shown but never fed.
        for role in roles:
            assert roles[role].calls["tokens"] - before[role] == 2, role


def test_the_smaller_context_bounds_both_and_is_named(tmp_path: Path) -> None:
    from steersman.core.errors import ContextOverflow

    openings = Openings(lambda **o: TableModel(context=64 if o["model"] == "big" else 16))
    loaded = profile(tmp_path, "models: {draft: {model: small}}")
    with load_roles(loaded, model="big", opener=openings) as roles:
        assert generate(
            roles.target, [3] * 12, profile=loaded, session=roles.sessions, seed=2, max_tokens=50,
            overrides={"temperature.t": 1e-3},
        ).prompt_token_ids  # fmt: skip
        with pytest.raises(ContextOverflow, match=r"context of 16.*of role 'draft'"):
            generate(roles.target, [3] * 20, profile=loaded, session=roles.sessions)
