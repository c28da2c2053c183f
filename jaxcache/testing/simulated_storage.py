"""One storage that all ranks share: one cell per page, component and rank. Values are checked like real ones.

value = | row | crc32 |      what does not fit its checksum is a miss, and may be written again
"""

from __future__ import annotations

from zlib import crc32

from jaxcache.testing.page_content import RANK, page_content

CHECKSUM_BYTES = 4


class SimulatedStorage:
    """capacity: cells of a rank and component; the oldest leave, on each rank when its own puts push them out."""

    def __init__(self, num_ranks: int, num_components: int, capacity: int = 10_000):
        self.capacity = capacity
        self.cells: list[list[dict[bytes, bytes]]] = [[{} for _ in range(num_components)] for _ in range(num_ranks)]

    def exists(self, rank: int, c: int, keys: tuple[bytes, ...]) -> list[bool]:
        """Whether a cell is there, whole or not."""
        cells = self.cells[rank][c]
        return [key in cells for key in keys]

    def put(self, rank: int, c: int, key: bytes, row: bytes, is_torn: bool = False) -> None:
        """First writer wins, unless what is there is broken. is_torn: the writer dies half-way."""
        cells = self.cells[rank][c]
        there = cells.get(key)
        if there is not None and (is_torn or checked(there) is not None):
            return
        value = row + crc32(row).to_bytes(CHECKSUM_BYTES)
        cells[key] = value[: len(value) // 2] if is_torn else value
        if len(cells) > self.capacity:
            del cells[next(iter(cells))]

    def put_share(self, rank: int, c: int, key: bytes, is_torn: bool = False) -> None:
        """What somebody else has computed and stored."""
        self.put(rank, c, key, page_content(c, key) + RANK[rank], is_torn)

    def clear(self) -> None:
        """Empties it for all ranks, whoever asks."""
        for components in self.cells:
            for cells in components:
                cells.clear()

    def get(self, rank: int, c: int, key: bytes) -> bytes | None:
        """The value as it is, whole or not."""
        return self.cells[rank][c].get(key)


def checked(value: bytes) -> bytes | None:
    """The row in a value, or None if it is broken."""
    row, checksum = value[:-CHECKSUM_BYTES], value[-CHECKSUM_BYTES:]
    return row if crc32(row).to_bytes(CHECKSUM_BYTES) == checksum else None


def corrupted(value: bytes) -> bytes:
    """With one bit turned."""
    return bytes([value[0] ^ 1]) + value[1:]
