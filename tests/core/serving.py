"""Whole requests on a core without a data plane: many of them, quickly."""

from __future__ import annotations

from typing import Any

from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Namespace
from jaxcache.types import Match
from tests.core.helpers import NEXT, prompt


def start(core: PrefixCache, tokens: list[int], namespace: Namespace) -> Lease:
    """Admits a prompt with room for all of it; a load-back is over when it returns."""
    core.take_plan()
    core.commit({})
    sequence = core.sequence(tokens, namespace)
    lease = core.admit(sequence, len(tokens) - core.match(sequence).num_tokens)
    assert isinstance(lease, Lease), lease
    core.take_plan()
    core.commit({})
    return lease


def compute(core: PrefixCache, lease: Lease, **options: Any) -> None:
    """Inserts the prompt in chunks that end where the lease says; the last one with `options`."""
    total = lease.sequence.num_tokens
    while lease.num_computed < total:
        stop = lease.next_stop
        end = total if stop is None else min(total, stop)
        states = [position for position in lease.checkpoints if position <= end]
        core.insert(lease, end, states=states, **(options if end == total else {}))


def serve(core: PrefixCache, tokens: list[int], namespace: Namespace, **options: Any) -> int:
    """Admit, compute, insert, release. Returns how many tokens were cached."""
    lease = start(core, tokens, namespace)
    compute(core, lease, **options)
    core.release(lease)
    core.take_plan()
    return lease.num_cached_tokens


def flood(core: PrefixCache, namespace: Namespace, num_requests: int, num_tokens: int = 20) -> None:
    """Requests that have nothing in common."""
    for i in range(num_requests):
        serve(core, prompt(num_tokens, 1_000_000 + 1000 * i), namespace)


def found(core: PrefixCache, tokens: list[int], namespace: Namespace) -> Match:
    """Of a prompt that goes on after `tokens`."""
    return core.match(core.sequence([*tokens, NEXT], namespace))
