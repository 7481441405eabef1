"""``steersman profiles``: look at profiles, check them, make new ones."""

from __future__ import annotations

import click

from steersman.core.errors import SteersmanError

from .. import common, output
from ..envelope import INVALID, Envelope


@click.group("profiles")
def command() -> None:
    """List, show, check, compare and create profiles (how to decode, as YAML files)."""


@command.command("list")
@common.output_options
def list_command() -> None:
    """List every profile; your own hide built-in ones of the same name."""
    from steersman.core.profile import list_profiles

    with Envelope("profiles list") as envelope:
        entries = list_profiles()
        envelope.result = [
            {
                "name": e.name,
                "description": e.description,
                "path": str(e.path),
                "origin": e.origin,
                "shadows": e.shadows,
                "error": e.error,
            }
            for e in entries
        ]
        if not envelope.json:
            rows = [
                [
                    e.name,
                    e.origin + (", hides a built-in one" if e.shadows else ""),
                    e.error or e.description,
                ]
                for e in entries
            ]
            print(output.table(rows, header=["name", "from", "description"]))


@command.command("show")
@click.argument("name")
@common.option(
    "-o",
    "--option",
    multiple=True,
    envvar=None,
    metavar="KEY=VALUE",
    help="Change a parameter first.",
)
@common.option("--effective", is_flag=True, help="Every value and its origin, not the file.")
@common.output_options
def show_command(name: str, option: tuple[str, ...], effective: bool) -> None:
    """Print a profile's file, or with --effective (or -o) what it comes to."""
    with Envelope("profiles show") as envelope:
        envelope.inputs = {"profile": name, "options": list(option)}
        profile = common.SamplingArgs(profile=name, option=option).load_profile()
        envelope.result = {
            "name": profile.name,
            "path": profile.source,
            "fingerprint": profile.fingerprint,
            "profile": profile.as_dict(),
            "settings": [vars(s) for s in profile.settings()],
        }
        if envelope.json:
            return
        if effective or option:
            rows = [
                [s.key, "none" if s.value is None else s.value, s.origin]
                for s in profile.settings()
            ]
            print(output.table(rows, header=["setting", "value", "from"]))
        else:
            output.print_text(common.read_text(profile.source).rstrip("\n"))


@command.command("validate")
@click.argument("names", nargs=-1, metavar="[NAME|FILE]...")
@common.output_options
def validate_command(names: tuple[str, ...]) -> None:
    """Check profiles by name or file; all of them when none is given."""
    from steersman.core.profile import load_profile, profile_names

    with Envelope("profiles validate", mode="validate") as envelope:
        chosen = list(names) or profile_names()
        envelope.inputs = {"profiles": list(names)}
        checked: dict[str, str | None] = {}
        for name in chosen:
            try:
                load_profile(name)
                checked[name] = None
            except SteersmanError as exc:
                checked[name] = str(exc)
                envelope.fail(exc, exit_code=INVALID if len(chosen) > 1 else None)
        envelope.validation = {
            "valid": [n for n, e in checked.items() if e is None],
            "invalid": {n: e for n, e in checked.items() if e is not None},
        }
        if not envelope.json:
            for name, error in checked.items():
                if error is None:
                    output.print_text(f"{name}: valid")


@command.command("path")
@click.argument("name", required=False)
@common.output_options
def path_command(name: str | None) -> None:
    """Print the file of a profile, or the folder for your own."""
    from steersman.core.profile import find_profile, user_folder

    with Envelope("profiles path") as envelope:
        envelope.inputs = {"profile": name}
        path = user_folder() if name is None else find_profile(name)
        envelope.result = {"path": str(path)}
        if not envelope.json:
            output.print_text(str(path))


@command.command("new")
@click.argument("name")
@common.option(
    "--from",
    "template",
    default="balanced",
    show_default=True,
    envvar=None,
    metavar="NAME|FILE",
    help="Profile to copy, comments included.",
)
@common.output_options
def new_command(name: str, template: str) -> None:
    """Create a profile in your folder as a commented copy; never replaces a file."""  # fmt: skip
    from steersman.core.profile import new_profile

    with Envelope("profiles new") as envelope:
        envelope.inputs = {"name": name, "from": template}
        path = new_profile(name, template=template)
        envelope.artifacts = {"profile": str(path)}
        envelope.result = {"path": str(path)}
        if not envelope.json:
            output.print_text(str(path))


@command.command("diff")
@click.argument("first")
@click.argument("second")
@common.output_options
def diff_command(first: str, second: str) -> None:
    """Compare what two profiles come to, value by value."""
    from steersman.core.profile import load_profile

    with Envelope("profiles diff") as envelope:
        envelope.inputs = {"first": first, "second": second}
        # Places in the chain are part of the comparison through the list of stages itself.
        one, two = load_profile(first), load_profile(second)
        values = []
        for profile in (one, two):
            listed = {s.key: s.value for s in profile.settings()}
            order = ", ".join(stage.name for stage in profile.stages) or "none"
            values.append({"logits": order, **_without_places(listed)})
        keys = list(dict.fromkeys([*values[0], *values[1]]))
        differences = [
            {"key": k, "first": values[0].get(k), "second": values[1].get(k)}
            for k in keys
            if values[0].get(k) != values[1].get(k) or (k in values[0]) != (k in values[1])
        ]
        envelope.result = {"equal": not differences, "differences": differences}
        if envelope.json:
            return
        if not differences:
            output.print_text("no difference")
            return
        rows = [
            [d["key"], *("-" if d[side] is None else d[side] for side in ("first", "second"))]
            for d in differences
        ]
        print(output.table(rows, header=["setting", one.name, two.name]))


def _without_places(settings: dict[str, object]) -> dict[str, object]:
    """Name stages by name and occurrence, so that the same stage at another place compares."""
    result: dict[str, object] = {}
    seen: dict[tuple[str, str], list[str]] = {}
    for key, value in settings.items():
        if not key.startswith("logits."):
            result[key] = value
            continue
        _, place, name = key.split(".", 2)
        places = seen.setdefault((name, ""), [])
        if place not in places:
            places.append(place)
        count = places.index(place)
        result[name if count == 0 else f"{name} ({count + 1})"] = value
    return result
