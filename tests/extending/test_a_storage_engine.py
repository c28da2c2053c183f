"""A new storage engine is one file: this one, but for the tests. A cache takes any `jaxcache.Storage`.

Values lie in a table of one SQLite database, each behind the header that says what it is.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jaxcache
from jaxcache.storage import record
from jaxcache.storage.base import ObjectKey, flat_bytes
from tests.models.serving import Driver, check_equal, random_tokens, reference, rig_on
from tests.storage.contract import StorageContract
from tests.storage.values import KEY, content, get, put


class SqliteStorage(jaxcache.Storage):
    """One connection, used by one thread at a time."""

    def __init__(self, path: Path):
        self._lock, self._counters = threading.Lock(), Counter(puts=0, put_failures=0, duplicates=0, gets=0, hits=0)
        self._database = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._database.execute("CREATE TABLE IF NOT EXISTS values_ (name TEXT PRIMARY KEY, header BLOB, payload BLOB)")
        self._database.execute("CREATE TABLE IF NOT EXISTS secret (only INTEGER PRIMARY KEY, secret BLOB)")
        self._database.execute("INSERT OR IGNORE INTO secret VALUES (0, ?)", (os.urandom(32),))
        (self.secret,) = self._database.execute("SELECT secret FROM secret").fetchone()

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        ask = "SELECT count(*) FROM values_ WHERE name = ?"
        with self._lock:
            return [self._database.execute(ask, (self.object_name(key),)).fetchone() == (1,) for key in keys]

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        flat = flat_bytes(buffer)
        with self._lock:
            ask = "SELECT header, payload FROM values_ WHERE name = ?"
            row = self._database.execute(ask, (self.object_name(key),)).fetchone()
            hit = row is not None and len(row[1]) == len(flat) and record.check(row[0], key, memoryview(row[1]))
            self._counters.update(gets=1, hits=hit)
        if hit:
            flat[:] = row[1]
        return hit

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        flat = flat_bytes(buffer)
        row = (self.object_name(key), record.pack_header(key, flat), bytes(flat))
        with self._lock:
            try:
                added = self._database.execute("INSERT OR IGNORE INTO values_ VALUES (?, ?, ?)", row).rowcount
            except sqlite3.OperationalError:  # full, or not to be written to
                self._counters.update(puts=1, put_failures=1)
                return False
            self._counters.update(puts=1, duplicates=1 - added)
        return True

    def clear(self) -> None:
        with self._lock:
            self._database.execute("DELETE FROM values_")

    def stats(self) -> dict[str, int]:
        with self._lock:
            (used,) = self._database.execute("SELECT coalesce(sum(length(payload)), 0) FROM values_").fetchone()
            return {**self._counters, "used_bytes": used}

    def close(self) -> None:
        self._database.close()


class TestSqlite(StorageContract):
    def make(self, folder: Path) -> SqliteStorage:
        return SqliteStorage(folder / "pages.db")


def test_values_outlive_the_process_that_wrote_them(tmp_path):
    first = SqliteStorage(tmp_path / "pages.db")
    assert put(first, KEY, content(100))
    first.close()
    assert get(SqliteStorage(tmp_path / "pages.db"), KEY, 100) == content(100)


def test_a_value_that_was_changed_is_a_miss(tmp_path):
    storage = SqliteStorage(tmp_path / "pages.db")
    assert put(storage, KEY, content(100))
    with sqlite3.connect(tmp_path / "pages.db") as database:
        database.execute("UPDATE values_ SET payload = ?", (content(100, seed=1),))
    assert get(storage, KEY, 100) is None


def test_a_hit_from_it_equals_a_miss(make_mesh, tmp_path):
    """One cache stores; another, that has never seen the prompt, finds all of it."""
    rig, tokens = rig_on(make_mesh()), random_tokens(1, 45)
    storage = SqliteStorage(tmp_path / "pages.db")
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        driver.ask(tokens)
        driver.drain()
    with rig.cache(storage) as cache:
        answer = Driver(rig, cache).ask_storage(tokens)
    assert answer.hits == (0, 0, 44)
    check_equal(answer, reference(rig.mesh, tuple(tokens.tolist())))
