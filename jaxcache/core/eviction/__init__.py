"""Orders of eviction: which unpinned entry leaves next. Every file of this folder is read, and a class that is given a
name there, or in a program that uses jaxcache, can be chosen by it: a new policy is one file."""

from __future__ import annotations

from jaxcache.core.eviction.order import POLICIES, EvictionOrder
from jaxcache.core.registry import read_folder

read_folder(__name__, __path__)


def policy(name: str) -> type[EvictionOrder]:
    if name not in POLICIES:
        raise ValueError(f"eviction_policy must be one of {sorted(POLICIES)}, not {name!r}")
    return POLICIES[name]


__all__ = ["POLICIES", "EvictionOrder", "policy"]
