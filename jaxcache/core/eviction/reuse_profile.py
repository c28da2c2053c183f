"""What is known about the reuse of prefixes, also of those that left: the memory of the policies that learn.

Every `stride` tokens of a prompt there is a point, known by its position and the tokens before it. A point remembers
its uses; from all points together the profile learns how likely the next use is, by kind of page and by age:

    kind:   how often it was used, and what share of the last prompt was known already  (a conversation that goes on)
            how often it was used, and how long the last pause was                      (fast ones stay fast)
    age:    tokens of prompts since the last use, in steps of half an octave

Whether that pays is tried out on the points as well (core/eviction/duel.py).

Uses and exposure (points at risk x tokens) are counted per (kind, age) in integers, so every rank learns the same.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple
from zlib import crc32

import numpy as np

from jaxcache.core.eviction.duel import STAMP_BITS, SetDuel
from jaxcache.core.node import Node
from jaxcache.core.tokens import Sequence

MIN_STRIDE_TOKENS = 256
MAX_POINTS = 1 << 18
MIN_POINTS = 1024  # that the device holds, unless pages are larger
REMEMBERED = 8  # times the largest tier, in tokens of points
CONTEXT_BYTES = 128  # tokens that tell points at the same position apart
USES, SHARES, PAUSES = 4, 6, 8  # how many of each a kind tells apart; the last share is generated text
NUM_KINDS = USES * SHARES * PAUSES
GENERATED = SHARES - 1
MAX_OVERFULL = 1.25  # with room for 1,000 points, 1,250 are kept between two recounts
RECOUNTS = 4  # while as many tokens come as the device holds
HALVE_REQUESTS = 4096  # older counts weigh half
AGES_BELOW, AGES_ABOVE = 4, 4  # octaves around the capacity of the device that ages tell apart


class Use(NamedTuple):
    """What the profile says of a node. Times are tokens of prompts.

    at: when it was used last; born: when it came into the cache
    count: uses before the last one, as far as remembered; kind: one of NUM_KINDS
    """

    at: int
    born: int
    count: int
    kind: int


class ReuseProfile:
    """now: tokens of prompts so far. value: np.ndarray[NUM_KINDS, ages], how much keeping such a page is worth.

    version: changes with `value`; duels: one for each tier
    """

    def __init__(self, page_tokens: int, device_tokens: int, host_tokens: int, outputs_first: bool):
        largest_tokens = max(device_tokens, host_tokens)
        self.outputs_first = outputs_first
        self.duels = SetDuel(device_tokens), SetDuel(host_tokens)
        self.stride = max(page_tokens, min(MIN_STRIDE_TOKENS, device_tokens // MIN_POINTS // page_tokens * page_tokens))
        while REMEMBERED * largest_tokens // self.stride > MAX_POINTS:
            self.stride *= 2
        self.max_points = max(1024, REMEMBERED * largest_tokens // self.stride)
        self.device_tokens = device_tokens
        self.edges = age_edges(device_tokens, max(largest_tokens, device_tokens))
        self.now = 0
        self.version = 0
        self._slots: dict[int, int] = {}  # point -> its place in the arrays
        self._point_of: list[int] = []  # the other way round; of a free place, the point that was there
        self._free: list[int] = []
        self._at = np.zeros(0, np.int64)
        self._count = np.zeros(0, np.int64)  # -1: the place is free
        self._kind = np.zeros(0, np.int64)
        self._stamp = np.zeros(0, np.int64)  # order of uses, all different: of one prompt, the first point's is latest
        self._num_uses = 0
        self._num_tokens = 0  # that these uses stand for
        num_ages = len(self.edges) + 1
        self._edges = np.array(self.edges, np.int64)
        self._uses = np.zeros((NUM_KINDS, num_ages), np.int64)
        self._exposure = np.zeros((NUM_KINDS, num_ages), np.int64)
        self._num_requests = 0
        self._counted = 0  # time of the last recount
        self._learn()

    def age(self, at: int) -> int:
        """The step of age of something that was used last at a time."""
        return bisect_left(self.edges, self.now - at)

    # ---- what requests tell

    def admitted(self, sequence: Sequence, last: Node) -> None:
        """A request comes with a prompt: counts its points as used, and tells the nodes that it found."""
        if not sequence.uses:
            self._num_requests += 1
            if self.now - self._counted >= self.device_tokens // RECOUNTS:
                self._recount()
            self._num_tokens += sequence.num_tokens
            self._observe(sequence, sequence.num_tokens, generated=False)
            self.now += sequence.num_tokens
        node = last
        while node.parent is not None:
            self._tell(sequence, node)
            node = node.parent

    def inserted(self, sequence: Sequence, last: Node, start: int) -> None:
        """A request has computed what follows `start`, up to a node: tells its nodes."""
        self._observe(sequence, last.end, generated=True)
        node = last
        while node.parent is not None and node.end > start:
            self._tell(sequence, node)
            node = node.parent

    def arrived(self, node: Node) -> None:
        """A node came from storage, and nobody has used it yet."""
        node.use = Use(self.now, self.now, 0, kind(0, 0, 0))

    def _tell(self, sequence: Sequence, node: Node) -> None:
        """A node is what the last point in it is, or, if there is none, the point before it."""
        uses = sequence.uses
        place = min(node.end // self.stride, len(uses)) - 1
        born = self.now if node.use is None else node.use.born
        if place < 0:
            node.use = Use(self.now, born, node.hits, kind(min(node.hits, USES - 1), 0, 0))
        else:
            at, count, kind_ = uses[place]
            node.use = Use(at, born, count, kind_)

    def _observe(self, sequence: Sequence, end: int, generated: bool) -> None:
        """Uses of the points of a sequence up to `end` that were not counted yet."""
        first = len(sequence.uses)
        points = self._points(sequence, first, end // self.stride)
        if not points:
            return
        slots = [self._slots.get(point, -1) for point in points]
        num_known = next((i for i, slot in enumerate(slots) if slot < 0), len(slots))
        for i, slot in enumerate(slots):
            if slot < 0:
                slots[i] = self._new_slot(points[i])
        place = np.array(slots)
        count = self._count[place]
        if generated:
            self._num_tokens += len(points) * self.stride
        known = count >= 0
        pause = self.now - self._at[place]
        np.add.at(self._uses, (self._kind[place][known], np.searchsorted(self._edges, pause[known])), 1)
        count += 1
        share = GENERATED if generated else 4 * num_known // len(points)
        pauses = np.where(known, self._pause_class(pause), 0)
        kinds = kind(np.minimum(count, USES - 1), share, pauses)
        self._at[place], self._count[place], self._kind[place] = self.now, count, kinds
        self._num_uses += len(points)
        self._stamp[place] = np.arange(self._num_uses, self._num_uses - len(points), -1)
        self._duel(place)
        self._cut(sequence, first, np.minimum(count, USES - 1))
        columns = zip(count.tolist(), kinds.tolist(), strict=True)
        sequence.uses += [(self.now, c, k) for c, k in columns]
        if len(self._slots) > self.max_points * MAX_OVERFULL:
            self._forget()

    def _cut(self, sequence: Sequence, first: int, levels: np.ndarray) -> None:
        """Nodes end where the number of uses changes: what leaves first should not take along what was used more."""
        ends = (first + 1 + np.flatnonzero(np.diff(levels))) * (self.stride * 4) // sequence.page_bytes
        sequence.cuts += (ends * (sequence.page_bytes // 4)).tolist()

    def _duel(self, place: np.ndarray) -> None:
        """Both orders serve the points; a point stands for as many tokens as there were for each so far."""
        for duel in self.duels:
            capacity = duel.capacity_tokens * self._num_uses // self._num_tokens
            if not capacity:
                continue
            duel.use(place, capacity)
            if duel.by_use.num_resident > capacity:
                slots = duel.by_use.slots()
                duel.by_use.make_room(slots, self._by_use(slots), capacity)
            if duel.by_value.num_resident > capacity:
                slots = duel.by_value.slots()
                duel.by_value.make_room(slots, self._by_value(slots), capacity)

    def _by_use(self, slots: np.ndarray) -> np.ndarray:
        """The order of lru; generated text first if the cache is configured so."""
        is_generated = self._kind[slots] // PAUSES % SHARES == GENERATED
        return self._stamp[slots] - (is_generated & self.outputs_first) * (1 << STAMP_BITS)

    def _by_value(self, slots: np.ndarray) -> np.ndarray:
        ages = np.searchsorted(self._edges, self.now - self._at[slots])
        return self._rank[self._kind[slots], ages] * (1 << STAMP_BITS) + self._stamp[slots]

    def _points(self, sequence: Sequence, first: int, stop: int) -> list[int]:
        data, stride = sequence.data, self.stride * 4
        base = sequence.root.id << 64
        ends = range((first + 1) * stride, (stop + 1) * stride, stride)
        return [base | end << 32 | crc32(data[max(0, end - CONTEXT_BYTES) : end]) for end in ends]

    def _pause_class(self, pause: np.ndarray) -> np.ndarray:
        """1 .. PAUSES - 1, in octaves: up to a quarter of the device's capacity, ..., more than 8 times."""
        octaves = self.device_tokens * np.array([1, 2, 4, 8, 16, 32]) // 4
        return 1 + np.searchsorted(octaves, pause)

    def _new_slot(self, point: int) -> int:
        if not self._free:
            old, new = len(self._at), max(1024, 2 * len(self._at))
            for name in ("_at", "_count", "_kind", "_stamp"):
                grown = np.full(new, -1, np.int64)
                grown[:old] = getattr(self, name)
                setattr(self, name, grown)
            self._point_of += [-1] * (new - old)
            self._free = list(range(new - 1, old - 1, -1))
            for duel in self.duels:
                duel.grow(new)
        slot = self._slots[point] = self._free.pop()
        self._point_of[slot] = point
        return slot

    def _used_slots(self) -> np.ndarray:
        return np.flatnonzero(self._count >= 0)

    # ---- what is learned from it

    def _recount(self) -> None:
        """Adds the exposure since the last time, forgets the oldest points, and values every kind and age anew."""
        if len(self._slots) > self.max_points:
            self._forget()
        slots = self._used_slots()
        ages = np.searchsorted(self._edges, self.now - self._at[slots])
        cells = self._kind[slots] * self._exposure.shape[1] + ages
        at_risk = np.bincount(cells, minlength=self._exposure.size).reshape(self._exposure.shape)
        self._exposure += at_risk * (self.now - self._counted)
        self._counted = self.now
        if self._num_requests >= HALVE_REQUESTS:
            self._num_requests = 0
            self._uses >>= 1
            self._exposure >>= 1
        self._learn()

    def _forget(self) -> None:
        """The points used longest ago, of one prompt the last ones first, until a tenth is free."""
        slots = self._used_slots()
        stamps = self._stamp[slots]
        num_leaving = len(slots) - self.max_points * 9 // 10
        last = np.partition(stamps, num_leaving - 1)[num_leaving - 1]  # stamps differ: one set, however it is found
        leaving = slots[stamps <= last]
        self._count[leaving] = -1
        freed = leaving.tolist()
        for slot in freed:
            del self._slots[self._point_of[slot]]
        self._free += freed
        for duel in self.duels:
            duel.forget(leaving)

    def _learn(self) -> None:
        uses = self._uses.reshape(USES, SHARES, PAUSES, -1)
        exposure = self._exposure.reshape(uses.shape)
        pooled = hazard(uses.sum((0, 1, 2)), exposure.sum((0, 1, 2)), self._prior())
        by_share = index(hazard(uses.sum(2), exposure.sum(2), pooled), self._widths())
        by_pause = index(hazard(uses.sum(1), exposure.sum(1), pooled), self._widths())
        self.value = (by_share[:, :, None] * by_pause[:, None]).reshape(NUM_KINDS, -1)
        self._rank = np.unique(self.value, return_inverse=True)[1].reshape(self.value.shape)
        self.version += 1

    def _widths(self) -> np.ndarray:
        """Tokens that an age step lasts."""
        return np.diff(self._edges, prepend=0, append=2 * self._edges[-1])

    def _prior(self) -> np.ndarray:
        """Before anything was seen: the longer ago, the less likely, as lru believes."""
        middle = self._widths() / 2 + np.append(0, self._edges)
        return 1 / (4 * (middle + self._edges[0]))


