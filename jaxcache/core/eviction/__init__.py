"""Orders of eviction: which unpinned entry leaves next. Every file of this folder is read, and a class that is given a
name there, or in a program that uses jaxcache, can be chosen by it: a new policy is one file."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from jaxcache.core.eviction.order import POLICIES, EvictionOrder

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)


def policy(name: str) -> type[EvictionOrder]:
    if name not in POLICIES:
        raise ValueError(f"eviction_policy must be one of {sorted(POLICIES)}, not {name!r}")
    return POLICIES[name]


__all__ = ["POLICIES", "EvictionOrder", "policy"]
