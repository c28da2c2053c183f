"""A new kind of state is one file: the class `Chunk`, were it in the folder jaxcache/core/kinds.

Chunked attention, as in Llama 4: text is cut into chunks, and a token sees what is before it in its own chunk.

    | chunk 0 . . . . . . | chunk 1 . . . . . . |         resuming at n needs [c, n)
                          c           n
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import pytest

from jaxcache.components import FullAttention, RecurrentState
from jaxcache.components.base import Component
from jaxcache.core.kinds.window import Suffix
from jaxcache.types import Span
from tests.core import driver
from tests.core.helpers import FULL, PAGE, Server, prompt


@dataclass(frozen=True)
class ChunkedAttention(Component):
    """Keys and values of the chunk that is being read."""

    chunk_tokens: int = 8192
    kind: ClassVar[str] = "my_chunk"

    def required(self, n: int) -> Span:
        return Span(n // self.chunk_tokens * self.chunk_tokens, n)


class Chunk(Suffix, name="my_chunk"):
    """In whole pages. At the end of a chunk all of it is needed, and nothing just behind."""

    component: ChunkedAttention

    def first_needed(self, n: int) -> int:
        return self.component.required(n).start // self.page_tokens * self.page_tokens

    def num_reserved_pages(self, start: int, end: int) -> int:
        return self.num_entry_pages(min(end, self.component.chunk_tokens + self.page_tokens))


CHUNK = ChunkedAttention("chunk", (), chunk_tokens=4 * PAGE)


def test_a_request_resumes_with_the_pages_of_its_chunk():
    """Five pages of two chunks: page 4 alone is needed of the second; at its start, none at all."""
    server = Server(FULL, CHUNK)
    server.prefill(prompt(5 * PAGE))
    assert server.match(prompt(5 * PAGE)).device_tokens == 5 * PAGE
    lease = server.admit(prompt(6 * PAGE))
    assert lease.num_cached_tokens == 5 * PAGE
    table = lease.page_tables["chunk"].tolist()
    nothing = server.core.tiers.device[1].allocator.num_pages
    assert table[:4] == [nothing] * 4 and nothing not in table[4:]
    server.core.release(lease)


def test_a_chunk_that_is_gone_is_a_shorter_hit():
    """Where the next one begins nothing of it is needed."""
    server = Server(FULL, CHUNK, device_pages={"full": 64, "chunk": 8})
    server.prefill(prompt(7 * PAGE))
    server.prefill(prompt(8 * PAGE, 5000))
    assert server.match(prompt(7 * PAGE)).device_tokens == 4 * PAGE


def test_pages_of_a_chunk_that_is_read_are_given_back():
    """A prompt of 20 chunks takes pages for one or two at a time."""
    server = Server(FULL, CHUNK, device_pages={"full": 100, "chunk": 12})
    lease = server.admit(prompt(80 * PAGE), chunk=4 * PAGE)
    for end in range(4 * PAGE, 80 * PAGE, 4 * PAGE):
        server.compute(lease, end)
        assert server.core.grow(lease, end, 4 * PAGE)
    server.compute(lease, 80 * PAGE)
    server.insert(lease, 80 * PAGE)
    server.release(lease)
    assert server.match(prompt(80 * PAGE)).device_tokens == 80 * PAGE


def serve_at_random(seed: int, monkeypatch: pytest.MonkeyPatch) -> driver.Run:
    """All tiers, two ranks, splits and faults: a hit reads what a miss would have written, every time."""

    def components(rng: random.Random, kinds: Sequence[str], page_tokens: int) -> tuple[Component, ...]:
        size = rng.choice([1, 3, page_tokens, 2 * page_tokens, 3 * page_tokens + 1, 5 * page_tokens])
        chunk = ChunkedAttention("chunk", (), chunk_tokens=size)
        made = {"full": FullAttention("full", ()), "chunk": chunk, "state": RecurrentState("state", ())}
        return tuple(made[kind] for kind in kinds)

    monkeypatch.setattr(driver, "draw_components", components)
    mixture = [("full", "chunk"), ("full", "chunk", "state"), ("chunk",)][seed % 3]
    return driver.drive(seed, 150, mixture=mixture)


@pytest.mark.parametrize("seed", range(12))
def test_random_serving_goes_well_with_it(seed, monkeypatch):
    counters = serve_at_random(seed, monkeypatch).counters
    assert counters["duplicate_pages"] + counters["evicted_pages"]


def test_the_fuzz_notices_a_chunk_that_lacks_its_first_page(monkeypatch):
    original = Chunk.first_needed
    monkeypatch.setattr(Chunk, "first_needed", lambda self, n: min(n, original(self, n) + self.page_tokens))
    with pytest.raises((AssertionError, IndexError)):  # another page is read, or none
        list(map(partial(serve_at_random, monkeypatch=monkeypatch), range(12)))