def kind(uses, share, pause):
    """Number of a kind; also for arrays."""
    return (uses * SHARES + share) * PAUSES + pause


def age_edges(device_tokens: int, largest_tokens: int) -> list[int]:
    """Ages in half octaves, from well below the device's capacity to well above the largest tier's."""
    edges, edge = [], max(4, device_tokens >> AGES_BELOW)
    while edge <= largest_tokens << AGES_ABOVE:
        edges += [edge, edge * 3 // 2]
        edge *= 2
    return edges


def hazard(uses: np.ndarray, exposure: np.ndarray, prior: np.ndarray) -> np.ndarray:
    """Uses per token at risk; the prior weighs as much as one use."""
    return (uses + 1.0) / (exposure + 1.0 / prior)


def index(hazards: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Gittins's index of keeping a page from each age on: the best ratio, over all times to give up, of the chance of a
    use to the time that it is kept for it. Only exact arithmetic and division, so every rank has the same bits.
    """
    chance = hazards * widths / (1 + hazards * widths)  # of a use within an age step
    survival = np.cumprod(np.concatenate([np.ones_like(chance[..., :1]), 1 - chance[..., :-1]], -1), -1)
    survival = np.maximum(survival, 1e-9)
    zero = np.zeros_like(chance[..., :1])
    gain = np.concatenate([zero, np.cumsum(survival * chance, -1)], -1)
    cost = np.concatenate([zero, np.cumsum(survival * chance / hazards, -1)], -1)
    gains = gain[..., None, 1:] - gain[..., :-1, None]
    costs = cost[..., None, 1:] - cost[..., :-1, None]
    num_ages = len(widths)
    until = np.arange(num_ages)[None] >= np.arange(num_ages)[:, None]
    return (np.where(until, gains, 0) / np.where(until, costs, 1)).max(-1)
