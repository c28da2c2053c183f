"""Keys and values that the storage tests share."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from jaxcache.storage.base import ObjectKey, Storage
from jaxcache.storage.file import FileStorage
from jaxcache.storage.record import HEADER_BYTES

ROOT = Path(__file__).parents[2]

KEY = ObjectKey(bytes(range(32)), "full", "kv:float32[4,2,16]@0:2,:,0:8")
OTHERS = [replace(KEY, page_key=bytes(32)), replace(KEY, component="window"), replace(KEY, cell="kv:float32[4]@0:1")]
VALUE_BYTES = 10_000
FILE_BYTES = HEADER_BYTES + VALUE_BYTES


def content(num_bytes: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(num_bytes)


def put(storage: Storage, key: ObjectKey, value: bytes) -> bool:
    return storage.put(key, memoryview(value))


def get(storage: Storage, key: ObjectKey, num_bytes: int) -> bytes | None:
    buffer = bytearray(b"\xa5" * num_bytes)
    return bytes(buffer) if storage.get(key, memoryview(buffer)) else None


def key_of(i: int) -> ObjectKey:
    return ObjectKey(i.to_bytes(32, "big"), "full", "cell")


def value_of(i: int) -> bytes:
    return bytes([i % 256]) * VALUE_BYTES


def put_numbered(storage: FileStorage, i: int) -> bool:
    return storage.put(key_of(i), memoryview(value_of(i)))


def get_numbered(storage: FileStorage, i: int) -> bool:
    buffer = bytearray(VALUE_BYTES)
    is_hit = storage.get(key_of(i), memoryview(buffer))
    assert not is_hit or buffer == value_of(i)
    return is_hit


def path_of(storage: FileStorage, i: int) -> str:
    name = storage.object_name(key_of(i))
    return f"{storage.path}/values/{name[:2]}/{name}"


def age(storage: FileStorage, i: int, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path_of(storage, i), (then, then))


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
