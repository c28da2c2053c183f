"""One who knows a cache by its events alone, and the tree that it should know, walked from scratch."""

from __future__ import annotations

from jaxcache.core import invariants
from jaxcache.core.node import Node
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import chain
from jaxcache.runtime.events import EventStream
from jaxcache.types import AllCleared, BlockRemoved, BlockStored, Event, Tier

Held = dict[tuple[Tier, str], dict[bytes, bytes]]  # page key -> namespace digest


class Consumer:
    """held: what a replay of the events rebuilds; every event is checked against it."""

    def __init__(self, core: PrefixCache):
        self.core = core
        self.stream = EventStream(core.tiers)
        self.held: Held = {(r.tier, r.component.name): {} for r in core.tiers.residencies}
        self.prefixes = [c.name for c in core.components if c.kind in ("prefix", "spine")]

    def take(self) -> list[Event]:
        events = self.stream.take()
        for event in events:
            if isinstance(event, BlockStored):
                self._store(event)
            elif isinstance(event, BlockRemoved):
                self._remove(event)
            else:
                assert event == AllCleared()
                for keys in self.held.values():
                    keys.clear()
        return events

    def _store(self, event: BlockStored) -> None:
        assert event.token_ids.dtype == "int32" and not event.token_ids.flags.writeable
        assert event.page_tokens == self.core.config.page_tokens
        keys = chain(event.parent_key, event.token_ids.tobytes(), 4 * event.page_tokens)
        assert event.page_keys and tuple(keys) == event.page_keys, f"I13: keys of {event}"
        digest = event.namespace_digest
        if event.component in self.prefixes and event.parent_key != digest:
            above = [self.held[tier, event.component].get(event.parent_key) for tier in (Tier.DEVICE, Tier.HOST)]
            assert digest in above, f"I13: {event} follows nothing"
        held = self.held[event.tier, event.component]
        for key in event.page_keys:
            assert key not in held, f"I13: stored twice: {event}"
            held[key] = digest

    def _remove(self, event: BlockRemoved) -> None:
        held = self.held[event.tier, event.component]
        assert event.page_keys
        for key in event.page_keys:
            assert key in held, f"I13: removed what was not there: {event}"
            del held[key]

    def check(self) -> None:
        self.take()
        assert self.held == in_tree(self.core), "I13: the events and the tree differ"
        roots = self.core.tiers.tree.roots.values()
        nodes = {node.id for node in (*roots, *invariants.all_nodes(self.core))}
        assert set(self.stream._nodes) == nodes, "I13: the mirror of the tree keeps what has left"


def in_tree(core: PrefixCache) -> Held:
    """What a request can find, with keys made from the tokens."""
    found: Held = {(r.tier, r.component.name): {} for r in core.tiers.residencies}
    page_bytes = core.tiers.tree.page_bytes
    for digest, root in core.tiers.tree.roots.items():
        stack: list[tuple[Node, bytes]] = [(child, digest) for child in root.children.values()]
        while stack:
            node, parent_key = stack.pop()
            keys = chain(parent_key, bytes(node.edge), page_bytes)
            for r in core.tiers.residencies:
                pages = node.pages[r.index]
                if pages is not None:
                    found[r.tier, r.component.name].update(dict.fromkeys(keys[-len(pages) :], digest))
            stack += [(child, keys[-1]) for child in node.children.values()]
    return found
