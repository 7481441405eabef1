"""The conversation store: threads, versions, resuming, refusing what it cannot read."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from steersman.core.errors import InvalidInput
from steersman.tui.history import History


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(tmp_path / "deep" / "history.sqlite")


def test_thread_runs_from_the_root_to_the_head(history: History) -> None:
    talk = history.create()
    one = history.add(talk, "user", "one", parent=None)
    two = history.add(talk, "assistant", "two", parent=one.id, facts={"seed": 3})
    assert [(m.role, m.content) for m in history.thread(talk)] == [
        ("user", "one"),
        ("assistant", "two"),
    ]
    assert history.thread(talk)[1].facts == {"seed": 3}
    history.set_head(talk, one.id)
    assert [m.id for m in history.thread(talk)] == [one.id]
    assert history.newest_leaf(one.id) == two.id


def test_versions_are_siblings_also_at_the_root(history: History) -> None:
    talk, other = history.create(), history.create()
    first = history.add(talk, "user", "first", parent=None)
    history.add(other, "user", "elsewhere", parent=None)
    second = history.add(talk, "user", "second", parent=None)
    assert history.siblings(first.id) == [first.id, second.id]
    assert [m.content for m in history.thread(talk)] == ["second"]


def test_list_has_titles_and_leaves_out_empty_conversations(history: History) -> None:
    history.create()
    talk = history.create()
    history.add(talk, "user", "a  long\nquestion " + "x" * 100, parent=None)
    (entry,) = history.conversations()
    assert entry.title.startswith("a long question xxx")
    assert len(entry.title) <= 60
    assert entry.messages == 1


def test_delete_removes_the_messages(history: History) -> None:
    talk = history.create()
    one = history.add(talk, "user", "one", parent=None)
    history.add(talk, "assistant", "two", parent=one.id)
    history.delete(talk)
    assert history.conversations() == []
    assert history.thread(talk) == []


def test_what_was_added_survives_a_reopen(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    first = History(path)
    talk = first.create()
    first.add(talk, "user", "kept \ud800 too", parent=None)
    # Not closed on purpose: a killed program leaves it like this.
    with History(path) as again:
        assert [m.content for m in again.thread(talk)] == ["kept ? too"]


def test_a_file_that_is_no_history_is_named(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    path.write_text("not a database, certainly not one of ours\n" * 40)
    with pytest.raises(InvalidInput, match=r"h\.sqlite: not usable as the conversation history"):
        History(path)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "h.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(InvalidInput, match="newer steersman"):
        History(path)
