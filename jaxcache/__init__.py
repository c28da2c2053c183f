"""jaxcache: a hierarchical prefix cache for JAX serving loops on GPU meshes.

Public names are loaded when first used (PEP 562), so `import jaxcache.core` never imports jax.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxcache.cache import Cache, one_device_mesh
    from jaxcache.components import Component, FieldSpec, FullAttention, RecurrentState, SlidingWindow
    from jaxcache.config import CacheConfig, TenantShare
    from jaxcache.core.lease import Lease
    from jaxcache.core.prefetch import Ticket
    from jaxcache.core.tokens import Namespace, Sequence
    from jaxcache.fleet.process_end import end_process
    from jaxcache.pools.page_layout import pool_shardings
    from jaxcache.runtime.compiles import compile_count
    from jaxcache.storage.base import Storage, StorageError
    from jaxcache.storage.file import FileStorage
    from jaxcache.storage.memory import MemoryStorage
    from jaxcache.types import (
        AllCleared,
        BlockRemoved,
        BlockStored,
        Match,
        PrefetchPolicy,
        RanksDiverged,
        RankUnresponsive,
        ServingEnded,
        StateSlots,
        TransferFault,
        Wait,
        WritePolicy,
    )

_HOMES = {
    "jaxcache.cache": ("Cache", "one_device_mesh"),
    "jaxcache.components": ("Component", "FieldSpec", "FullAttention", "RecurrentState", "SlidingWindow"),
    "jaxcache.config": ("CacheConfig", "TenantShare"),
    "jaxcache.core.lease": ("Lease",),
    "jaxcache.core.prefetch": ("Ticket",),
    "jaxcache.core.tokens": ("Namespace", "Sequence"),
    "jaxcache.pools.page_layout": ("pool_shardings",),
    "jaxcache.runtime.compiles": ("compile_count",),
    "jaxcache.fleet.process_end": ("end_process",),
    "jaxcache.storage.base": ("Storage", "StorageError"),
    "jaxcache.storage.file": ("FileStorage",),
    "jaxcache.storage.memory": ("MemoryStorage",),
    "jaxcache.types": (
        "AllCleared",
        "BlockRemoved",
        "BlockStored",
        "Match",
        "PrefetchPolicy",
        "RankUnresponsive",
        "RanksDiverged",
        "ServingEnded",
        "StateSlots",
        "TransferFault",
        "Wait",
        "WritePolicy",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "AllCleared",
    "BlockRemoved",
    "BlockStored",
    "Cache",
    "CacheConfig",
    "Component",
    "FieldSpec",
    "FileStorage",
    "FullAttention",
    "Lease",
    "Match",
    "MemoryStorage",
    "Namespace",
    "PrefetchPolicy",
    "RankUnresponsive",
    "RanksDiverged",
    "RecurrentState",
    "Sequence",
    "ServingEnded",
    "SlidingWindow",
    "StateSlots",
    "Storage",
    "StorageError",
    "TenantShare",
    "Ticket",
    "TransferFault",
    "Wait",
    "WritePolicy",
    "compile_count",
    "end_process",
    "one_device_mesh",
    "pool_shardings",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxcache' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
