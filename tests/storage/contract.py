"""What every storage engine does, whichever it is."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from jaxcache.storage.base import ObjectKey, Storage
from jaxcache.storage.memory import MemoryStorage
from jaxcache.storage.record import HEADER_BYTES
from tests.storage.values import KEY, OTHERS, content, get, put


class StorageContract(ABC):
    """The tests of one engine: `class TestFile(StorageContract)` says in `make` how it is opened."""

    @abstractmethod
    def make(self, folder: Path) -> Storage:
        """An empty storage. folder: for what it keeps"""

    @pytest.fixture
    def storage(self, tmp_path) -> Storage:
        return self.make(tmp_path)

    @pytest.mark.parametrize("num_bytes", [1, 7, 4095, 4096, 4097, 65536, 1 << 20, (1 << 20) + 1])
    def test_round_trip(self, storage, num_bytes):
        assert put(storage, KEY, content(num_bytes))
        assert get(storage, KEY, num_bytes) == content(num_bytes)
        assert storage.stats()["hits"] == 1

    def test_a_view_of_any_format_is_its_bytes(self, storage):
        value = content(64)
        assert storage.put(KEY, memoryview(value).cast("I", (4, 4)))
        buffer = bytearray(64)
        assert storage.get(KEY, memoryview(buffer).cast("d", (2, 2, 2)))
        assert buffer == value

    @pytest.mark.parametrize("buffer", [memoryview(bytearray()), memoryview(bytearray(8))[::2]], ids=["empty", "gaps"])
    def test_no_value_is_empty_or_has_gaps(self, storage, buffer):
        with pytest.raises(ValueError, match="nbytes"):
            storage.put(KEY, buffer)
        with pytest.raises(ValueError, match="nbytes"):
            storage.get(KEY, buffer)

    def test_a_page_key_has_32_bytes(self):
        with pytest.raises(ValueError, match="32"):
            ObjectKey(b"short", "full", "")

    def test_missing(self, storage):
        assert get(storage, KEY, 8) is None
        assert storage.exists([KEY, *OTHERS]) == [False] * 4
        assert storage.exists([]) == []

    @pytest.mark.parametrize("num_bytes", [1, 99, 101, 100 + HEADER_BYTES])
    def test_another_size_is_a_miss_and_harms_nothing(self, storage, num_bytes):
        assert put(storage, KEY, content(100))
        assert get(storage, KEY, num_bytes) is None
        assert get(storage, KEY, 100) == content(100)

    def test_the_first_writer_wins(self, storage):
        assert put(storage, KEY, content(100, seed=1))
        assert put(storage, KEY, content(100, seed=2))
        assert get(storage, KEY, 100) == content(100, seed=1)
        assert storage.stats()["puts"] == 2
        assert storage.stats()["duplicates"] == 1

    @pytest.mark.parametrize("other", OTHERS, ids=["page key", "component", "cell"])
    def test_every_part_of_a_key_counts(self, storage, other):
        assert put(storage, KEY, content(100, seed=1))
        assert get(storage, other, 100) is None
        assert put(storage, other, content(100, seed=2))
        assert storage.exists([KEY, other]) == [True, True]
        assert get(storage, KEY, 100) == content(100, seed=1)
        assert get(storage, other, 100) == content(100, seed=2)

    def test_buffers_are_copied(self, storage):
        value = bytearray(content(100))
        assert storage.put(KEY, memoryview(value))
        value[:] = bytes(100)
        first, second = bytearray(100), bytearray(100)
        assert storage.get(KEY, memoryview(first))
        first[:] = bytes(100)
        assert storage.get(KEY, memoryview(second))
        assert second == content(100)

    def test_clear(self, storage):
        for key in (KEY, *OTHERS):
            assert put(storage, key, content(100))
        storage.clear()
        assert storage.exists([KEY, *OTHERS]) == [False] * 4
        assert get(storage, KEY, 100) is None
        assert storage.stats()["used_bytes"] == 0
        assert put(storage, KEY, content(100))
        assert get(storage, KEY, 100) == content(100)

    def test_threads_see_whole_values_of_one_writer(self, storage):
        keys = [replace(KEY, page_key=bytes([i]) * 32) for i in range(20)]
        start = threading.Barrier(4)

        def work(seed: int) -> set[bytes | None]:
            start.wait()
            seen = set()
            for key in keys:
                assert put(storage, key, bytes([seed]) * 50_000)
                seen.add(get(storage, key, 50_000))
            return seen

        with ThreadPoolExecutor(4) as pool:
            seen = set().union(*pool.map(work, range(4)))
        assert seen <= {bytes([seed]) * 50_000 for seed in range(4)}  # and no miss
        stats = storage.stats()
        assert (stats["puts"], stats["duplicates"], stats["gets"], stats["hits"]) == (80, 60, 80, 80)

    def test_x12_names_are_keyed_hashes(self, storage, tmp_path):
        name = storage.object_name(KEY)
        assert len(bytes.fromhex(name)) == 32
        assert len({name, *(storage.object_name(key) for key in OTHERS)}) == 4
        parts_run_together = replace(KEY, component="ful", cell="l" + KEY.cell)
        assert storage.object_name(parts_run_together) != name
        assert len(storage.secret) == 32
        other = MemoryStorage()
        assert other.secret != storage.secret
        assert other.object_name(KEY) != name
        assert not any(KEY.page_key.hex()[i : i + 8] in name for i in range(57))
