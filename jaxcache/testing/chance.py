"""Chance without a stream: a number that depends on nothing but what it is asked for; and how long everything takes.

So a run that is repeated with some of its input left out meets the same faults and delays where the rest is the same.
"""

from __future__ import annotations

from dataclasses import dataclass

MASK = (1 << 64) - 1


def mix(*values: int) -> int:
    """48 bits that look random: the same on every machine, under every hash seed."""
    h = 0x9E3779B97F4A7C15
    for value in values:
        h = ((h ^ value) * 0xBF58476D1CE4E5B9) & MASK
        h ^= h >> 31
    return ((h * 0x94D049BB133111EB) & MASK) >> 16


def number_of(key: bytes) -> int:
    """Of a page key, for `mix`."""
    return int.from_bytes(key[:8], "little")


@dataclass(frozen=True)
class Delays:
    """How long everything takes in virtual time, in microseconds: drawn between two bounds, for each rank anew.

    Bounds are [low, high): of one model step, one copy between device and host, one page of storage, one question.
    deadline_us: of a storage transfer
    rest_us:     how long the breaker stays open
    piece_pages: of one job of storage; num_threads: such jobs at a time
    declines:    whether ranks would now and then rather compute than fetch
    copies_inline: one of so many copies between device and host is done at once, where it may be; 0: none
    """

    seed: int = 0
    steps: tuple[int, int] = (1_000, 10_000)
    copies: tuple[int, int] = (100, 30_000)
    pages: tuple[int, int] = (100, 4_000)
    queries: tuple[int, int] = (100, 4_000)
    deadline_us: int = 150_000
    rest_us: int = 100_000
    piece_pages: int = 3
    num_threads: int = 2
    declines: bool = False
    copies_inline: int = 0

    def step_us(self, rank: int, step: int) -> int:
        return self._draw(self.steps, rank, step, 1)

    def copy_us(self, rank: int, step: int, page_id: int) -> int:
        return self._draw(self.copies, rank, step, page_id)

    def copies_at_once(self, rank: int, step: int, page_id: int) -> bool:
        """Whether a copy whose host pages no job uses is done at once, as it may be."""
        return self.copies_inline > 0 and not mix(self.seed, rank, step, page_id, 2) % self.copies_inline

    def page_us(self, rank: int, step: int, page_key: bytes) -> int:
        return self._draw(self.pages, rank, step, number_of(page_key))

    def query_us(self, rank: int, step: int, page_key: bytes) -> int:
        return self._draw(self.queries, rank, step, number_of(page_key))

    def _draw(self, bounds: tuple[int, int], *what: int) -> int:
        low, high = bounds
        return low + mix(self.seed, *what) % max(1, high - low)
