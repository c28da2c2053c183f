"""A core and the prompts that it is filled with: what is measured starts from here."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from jaxcache.config import CacheConfig, TenantShare
from jaxcache.core.lease import Lease
from jaxcache.core.node import Node
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Namespace, Sequence
from jaxcache.replay.replay import KINDS
from jaxcache.types import Wait

FULL = ("full",)
EVERY_KIND = ("full", "window", "state")


def written(lease: Lease, end: int) -> tuple[int, ...]:
    """The states up to `end` that are to be kept, all of which have been made."""
    return tuple(position for position in lease.checkpoints if position <= end)


class LoadedCore:
    """A core and a namespace.

    kinds: its components, by name in `KINDS`; tenants: who has limits; host_pages: 0: no host tier
    """

    def __init__(
        self,
        page_tokens: int,
        device_pages: int | Mapping[str, int],
        kinds: tuple[str, ...] = FULL,
        tenants: Mapping[str, TenantShare] | None = None,
        host_pages: int = 0,
    ):
        components = tuple(KINDS[kind](page_tokens) for kind in kinds)
        config = CacheConfig(
            page_tokens=page_tokens, device_pages=device_pages, host_pages=host_pages, tenants=tenants or {}
        )
        self.core = PrefixCache(components, config)
        self.namespace = self.core.new_namespace(model="bench")

    def sequence(self, tokens: np.ndarray, namespace: Namespace | None = None) -> Sequence:
        return self.core.sequence(tokens, namespace or self.namespace)

    def serve(self, tokens: np.ndarray, namespace: Namespace | None = None) -> None:
        """One request, prompt only. Prefill stops where a state is to be kept."""
        core, sequence = self.core, self.sequence(tokens, namespace)
        lease = core.admit(sequence, len(tokens) - core.match(sequence).num_tokens)
        assert not isinstance(lease, Wait), f"{lease} {len(tokens)=}"
        for stop in sorted(lease.checkpoints):
            if lease.num_computed < stop < len(tokens):
                core.insert(lease, stop, states=(stop,))
        core.insert(lease, len(tokens), states=written(lease, len(tokens)))
        core.release(lease)

    def path(self, tokens: np.ndarray) -> list[Node]:
        """The nodes that hold a prompt, top first."""
        return [node for node, _ in self.core.tiers.tree.walk(self.sequence(tokens), len(tokens))]

    def clear(self) -> None:
        self.release_all()
        self.core.reset()

    def release_all(self) -> None:
        for lease in list(self.core.leases.values()):
            self.core.release(lease)


def random_tokens(*shape: int) -> np.ndarray:
    """int32; two that are asked for in a row differ."""
    return RNG.integers(0, 2**31 - 1, shape, np.int32)


RNG = np.random.default_rng(0)


def growing(tokens: np.ndarray, num_nodes: int) -> list[np.ndarray]:
    """Prefixes that lay a prompt into the tree as so many nodes, when they are served one after another."""
    node_tokens = len(tokens) // num_nodes
    return [tokens[: node_tokens * (i + 1)] for i in range(num_nodes)]
