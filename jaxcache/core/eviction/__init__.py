"""Orders of eviction: which unpinned entry leaves next. One class each, found by name."""

from __future__ import annotations

from jaxcache.core.eviction.adaptive import Adaptive
from jaxcache.core.eviction.keyed import Fifo, Lfu, Priority
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.order import EvictionOrder
from jaxcache.core.eviction.queues import S3Fifo, Slru

POLICIES: dict[str, type[EvictionOrder]] = {
    "lru": Lru,
    "lfu": Lfu,
    "fifo": Fifo,
    "slru": Slru,
    "priority": Priority,
    "s3fifo": S3Fifo,
    "adaptive": Adaptive,
}


def policy(name: str) -> type[EvictionOrder]:
    if name not in POLICIES:
        raise ValueError(f"eviction_policy must be one of {sorted(POLICIES)}, not {name!r}")
    return POLICIES[name]
