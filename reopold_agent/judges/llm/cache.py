"""Caches replies on disk, so that an evaluation that is run again asks only what is new."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reopold_agent.judges.llm.base import Prompt
from reopold_agent.judges.llm.failures import JudgeError
from reopold_agent.judges.llm.prompts import VERSION

_BUSY_SECONDS = 30.0
_TABLE = """CREATE TABLE IF NOT EXISTS replies (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, how TEXT NOT NULL, text TEXT NOT NULL,
    input_tokens INTEGER NOT NULL, output_tokens INTEGER NOT NULL, created REAL NOT NULL
) WITHOUT ROWID"""


def cache_key(backend: str, model: str, settings: Mapping[str, Any], prompt: Prompt) -> str:
    """Returns a digest of everything that a reply depends on."""
    whole = [VERSION, backend, model, dict(settings), prompt.system, prompt.user, prompt.field]
    text = json.dumps(whole, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


class ReplyCache:
    """A table of replies by key. Any number of threads and processes may use the file at once.

    Args:
        path: the file; it and its folder are created if necessary.

    Raises:
        JudgeError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._process = os.getpid()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = self._open()
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        try:
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        # With a write-ahead log, readers and the one writer do not wait for each other. SQLite
        # fails at once when two processes turn it on together, so this waits instead.
        until = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                connection.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)
        # A power cut may lose the last replies, which are then asked again, but not the file.
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(_TABLE)

    def get(self, key: str) -> tuple[str, str, str] | None:
        """Returns (how, text, model that answered) of a reply; None if it is not cached."""
        row = self._execute("SELECT how, text, model FROM replies WHERE key = ?", (key,))
        return None if row is None else (str(row[0]), str(row[1]), str(row[2]))

    def put(self, key: str, model: str, how: str, text: str, tokens: tuple[int, int]) -> None:
        """Stores a reply; ``model`` is the version that answered, or the model's name.

        If two processes asked the same, the first reply stays.
        """
        self._execute(
            "INSERT INTO replies VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (key, model, how, text, *tokens, time.time()),
        )

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._connection.close()

    def _execute(self, statement: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        try:
            with self._lock:
                if self._process != os.getpid():
                    # SQLite's locks do not survive a fork; the parent's connection is left alone.
                    self._connection, self._process = self._open(), os.getpid()
                row: tuple[Any, ...] | None = self._connection.execute(statement, values).fetchone()
                return row
        except sqlite3.Error as error:
            raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> JudgeError:
        return JudgeError(
            f"the judge's cache {self.path} cannot be used: {error}. Delete it, use another file "
            "(judge.cache=FILE) or no cache (judge.cache=null)."
        )
