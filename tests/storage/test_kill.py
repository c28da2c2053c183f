"""A process killed while it stores leaves nothing wrong behind.

    parent   start a writer, wait for its first store, sleep a random moment, SIGKILL, read the flag, read every value
    writer   flag = 1 | put(key, content of key) | flag = 0 | ... for ever, over keys of its own

The writer is this file, run by a plain interpreter: it must import neither pytest nor jax. The flag is a byte in a
shared file; the next eight are the number of stores begun. `InPlaceStorage` is what the test must catch.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jaxcache.storage.base import ObjectKey, Storage
from jaxcache.storage.file import FileStorage

VALUE_BYTES = 512 << 10
NUM_KILLS = 50
MIN_KILLS_INSIDE = 20
MAX_DELAY_SECONDS = 0.03
QUOTA_BYTES = 16 << 20  # the oldest leave while others are stored, so that kills land in evictions too
FLAG_BYTES = 9


class InPlaceStorage(Storage):
    """Broken on purpose: writes under the final name and believes what it reads."""

    def __init__(self, path: str) -> None:
        os.makedirs(path, exist_ok=True)
        self.path = path
        self.secret = bytes(32)

    def exists(self, keys: Sequence[ObjectKey]) -> list[bool]:
        return [os.path.exists(f"{self.path}/{self.object_name(key)}") for key in keys]

    def get(self, key: ObjectKey, buffer: memoryview) -> bool:
        if not self.exists([key])[0]:
            return False
        with open(f"{self.path}/{self.object_name(key)}", "rb") as file:
            file.readinto(buffer)
        return True

    def put(self, key: ObjectKey, buffer: memoryview) -> bool:
        with open(f"{self.path}/{self.object_name(key)}", "wb", buffering=0) as file:
            for start in range(0, len(buffer), 16 << 10):
                file.write(buffer[start : start + (16 << 10)])
        return True

    def clear(self) -> None:
        shutil.rmtree(self.path)


def open_storage(engine: str, path: str) -> Storage:
    return FileStorage(path, QUOTA_BYTES) if engine == "file" else InPlaceStorage(path)


def key_of(writer: int, i: int) -> ObjectKey:
    return ObjectKey(writer.to_bytes(16, "big") + i.to_bytes(16, "big"), "full", "cell")


def content_of(key: ObjectKey) -> bytes:
    """Unlike that of any other key; repeats itself every 4 KiB, since making it must be short beside storing it."""
    return hashlib.shake_128(key.page_key).digest(4096) * (VALUE_BYTES // 4096)


def write_for_ever(engine: str, path: str, flag_path: str, writer: int) -> None:
    with open(flag_path, "r+b") as file:
        flag = mmap.mmap(file.fileno(), FLAG_BYTES)
    storage = open_storage(engine, path)
    num_started = 0
    while True:
        key = key_of(writer, num_started)
        value = memoryview(content_of(key))
        num_started += 1
        flag[1:] = num_started.to_bytes(8, "little")
        flag[0] = 1
        storage.put(key, value)
        flag[0] = 0


@dataclass
class Tally:
    """What one or more kills led to; `num_good` and `num_wrong` count the values that `get` answered."""

    num_kills: int = 0
    num_inside: int = 0
    num_good: int = 0
    num_wrong: int = 0


def kill_one(engine: str, path: Path, writer: int, delay_seconds: float) -> tuple[bool, int]:
    """Whether the kill landed inside a store, and how many stores had begun."""
    flag_path = path.with_suffix(".flag")
    flag_path.write_bytes(bytes(FLAG_BYTES))
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "PATH": os.defpath}
    command = [sys.executable, __file__, engine, str(path), str(flag_path), str(writer)]
    process = subprocess.Popen(command, env=environment)
    try:
        with open(flag_path, "r+b") as file, mmap.mmap(file.fileno(), FLAG_BYTES) as flag:
            give_up = time.monotonic() + 30
            while not any(flag[1:]):
                assert process.poll() is None, "the writer died by itself"
                assert time.monotonic() < give_up, "the writer did not start"
                time.sleep(0.001)
            time.sleep(delay_seconds)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            return flag[0] == 1, int.from_bytes(flag[1:], "little")
    finally:
        process.kill()
        process.wait()


def read_back(storage: Storage, writer: int, num_started: int, tally: Tally) -> None:
    for i in range(num_started):
        key = key_of(writer, i)
        buffer = bytearray(VALUE_BYTES)
        if storage.get(key, memoryview(buffer)):
            is_good = buffer == content_of(key)
            tally.num_good += is_good
            tally.num_wrong += not is_good


def kill_and_read(engine: str, path: Path, seed: int, num_kills: int) -> Tally:
    moments = random.Random(seed)
    tally = Tally()
    for writer in range(num_kills):
        is_inside, num_started = kill_one(engine, path, writer, moments.uniform(0, MAX_DELAY_SECONDS))
        tally.num_kills += 1
        tally.num_inside += is_inside
        read_back(open_storage(engine, str(path)), writer, num_started, tally)
    return tally


def test_a_kill_leaves_nothing_wrong(tmp_path, seed):
    path = tmp_path / "storage"
    tally = kill_and_read("file", path, seed, NUM_KILLS)
    assert tally.num_wrong == 0
    assert tally.num_inside >= MIN_KILLS_INSIDE, tally
    assert tally.num_good > NUM_KILLS, tally
    storage = FileStorage(path)
    assert os.listdir(path / "temporary") == []
    assert storage.stats()["used_bytes"] <= QUOTA_BYTES


def test_the_test_catches_an_engine_that_writes_in_place(tmp_path, seed):
    tally = kill_and_read("in place", tmp_path / "storage", seed, 10)
    assert tally.num_wrong > 0, tally


if __name__ == "__main__":
    write_for_ever(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
