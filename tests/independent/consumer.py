"""Whoever listens to events: replays them into a set, and checks that each is true by itself."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import Any

from jaxcache.types import AllCleared, BlockRemoved, BlockStored, Event
from tests.independent.content import demand


class Consumer:
    """there: (tier, component, page key) of everything that was stored and not removed since."""

    def __init__(self):
        self.there: set[tuple[Any, str, bytes]] = set()

    def take(self, events: Iterable[Event]) -> None:
        for event in events:
            if isinstance(event, AllCleared):
                self.there.clear()
                continue
            places = {(event.tier, event.component, key) for key in event.page_keys}
            demand(len(places) == len(event.page_keys) > 0, "events", event)
            if isinstance(event, BlockRemoved):
                demand(places <= self.there, "events", "removed without having been stored:", event)
                self.there -= places
            else:
                demand(not places & self.there, "events", "stored twice:", event)
                self._check_keys(event)
                self.there |= places

    @staticmethod
    def _check_keys(event: BlockStored) -> None:
        """Every key is a hash of the one before and of its page."""
        key, page = event.parent_key, event.page_tokens
        demand(len(event.token_ids) == len(event.page_keys) * page, "events", event)
        for i, expected in enumerate(event.page_keys):
            key = sha256(key + event.token_ids[i * page : (i + 1) * page].tobytes()).digest()
            demand(key == expected, "events", event, "key", i)
