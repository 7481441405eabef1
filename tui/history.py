"""Conversations in SQLite: every message has a parent, so that regenerating loses nothing."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from steersman.core.errors import InvalidInput

SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY, title TEXT NOT NULL, system TEXT, head INTEGER,
    created TEXT NOT NULL, updated TEXT NOT NULL
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY,
    conversation INTEGER NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
    parent INTEGER REFERENCES messages(id) ON DELETE CASCADE,
    role TEXT NOT NULL CHECK (role IN ('user', 'assistant')),
    content TEXT NOT NULL, facts TEXT NOT NULL, created TEXT NOT NULL
);
CREATE INDEX messages_by_parent ON messages (conversation, parent);
"""
TITLE_LENGTH = 60


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message; ``facts`` of an answer say what made it (model, backend, profile, seed ...)."""

    id: int
    parent: int | None
    role: str
    content: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ConversationEntry:
    """A line of the list of conversations."""

    id: int
    title: str
    updated: str
    messages: int


class History:
    """The conversations of one user. Belongs to the thread that opened it.

    Messages form a tree: editing or regenerating adds a sibling, and the conversation's *head* says
    which leaf is shown. Each call is one transaction, so a killed program loses nothing it showed
    as saved.

    Parameters
    ----------
    path : Path
        Database file; its folder is created. ":memory:" for none.

    Raises
    ------
    InvalidInput
        The file is not such a database, or was written by a newer version.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = path
        if isinstance(path, Path):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._db = sqlite3.connect(path, isolation_level=None, timeout=5)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._migrate()
        except sqlite3.Error as exc:
            raise InvalidInput(
                f"{path}: not usable as the conversation history ({exc}); move it away"
            ) from None

    def _migrate(self) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise InvalidInput(f"{self.path}: written by a newer steersman; update this one")
        if version == 0:
            self._db.executescript(
                f"BEGIN; {_SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def create(self, *, title: str = "", system: str | None = None) -> int:
        """Add an empty conversation and return its id."""
        now = _now()
        cursor = self._db.execute(
            "INSERT INTO conversations (title, system, created, updated) VALUES (?, ?, ?, ?)",
            (title, system, now, now),
        )
        return int(cursor.lastrowid or 0)

    def add(
        self,
        conversation: int,
        role: str,
        content: str,
        *,
        parent: int | None,
        facts: Mapping[str, Any] | None = None,
    ) -> Message:
        """Add a message below ``parent`` and make it the head.

        The first message of a person becomes the conversation's title.
        """
        now = _now()
        # Lone surrogates cannot be stored as UTF-8.
        content = content.encode("utf-8", "replace").decode()
        self._db.execute("BEGIN IMMEDIATE")
        try:
            cursor = self._db.execute(
                "INSERT INTO messages (conversation, parent, role, content, facts, created)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (conversation, parent, role, content, json.dumps(dict(facts or {})), now),
            )
            added = int(cursor.lastrowid or 0)
            self._db.execute(
                "UPDATE conversations SET head = ?, updated = ?,"
                " title = CASE WHEN title = '' THEN ? ELSE title END WHERE id = ?",
                (added, now, _title(content), conversation),
            )
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        return Message(id=added, parent=parent, role=role, content=content, facts=facts or {})

    def set_head(self, conversation: int, message: int | None) -> None:
        """Show the thread that ends at ``message``."""
        self._db.execute(
            "UPDATE conversations SET head = ?, updated = ? WHERE id = ?",
            (message, _now(), conversation),
        )

    def thread(self, conversation: int) -> list[Message]:
        """Return the messages from the root to the head."""
        rows = self._db.execute(
            """
            WITH RECURSIVE line(id, parent, role, content, facts, depth) AS (
                SELECT m.id, m.parent, m.role, m.content, m.facts, 0
                FROM messages m JOIN conversations c ON c.head = m.id WHERE c.id = ?
                UNION ALL
                SELECT m.id, m.parent, m.role, m.content, m.facts, line.depth + 1
                FROM messages m JOIN line ON m.id = line.parent
            )
            SELECT id, parent, role, content, facts FROM line ORDER BY depth DESC
            """,
            (conversation,),
        )
        return [
            Message(id=i, parent=p, role=role, content=content, facts=json.loads(facts))
            for i, p, role, content, facts in rows
        ]

    def siblings(self, message: int) -> list[int]:
        """Return the ids of all messages with the same parent, oldest first."""
        rows = self._db.execute(
            "SELECT s.id FROM messages m JOIN messages s"
            " ON s.conversation = m.conversation AND s.parent IS m.parent"
            " WHERE m.id = ? ORDER BY s.id",
            (message,),
        )
        return [i for (i,) in rows]

    def newest_leaf(self, message: int) -> int:
        """Return the last message of the newest thread through ``message``."""
        while True:
            row = self._db.execute(
                "SELECT id FROM messages WHERE parent = ? ORDER BY id DESC LIMIT 1", (message,)
            ).fetchone()
            if row is None:
                return message
            message = row[0]

    def conversations(self, limit: int = 500) -> list[ConversationEntry]:
        """Return the conversations that hold anything, last used first."""
        rows = self._db.execute(
            "SELECT c.id, c.title, c.updated, COUNT(m.id) FROM conversations c"
            " JOIN messages m ON m.conversation = c.id"
            " GROUP BY c.id ORDER BY c.updated DESC, c.id DESC LIMIT ?",
            (limit,),
        )
        return [
            ConversationEntry(id=i, title=title, updated=updated, messages=n)
            for i, title, updated, n in rows
        ]

    def delete(self, conversation: int) -> None:
        """Remove a conversation with all its messages."""
        self._db.execute("DELETE FROM conversations WHERE id = ?", (conversation,))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _title(content: str) -> str:
    line = " ".join(content.split())
    return line if len(line) <= TITLE_LENGTH else line[: TITLE_LENGTH - 1] + "…"
