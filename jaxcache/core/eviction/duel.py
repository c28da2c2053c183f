"""Whether what was learned pays: two caches of points, without pages, serve every request, one by each order.

    points of a prompt --> by value:  kept, kept, -       1 found
                      \\--> by use:    kept, kept, kept    2 found     lead -= 1

The lead says which order the real cache follows. It starts with least recently used, and is bounded by what one cache
holds, so that a change of habits is noticed in time.
"""

from __future__ import annotations

import numpy as np

BAND = 32  # with 3,200 points in a cache, what was learned decides from a lead of 100 on, until the lead is 0
EVIDENCE = 2  # the lead needed is at least two prompts of usual length: one hit more or less says nothing
LIMIT = 2  # with 3,200 points the lead stays within -1,600 and 1,600
SLACK = 32  # a cache of 3,200 points that is full drops 100 at once
STAMP_BITS = 48


class ShadowCache:
    """Which points one order would keep. resident: bool[slots]"""

    def __init__(self):
        self.resident = np.zeros(0, np.bool_)
        self.num_resident = 0

    def grow(self, num_slots: int) -> None:
        self.resident = np.concatenate([self.resident, np.zeros(num_slots - len(self.resident), np.bool_)])

    def leave(self, slots: np.ndarray) -> None:
        self.num_resident -= int(np.count_nonzero(self.resident[slots]))
        self.resident[slots] = False

    def use(self, slots: np.ndarray) -> int:
        """Returns how many of them, from the first on, were there; now all are."""
        there = self.resident[slots]
        num_there = int(np.count_nonzero(there))
        self.num_resident += len(slots) - num_there
        self.resident[slots] = True
        return len(slots) if num_there == len(slots) else int(np.argmin(there))

    def slots(self) -> np.ndarray:
        return np.flatnonzero(self.resident)

    def make_room(self, slots: np.ndarray, keys: np.ndarray, capacity: int) -> None:
        """Drops the slots with the smallest keys. Keys are all different, so every way to find them finds the same."""
        num_leaving = len(slots) - (capacity - capacity // SLACK)
        last = np.partition(keys, num_leaving - 1)[num_leaving - 1]
        self.leave(slots[keys <= last])


class SetDuel:
    """Of the order by value against the order by use, in a cache of `capacity_tokens`.

    lead: points that the former found and the latter did not; learned_leads: whether to follow the former
    """

    def __init__(self, capacity_tokens: int):
        self.capacity_tokens = capacity_tokens
        self.by_value, self.by_use = ShadowCache(), ShadowCache()
        self._num_prompts = 0
        self._num_points = 0
        self.lead = 0
        self.learned_leads = False

    def use(self, slots: np.ndarray, capacity: int) -> None:
        """A prompt with these points comes; `capacity` points fill the cache."""
        self._num_prompts += 1
        self._num_points += len(slots)
        band = max(capacity // BAND, EVIDENCE * self._num_points // self._num_prompts)
        limit = max(capacity // LIMIT, 2 * band)
        lead = self.lead + self.by_value.use(slots) - self.by_use.use(slots)
        self.lead = max(-limit, min(limit, lead))
        self.learned_leads = self.lead > (0 if self.learned_leads else band)

    def grow(self, num_slots: int) -> None:
        self.by_value.grow(num_slots)
        self.by_use.grow(num_slots)

    def forget(self, slots: np.ndarray) -> None:
        self.by_value.leave(slots)
        self.by_use.leave(slots)
