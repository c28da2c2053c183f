"""The engines that come with jaxcache do what every storage engine does."""

from __future__ import annotations

from pathlib import Path

from jaxcache.storage.base import Storage
from jaxcache.storage.file import FileStorage
from jaxcache.storage.memory import MemoryStorage
from tests.storage.contract import StorageContract


class TestMemory(StorageContract):
    def make(self, folder: Path) -> Storage:
        return MemoryStorage()


class TestFile(StorageContract):
    def make(self, folder: Path) -> Storage:
        return FileStorage(folder / "storage")
