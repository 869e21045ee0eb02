"""What was found out once and is true until its key changes: a small table in the scratch folder.

It can always be found out again, so a damaged table is thrown away.
"""

import sqlite3
import threading
from contextlib import closing
from pathlib import Path

BUSY_S = 60.0


class Memo:
    """Text by text, shared by the processes of a machine; where the folder cannot be written, known
    to this one alone.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        self._known: dict[str, str] = {}

    def get(self, key: str) -> str | None:
        """What is known under a key."""
        if key in self._known:
            return self._known[key]
        with self._lock:
            rows = self._run("SELECT value FROM memo WHERE key = ?", (key,))
        if not rows:
            return None
        self._known[key] = rows[0][0]
        return rows[0][0]

    def put(self, key: str, value: str) -> None:
        """Remember."""
        self._known[key] = value
        with self._lock:
            self._run("INSERT OR REPLACE INTO memo VALUES (?, ?)", (key, value))

    def _run(self, command: str, values: tuple[str, ...]) -> list[tuple[str]]:
        try:
            return self._try(command, values)
        except (OSError, sqlite3.OperationalError):
            return []  # it cannot be kept here: this process remembers for itself
        except sqlite3.DatabaseError:  # not a table, or a damaged one
            self._path.unlink(missing_ok=True)
            return self._try(command, values)

    def _try(self, command: str, values: tuple[str, ...]) -> list[tuple[str]]:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(self._path, timeout=BUSY_S)) as table, table:
            table.execute("CREATE TABLE IF NOT EXISTS memo (key TEXT PRIMARY KEY, value TEXT)")
            found: list[tuple[str]] = table.execute(command, values).fetchall()
            if any(not isinstance(value, str) for (value,) in found):
                raise sqlite3.DatabaseError("a value is no text")
            return found
