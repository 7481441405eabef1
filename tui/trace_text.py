"""How a step of a trace is put into text: for the screen, in colour, and as plain rows.

Everything that comes out of here has passed the terminal filter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.style import Style
from rich.table import Table
from rich.text import Text

from .plots import bar
from .safe_text import show, show_line

if TYPE_CHECKING:
    from steersman.core.trace import Frame, Piece, Recording

MODES = ("probability", "rank", "change")
_BAR = 5  # columns
WINDOW = 1500  # tokens before the step that are drawn
PROMPT = 400  # characters of the prompt before the text

# (at least, colour, what the legend says); the last one is for everything below.
_PROBABILITY = (
    (0.5, "#5fb878", "p ≥ 0.5"), (0.1, "#b5c04a", "≥ 0.1"), (0.02, "#e0a33e", "≥ 0.02"),
    (0.002, "#e0703e", "≥ 0.002"), (0.0, "#e04a6a", "less"),
)  # fmt: skip
_RANK = (
    (1, "#5fb878", "rank 1"), (2, "#b5c04a", "2"), (5, "#e0a33e", "to 5"),
    (20, "#e0703e", "to 20"), (float("inf"), "#e04a6a", "beyond"),
)  # fmt: skip
_CHANGE = (
    (2.0, "#e04a6a", "made likelier ≥ 2x"), (1.1, "#e0a33e", "≥ 1.1x"),
    (0.9, "", "as likely"), (0.0, "#4aa8e0", "less likely"),
)  # fmt: skip


def colour(frame: Frame, mode: str) -> str:
    """Return the colour of a token; "" where nothing is known."""
    if mode == "rank":
        if frame.rank is None:
            return ""
        return next(name for most, name, _ in _RANK if frame.rank <= most)
    if frame.p is None:
        return ""
    if mode == "probability":
        return next((name for least, name, _ in _PROBABILITY if frame.p >= least), "")
    if frame.final is None or frame.p <= 0:
        return ""
    return next((name for least, name, _ in _CHANGE if frame.final / frame.p >= least), "")


def legend(mode: str, usual: str | None) -> Text:
    """Return what the colours mean."""
    line = Text(f"{mode}: ", style="dim", no_wrap=True, overflow="ellipsis")
    kinds: Sequence[tuple[float, str, str]] = {"rank": _RANK, "change": _CHANGE}.get(
        mode, _PROBABILITY
    )
    for _, name, title in kinds:
        line.append(f"{title}  ", Style(color=name, dim=False) if name else "")
    line.append("taken back", "strike")
    if usual is not None:
        line.append("  ")
        line.append(f"not {show_line(usual)}", "underline")
    return line


def text_at(recording: Recording, at: int, mode: str, usual: str | None) -> Text:
    """Return the text as it stood at step ``at``; what was taken back there is struck through."""
    text = Text(overflow="fold")
    if not recording.frames:
        text.append(show(recording.started["prompt"][-PROMPT:]), "dim")
        return text
    frame = recording.frames[at]
    pieces = recording.pieces(at, WINDOW)
    if len(pieces) < frame.length:
        text.append(f"… {frame.length - len(pieces)} tokens before\n", "dim italic")
    else:
        text.append(show(recording.started["prompt"][-PROMPT:]), "dim")
    chosen = at if frame.kind == "token" else -1
    before, last = (pieces[:-1], pieces[-1:]) if chosen >= 0 else (pieces, [])
    _append(text, recording, before, mode, usual)
    for piece in recording.withdrawn(at)[-WINDOW:]:
        text.append(_visible(recording, piece), "strike dim red")
    if frame.rejected:
        text.append("⟨", "dim")
        for token in frame.rejected[:32]:
            text.append(show_line(recording.name(token)), "strike dim italic")
        text.append("⟩", "dim")
    for piece in last:
        text.append(_visible(recording, piece), _style(frame, mode, usual) + Style(reverse=True))
    if frame.kind in ("finished", "failed"):
        text.append(f"\n[{frame.kind}: {show_line(frame.said)}]", "dim italic")
    return text


def _append(
    text: Text, recording: Recording, pieces: Sequence[Piece], mode: str, usual: str | None
) -> None:
    for piece in pieces:
        style = _style(recording.frames[piece.frame], mode, usual)
        text.append(_visible(recording, piece), style)


def _visible(recording: Recording, piece: Piece) -> str:
    """Return a token's filtered text; a token without any (a control token) shows its name."""
    if piece.text:
        return show(piece.text)
    frame = recording.frames[piece.frame]
    name = recording.name(frame.token)
    return f"⟨{show_line(name)}⟩" if name.isprintable() and "\ufffd" not in name else ""


def _style(frame: Frame, mode: str, usual: str | None) -> Style:
    name = colour(frame, mode)
    style = Style(color=name) if name else Style()
    if frame.routed is not None and frame.routed != usual:
        style += Style(underline=True)
    return style


def usual_role(recording: Recording) -> str | None:
    """Return the role that most tokens were routed to; None without routing."""
    roles = [frame.routed for frame in recording.frames if frame.routed is not None]
    return max(sorted(set(roles)), key=roles.count) if roles else None


def number(value: float | None, digits: int = 3) -> str:
    """Return a number of a few digits, or "" for None."""
    if value is None:
        return ""
    return f"{value:.{digits}f}" if value == 0 or abs(value) >= 0.001 else f"{value:.1e}"


def title(recording: Recording) -> str:
    """Return what made a text: model, engine, profile, seed."""
    started = recording.started
    model = started["models"].get("target", {})
    name, backend = (str(model.get(key, "?")) for key in ("name", "backend"))
    others = [
        f"{role} {facts.get('name', '?')}"
        for role, facts in started["models"].items()
        if role != "target" and isinstance(facts, Mapping)
    ]
    made = ", ".join([f"{name} on {backend}", *others])
    return show_line(f"{made} · {started['profile'].get('name', '?')} · seed {started['seed']}")


