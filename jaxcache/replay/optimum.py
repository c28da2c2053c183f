"""How much of a trace any cache could find: the offline optimum, and a cache without end.

The optimum knows the future: the block whose next use is farthest leaves first, leaves before their parents. Blocks of
the trace are its units, cut to whole pages; the last victim is trimmed from its end, only as many pages as needed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from jaxcache.replay.traces import TraceRequest

NEVER = 1 << 60


class Block:
    """One block under one parent. uses: requests that contain it, in order; resident: tokens that are in the cache."""

    __slots__ = ("id", "next_use", "num_children", "parent", "resident", "uses")

    def __init__(self, id: int, parent: Block | None):
        self.id = id
        self.parent = parent
        self.uses: list[int] = []
        self.next_use = 0
        self.resident = 0
        self.num_children = 0  # resident ones


class Found(NamedTuple):
    """Prompt tokens that were found in the cache."""

    optimum: int
    infinite: int


def offline(requests: Sequence[TraceRequest], page_tokens: int, capacity_tokens: int, num_namespaces: int = 1) -> Found:
    """Tokens found over a whole trace, prompts only, one request after another; namespaces take turns."""
    return Optimum(requests, page_tokens, capacity_tokens, num_namespaces).run()


class Optimum:
    """free: tokens of capacity left. heap: (-next use, id) of leaves; what is out of date is skipped."""

    def __init__(self, requests: Sequence[TraceRequest], page_tokens: int, capacity_tokens: int, num_namespaces: int):
        self.requests = requests
        self.page_tokens = page_tokens
        self.free = capacity_tokens // page_tokens * page_tokens
        self.blocks: list[Block] = []
        self.heap: list[tuple[int, int]] = []
        self._by_place: dict[tuple[int, int], Block] = {}  # (parent's id, or -1 - namespace; block id)
        self.paths = [self._path(index, request, -1 - index % num_namespaces) for index, request in enumerate(requests)]

    def _path(self, index: int, request: TraceRequest, root_id: int) -> list[tuple[Block, int]]:
        """The blocks of a prompt with the whole pages of each, in tokens."""
        path = []
        parent = None
        num_tokens = self._whole_pages(request.input_length)
        for at, id in enumerate(request.block_ids):
            start = self._whole_pages(at * request.block_tokens)
            stop = min(num_tokens, self._whole_pages((at + 1) * request.block_tokens))
            place = (parent.id if parent else root_id, id)
            block = self._by_place.get(place)
            if block is None:
                block = self._by_place[place] = Block(len(self.blocks), parent)
                self.blocks.append(block)
            block.uses.append(index)
            path.append((block, max(0, stop - start)))
            parent = block
        return path

    def _whole_pages(self, num_tokens: int) -> int:
        return num_tokens // self.page_tokens * self.page_tokens

    def run(self) -> Found:
        optimum = infinite = 0
        seen = [0] * len(self.blocks)
        for block in self.blocks:
            block.uses.reverse()
        for request, path in zip(self.requests, self.paths, strict=True):
            limit = self._whole_pages(request.input_length - 1)
            optimum += self._leading(path, limit, [block.resident for block, _ in path])
            infinite += self._leading(path, limit, [seen[block.id] for block, _ in path])
            for block, size in path:
                seen[block.id] = max(seen[block.id], size)
            self._serve(path)
        return Found(optimum, infinite)

    @staticmethod
    def _leading(path: list[tuple[Block, int]], limit: int, sizes: list[int]) -> int:
        """Tokens found from the start on: a block that is not there whole ends it."""
        found = 0
        for (_, wanted), size in zip(path, sizes, strict=True):
            found += min(wanted, size)
            if size < wanted:
                break
        return min(found, limit)

    def _serve(self, path: list[tuple[Block, int]]) -> None:
        """The prompt's pages come in, and others leave for them; then its own may leave as well."""
        on_path = {block.id for block, _ in path}
        for block, _ in path:
            block.uses.pop()
            block.next_use = block.uses[-1] if block.uses else NEVER
        for block, size in path:
            missing = size - block.resident
            if missing <= 0:
                continue
            if self.free < missing:
                self._make_room(missing, on_path)
            if self.free < missing:
                break
            self.free -= missing
            if not block.resident and block.parent is not None:
                block.parent.num_children += 1
            block.resident = size
        for block, _ in path:
            if block.resident and not block.num_children:
                self._candidate(block)

    def _candidate(self, block: Block) -> None:
        heapq.heappush(self.heap, (-block.next_use, block.id))

    def _make_room(self, missing: int, pinned: set[int]) -> None:
        later = []
        while self.free < missing and self.heap:
            entry = heapq.heappop(self.heap)
            block = self.blocks[entry[1]]
            if not block.resident or block.num_children or -entry[0] != block.next_use:
                continue
            if block.id in pinned:
                later.append(entry)
                continue
            leaving = min(block.resident, missing - self.free)
            block.resident -= leaving
            self.free += leaving
            if block.resident:
                heapq.heappush(self.heap, entry)
            elif block.parent is not None:
                block.parent.num_children -= 1
                if not block.parent.num_children:
                    self._candidate(block.parent)
        for entry in later:
            heapq.heappush(self.heap, entry)
