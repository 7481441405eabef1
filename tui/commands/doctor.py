"""``steersman doctor``: what is installed, what is missing, and the command that gets it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import click

from .. import common, environment, output
from ..envelope import MISSING, Envelope, Problem


@click.command("doctor")
@common.option(
    "--no-devices", is_flag=True, envvar=None, help="Do not start the engines to list devices."
)
@common.output_options
def command(no_devices: bool) -> None:
    """Say what is installed, what is missing and the exact command that installs it.

    Exit code 0 when at least one engine works and no installed version is known to be bad, else 3.
    """
    with Envelope("doctor") as envelope:
        report = _report(with_devices=not no_devices)
        envelope.result = report
        for message in _problems(report):
            envelope.errors.append(Problem(code="missing_prerequisite", message=message))
            envelope.exit_code = MISSING
        envelope.warnings = _warnings(report)
        if not envelope.json:
            _print(report)
            for warning in envelope.warnings:
                output.warn(warning)
            for problem in envelope.errors:
                output.error(problem.message)


def _report(*, with_devices: bool) -> dict[str, Any]:
    engines: dict[str, dict[str, Any]] = {}
    for engine in environment.engines():
        found: dict[str, Any] = {
            "installed": not engine.missing,
            "missing": list(engine.missing),
            "install": engine.install,
            "versions": engine.versions,
            "error": engine.versions.get("error"),
            "devices": [],
        }
        if with_devices and not engine.missing:
            try:
                found["devices"] = environment.devices(engine.name)
            except Exception as exc:  # a broken engine is what this command is for
                found["error"] = f"{type(exc).__name__}: {exc}"
        engines[engine.name] = found
    return {
        "steersman": environment.own_version(),
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": {name: environment.version_of(name) for name in environment.PACKAGES},
        "optional": {
            name: {"version": environment.version_of(name), "for": purpose, "install": install}
            for name, (purpose, install) in environment.OPTIONAL.items()
        },
        "engines": engines,
        "known_bad": [
            {"package": package, "version": version, "why": entry.why, "fix": entry.fix}
            for package, version, entry in environment.known_problems()
        ],
        "hardware": environment.hardware(),
        "terminal": environment.terminal(),
        "profiles": _profiles(),
        "folders": _folders(),
    }


def _profiles() -> dict[str, str | None]:
    from steersman.core.profile import list_profiles

    return {entry.name: entry.error for entry in list_profiles()}


def _folders() -> dict[str, dict[str, Any]]:
    from steersman.core import paths

    found = {}
    for name in ("config", "data", "cache", "state"):
        path: Path = getattr(paths, f"{name}_dir")()
        existing = path
        while not existing.exists() and existing != existing.parent:
            existing = existing.parent
        found[name] = {"path": str(path), "writable": os.access(existing, os.W_OK)}
    return found


def _problems(report: dict[str, Any]) -> list[str]:
    problems = []
    engines = report["engines"]
    working = [n for n, e in engines.items() if e["installed"] and not e["error"]]
    if not working:
        problems.append(f"no engine works; run: {engines['llamacpp']['install']}")
    problems += [
        f"{e['package']} {e['version']}: {e['why']}; run: {e['fix']}" for e in report["known_bad"]
    ]
    return problems


def _warnings(report: dict[str, Any]) -> list[str]:
    warnings = [
        f"{name}: installed, but does not start: {e['error']}; reinstall with: {e['install']}"
        for name, e in report["engines"].items()
        if e["installed"] and e["error"]
    ]
    warnings += [error for error in report["profiles"].values() if error]
    warnings += [
        f"{folder['path']}: cannot be written; set STEERSMAN_HOME"
        for folder in report["folders"].values()
        if not folder["writable"]
    ]
    encoding = (report["terminal"]["encoding"] or "").lower().replace("-", "")
    if encoding != "utf8" and report["terminal"]["stdout_is_terminal"]:
        warnings.append(
            f"the terminal's encoding is {encoding}; text beyond it appears as \\u....; "
            "set LANG to a UTF-8 locale"
        )
    return warnings


def _print(report: dict[str, Any]) -> None:
    rows: list[list[object]] = [
        ["steersman", report["steersman"]],
        ["python", f"{report['python']}, {report['system']}"],
    ]
    hardware = report["hardware"]
    rows.append(
        [
            "machine",
            f"{hardware['usable_cpus']} CPUs, {hardware['memory_available'] / 2**30:.1f} of "
            f"{hardware['memory_total'] / 2**30:.1f} GiB memory free",
        ]
    )
    variables = ("STEERSMAN_THREADS", "OMP_NUM_THREADS")
    rows += [[name, hardware[name]] for name in variables if hardware[name]]
    print(output.table(rows))
    print()
    rows = []
    for name, engine in report["engines"].items():
        if not engine["installed"]:
            rows.append([name, "missing", engine["install"]])
            continue
        versions = ", ".join(f"{k} {v}" for k, v in engine["versions"].items())
        state = "broken" if engine["error"] else "ok"
        places = f"; devices: {', '.join(engine['devices'])}" if engine["devices"] else ""
        rows.append([name, state, versions + places])
    for name, optional in report["optional"].items():
        if optional["version"]:
            rows.append([name, "ok", f"{optional['version']} ({optional['for']})"])
        else:
            rows.append([name, "missing", f"{optional['install']} ({optional['for']})"])
    for name, version in report["packages"].items():
        rows.append([name, "ok" if version else "missing", version or f"pip install {name}"])
    print(output.table(rows, header=["part", "state", "details"]))
