"""Staging arrays that have been read, for the load-backs to come."""

from __future__ import annotations

from collections import defaultdict, deque

import jax

Staging = dict[str, jax.Array]  # by the first field of a stack: [bucket, *padded shape of the stack]


class SpareStaging:
    """Of each component at most `max_pages` pages, the newest: as much as one load-back of that size takes."""

    def __init__(self, max_pages: int):
        self._max_pages = max_pages
        self._spares: defaultdict[str, deque[tuple[int, Staging]]] = defaultdict(deque)

    def take(self, component: str, bucket: int) -> Staging | None:
        """Arrays of so many pages, and nobody else's; None if there are none."""
        spares = self._spares[component]
        for i, (num_pages, staging) in enumerate(spares):
            if num_pages == bucket:
                del spares[i]
                return staging
        return None

    def add(self, component: str, bucket: int, staging: Staging) -> None:
        """staging: [bucket, ...], the caller's alone; is computed once the program that reads it has ended"""
        spares = self._spares[component]
        spares.append((bucket, staging))
        while sum(num_pages for num_pages, _ in spares) > self._max_pages:
            spares.popleft()
