"""How long everything takes in virtual time, in microseconds: drawn by `mix` between two bounds, for each rank anew."""

from __future__ import annotations

from dataclasses import dataclass

from jaxcache.testing.mixing import mix


@dataclass(frozen=True)
class Delays:
    """Bounds of each, [low, high): one model step, one copy between device and host, one page of storage, one question.

    deadline_us: of a storage transfer
    rest_us:     how long the breaker stays open
    piece_pages: pages of storage that are moved as one; num_threads: pieces of one transfer at a time
    declines:    whether ranks would now and then rather compute than fetch
    """

    seed: int = 0
    steps: tuple[int, int] = (1_000, 10_000)
    copies: tuple[int, int] = (100, 30_000)
    pages: tuple[int, int] = (100, 4_000)
    queries: tuple[int, int] = (100, 20_000)
    deadline_us: int = 150_000
    rest_us: int = 100_000
    piece_pages: int = 3
    num_threads: int = 2
    declines: bool = False

    def step_us(self, rank: int, step: int) -> int:
        return self._draw(self.steps, rank, step, 1)

    def copy_us(self, rank: int, step: int, page_id: int) -> int:
        return self._draw(self.copies, rank, step, page_id)

    def page_us(self, rank: int, transfer_id: int, place: int) -> int:
        return self._draw(self.pages, rank, transfer_id, place)

    def query_us(self, rank: int, transfer_id: int) -> int:
        return self._draw(self.queries, rank, transfer_id, 0)

    def place(self, step: int, num_places: int) -> int:
        """Which one, the same on every rank."""
        return mix(self.seed, step) % num_places

    def _draw(self, bounds: tuple[int, int], *what: int) -> int:
        low, high = bounds
        return low + mix(self.seed, *what) % max(1, high - low)
