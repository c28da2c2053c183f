"""Synthetic workloads, each with one habit that some order of eviction gets wrong. Seeded; values for `Replay.request`.

Every request is a document (blocks that are its own) and a question of one block that nobody asks again.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count, islice

import numpy as np

from jaxcache.replay.traces import TraceRequest

Rng = np.random.Generator
Documents = Iterator[int]  # their numbers, without end
QUESTION = 1 << 40  # block ids from here on are questions


def requests(documents: Documents, num_requests: int, blocks: int, block_tokens: int) -> list[TraceRequest]:
    """A request for each document number; `blocks` long, the question not counted."""
    tokens = (blocks + 1) * block_tokens
    return [
        TraceRequest(tokens, 0, (*range(number * blocks, (number + 1) * blocks), QUESTION + i), block_tokens)
        for i, number in enumerate(islice(documents, num_requests))
    ]


def scan(rng: Rng, num_hot: int, share: float = 0.5) -> Documents:
    """A hot set, and between its uses documents that never come again."""
    once = count(num_hot)
    while True:
        yield int(rng.integers(num_hot)) if rng.random() < share else next(once)


def loop(num_documents: int) -> Documents:
    """Again and again in the same order: lru finds nothing if the cache is a little too small."""
    while True:
        yield from range(num_documents)


def shift(rng: Rng, num_hot: int, every: int, share: float = 0.8) -> Documents:
    """A hot set, one document of which is replaced by a new one every so often, and others that come once."""
    fresh = count(num_hot)
    hot = list(range(num_hot))
    for i in count(1):
        if i % every == 0:
            hot[int(rng.integers(num_hot))] = next(fresh)
        yield hot[int(rng.integers(num_hot))] if rng.random() < share else next(fresh)


def jump(rng: Rng, num_hot: int, every: int, share: float = 0.8) -> Documents:
    """As `shift`, but the whole hot set is another one at once."""
    fresh = count(num_hot)
    hot = list(range(num_hot))
    for i in count(1):
        if i % every == 0:
            hot = [next(fresh) for _ in hot]
        yield hot[int(rng.integers(num_hot))] if rng.random() < share else next(fresh)


def zipf(rng: Rng, num_documents: int, exponent: float) -> Documents:
    """Independent uses, a few documents much more often than most."""
    weights = np.arange(1, num_documents + 1) ** -exponent
    while True:
        yield from rng.choice(num_documents, 1024, p=weights / weights.sum()).tolist()


def recent(rng: Rng, mean: float, fresh_share: float = 0.3) -> Documents:
    """Whatever was used last is used next: the best that lru can have."""
    stack: list[int] = []
    for number in count():
        while stack and rng.random() > fresh_share:
            place = min(len(stack) - 1, int(rng.exponential(mean)))
            stack.append(stack.pop(-1 - place))
            yield stack[-1]
        stack.append(number)
        yield number


def phases(every: int, *habits: Documents) -> Documents:
    """Takes turns among other workloads, which share no documents."""
    while True:
        for place, habit in enumerate(habits):
            for number in islice(habit, every):
                yield number * len(habits) + place


def conversations(
    rng: Rng, num_requests: int, num_live: int, turn_blocks: int, block_tokens: int, last_share: float = 0.15
) -> list[TraceRequest]:
    """So many at a time, each growing by a few blocks a turn until its last one."""
    fresh = count()
    live: list[list[int]] = [[] for _ in range(num_live)]
    found = []
    for _ in range(num_requests):
        place = int(rng.integers(num_live))
        blocks = live[place]
        blocks += islice(fresh, 1 + int(rng.integers(2 * turn_blocks)))
        found.append(TraceRequest(len(blocks) * block_tokens, 0, tuple(blocks), block_tokens))
        if rng.random() < last_share:
            live[place] = []
    return found