def step_line(recording: Recording, at: int) -> str:
    """Return one line about a step."""
    frame = recording.frames[at]
    place = f"step {at + 1} of {len(recording.frames)} · {frame.seconds:.2f} s · "
    if frame.kind == "withdrawn":
        gone = len(recording.withdrawn(at))
        return place + f"took back {gone} token{'s' * (gone != 1)}, {frame.length} left"
    if frame.kind != "token":
        return place + show_line(f"{frame.kind}: {frame.said}")
    line = f"token {frame.length - 1} {recording.name(frame.token)!r} #{frame.token}"
    if frame.p is not None:
        line += f" · p {number(frame.p)}"
        line += f" → {number(frame.final)}" if frame.final is not None else ""
    if frame.rank is not None:
        line += f" · rank {frame.rank}"
    if frame.entropy is not None:
        line += f" · entropy {number(frame.entropy)}"
    return place + show_line(line)


def stage_rows(detail: Mapping[str, Any]) -> list[list[str]]:
    """Return name, tokens left, removed, entropy, KL, total variation and p after each stage.

    A mark at the end says that another token became the likeliest.
    """
    raw = detail.get("raw")
    if raw is None:
        return []
    rows = [
        ["model", str(raw["left"]), "", number(raw["entropy"]), "", "", number(raw.get("p")), ""]
    ]
    rows += [
        [
            show_line(s["name"]), str(s["left"]), number(s["removed"]), number(s["entropy"]),
            "∞" if s["kl"] is None else number(s["kl"]), number(s["tv"]), number(s.get("p")),
            "!" if s["argmax_changed"] else "",
        ]
        for s in detail.get("stages", [])
    ]  # fmt: skip
    return rows


STAGE_HEADER = ("stage", "left", "removed", "entropy", "KL", "TV", "p", "")


def stage_table(detail: Mapping[str, Any]) -> Table | Text:
    """Return the table of what each stage did."""
    rows = stage_rows(detail)
    if not rows:
        return Text("no account of this step: its strategy gives none", "dim italic")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column(STAGE_HEADER[0], max_width=14, no_wrap=True)
    for name in STAGE_HEADER[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def alternative_rows(recording: Recording, detail: Mapping[str, Any]) -> list[list[Any]]:
    """Return (mark, token, probability before, probability after) of the likeliest tokens."""
    raw = detail.get("raw")
    if raw is None:
        return []
    before = dict(map(tuple, raw["top"]))
    stages = detail.get("stages", [])
    after = dict(map(tuple, stages[-1]["top"])) if stages else dict(before)
    chosen = detail["id"]
    if "p" in raw:
        before.setdefault(chosen, raw["p"])
    if stages and "p" in stages[-1]:
        after.setdefault(chosen, stages[-1]["p"])
    # A list that is not full holds all that was left.
    whole = bool(stages) and len(stages[-1]["top"]) == stages[-1]["left"]
    ids = sorted({**before, **after}, key=lambda i: (-after.get(i, 0), -before.get(i, 0), i))
    return [
        [
            "▶" if i == chosen else "",
            show_line(repr(recording.name(i))),
            before.get(i),
            after.get(i, 0.0 if whole else None),
        ]
        for i in ids
    ]


def alternative_table(recording: Recording, detail: Mapping[str, Any]) -> Table | Text:
    """Return the likeliest tokens before and after the chain, with bars."""
    rows = alternative_rows(recording, detail)
    if not rows:
        return Text("")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold", pad_edge=False)
    table.add_column("")
    table.add_column("token", max_width=16, no_wrap=True)
    for name in ("model", "after"):
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", min_width=_BAR, max_width=_BAR)
    for mark, token, before, after in rows:
        style = "bold" if mark else "dim" if after == 0 else ""
        cells = [mark, token]
        for value in (before, after):
            cells += [number(value) or "·", bar(value or 0.0, 1.0, _BAR)]
        table.add_row(*(Text(cell, style) for cell in cells))
    return table


def notes_of(recording: Recording, frame: Frame) -> list[str]:
    """Return what the strategy said at a step, in words."""
    from steersman.core.trace import describe_note

    said = [line for note in frame.notes for line in describe_note(note, recording.names)]
    if frame.rejected and not any("rejected" in note for note in frame.notes):
        said.append("refused here: " + " ".join(repr(recording.name(i)) for i in frame.rejected))
    return [show_line(line) for line in said]


def plain_rows(recording: Recording, details: Mapping[int, Mapping[str, Any]]) -> list[list[str]]:
    """Return one row per step: number, place, token, p, rank, final p, stages, remarks.

    ``details`` maps steps to their whole lines.
    """
    rows = []
    for at, frame in enumerate(recording.frames):
        said = "; ".join(notes_of(recording, frame))
        if frame.kind == "token":
            stages = details.get(at, {}).get("stages", [])
            acted = " ".join(
                f"{show_line(s['name'])}:{s['left']}" + ("!" if s["argmax_changed"] else "")
                for s in stages
            )
            cells = [
                str(frame.length - 1), repr(recording.name(frame.token)), number(frame.p),
                str(frame.rank or ""), number(frame.final), number(frame.entropy), acted, said,
            ]  # fmt: skip
        else:
            what = step_line(recording, at).split(" · ", 2)[2]
            cells = ["", f"[{what}]", "", "", "", "", "", said]
        rows.append([str(at + 1), *cells])
    return rows


PLAIN_HEADER = ("step", "#", "token", "p", "rank", "final", "entropy", "left after", "remarks")
