"""Staging arrays that have been read, for the load-backs to come."""

from __future__ import annotations

from collections import defaultdict, deque

import jax

Staging = dict[str, jax.Array]  # by the first field of a stack: [bucket, *padded shape of the stack]


class SpareStaging:
    """Of each component at most `max_pages` pages, those that were read last.

    The newest of a size stays: its reader may have been dispatched a moment ago, behind a model step that runs. So
    where every step has a load-back, two take turns.
    """

    def __init__(self, max_pages: int):
        self._max_pages = max_pages
        self._spares: defaultdict[str, deque[tuple[int, Staging]]] = defaultdict(deque)

    def take(self, component: str, bucket: int) -> Staging | None:
        """Arrays of so many pages, and nobody else's; None if there are none to spare."""
        spares = self._spares[component]
        places = [i for i, (num_pages, _) in enumerate(spares) if num_pages == bucket]
        if len(places) < 2:
            return None
        _, staging = spares[places[0]]
        del spares[places[0]]
        return staging

    def add(self, component: str, bucket: int, staging: Staging) -> None:
        """staging: [bucket, ...], the caller's alone; is computed once the program that reads it has ended"""
        spares = self._spares[component]
        spares.append((bucket, staging))
        while sum(num_pages for num_pages, _ in spares) > self._max_pages:
            spares.popleft()

    def clear(self) -> None:
        self._spares.clear()
