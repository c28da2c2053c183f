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
        return self.allocate_view(n).copy()

    def allocate_view(self, n: int) -> PageIds:
        """The same as a view, to be copied before anything is freed."""
        high = self.num_free
        self.num_free = low = high - n
        assert low >= 0, f"I1: {n=} pages of {high} free"
        return self.stack[low:high]

    def allocate_one(self) -> int:
        """A free id; the caller has made sure that there is one."""
        assert self.num_free, "I1: no page is free"
        self.num_free -= 1
        return self.stack.item(self.num_free)

    def free_one(self, page_id: int) -> None:
        assert self.num_free < self.num_pages, f"I1: freed more than there are: {page_id=}"
        self.stack[self.num_free] = page_id
        self.num_free += 1

    def free(self, page_ids: PageIds) -> None:
        """More than there are do not fit into the stack: ValueError."""
        low = self.num_free
        self.num_free = high = low + len(page_ids)
        self.stack[low:high] = page_ids

    def free_ids(self) -> PageIds:
        return self.stack[: self.num_free]
