"""The free page ids of one (component, tier): a stack of int32 in one array, so that taking and giving n is a slice."""

from __future__ import annotations

import numpy as np

from jaxcache.types import PageIds


class PageAllocator:
    """Ids 0 .. num_pages - 1. The ids below `num_free` in `stack` are free; the next to go is on top."""

    __slots__ = ("num_free", "num_pages", "stack")

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.stack = np.arange(num_pages - 1, -1, -1, dtype=np.int32)
        self.num_free = num_pages

    def allocate(self, n: int) -> PageIds:
        """n free ids; the caller has made sure that they are there."""
        page_ids = np.empty(n, np.int32)
        self.allocate_into(page_ids)
        return page_ids

    def allocate_into(self, page_ids: PageIds) -> None:
        """The same, written into an array of the caller."""
        high = self.num_free
        low = high - len(page_ids)
        assert low >= 0, f"I1: {len(page_ids)} pages of {high} free"
        page_ids[:] = self.stack[low:high]
        self.num_free = low

    def free(self, page_ids: PageIds) -> None:
        n = len(page_ids)
        assert self.num_free + n <= self.num_pages, f"I1: freed more than there are: {n=} {self.num_free=}"
        self.stack[self.num_free : self.num_free + n] = page_ids
        self.num_free += n

    def free_ids(self) -> PageIds:
        return self.stack[: self.num_free]
