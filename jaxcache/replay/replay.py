"""Replays a trace through the real core, without a model and without moving a byte: what would be found, and how fast.

Device and host copies are taken as done at once; storage is a bounded set of page keys that answers at once.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.lease import Lease
from jaxcache.core.pages import Residency
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.replay.traces import TraceRequest
from jaxcache.runtime.events import EventStream
from jaxcache.types import Move, Outcome, PrefetchPolicy, Transfer, TransferKind, Wait

VOCAB_SIZE = 50_000
WINDOW_TOKENS = 1024
TAKE_EVERY = 100  # requests between two takes of events
KINDS: dict[str, Callable[[int], Component]] = {
    "full": lambda page: FullAttention("full", ()),
    "window": lambda page: SlidingWindow("window", (), window_tokens=WINDOW_TOKENS),
    "state": lambda page: RecurrentState("state", (), chunk_tokens=page),
}


@dataclass(frozen=True)
class Setting:
    """What to replay with; sizes of tiers in tokens. components: of KINDS; tenants: requests take turns among them.

    events: the core notes changes, in the timed part; what is made of them is not timed
    """

    page_tokens: int
    device_tokens: int
    host_tokens: int = 0
    storage_tokens: int = 0
    policy: str = "lru"
    components: tuple[str, ...] = ("full",)
    num_namespaces: int = 1
    include_outputs: bool = False
    events: bool = False

    def config(self) -> CacheConfig:
        return CacheConfig(
            page_tokens=self.page_tokens,
            device_pages=self.device_tokens // self.page_tokens,
            host_pages=self.host_tokens // self.page_tokens,
            eviction_policy=self.policy,
            prefetch_policy=PrefetchPolicy.WAIT_COMPLETE,
            prefetch_min_tokens=self.page_tokens,
            events=self.events,
        )


class StorageOfKeys:
    """Which page keys are stored: the least recently stored or fetched leave first."""

    def __init__(self, core: PrefixCache, num_pages: int):
        self.core = core
        self.num_pages = num_pages
        self.keys: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def answer(self, transfer: Transfer) -> Outcome:
        if transfer.kind is TransferKind.QUERY:
            exists = {
                move.component: [(move.component, key) in self.keys for key in move.page_keys]
                for move in transfer.moves
            }
            end = self.core.largest_end(transfer.id, exists)
            return Outcome(True, True, smallest_end=end, largest_end=end)
        if transfer.kind is TransferKind.STORE:
            for move in transfer.moves:
                self._store(move)
            return Outcome(True, True, {move.component: len(move.page_keys) for move in transfer.moves})
        return Outcome(True, True, {move.component: self._leading(move) for move in transfer.moves})

    def _store(self, move: Move) -> None:
        for key in move.page_keys:
            self.keys[move.component, key] = None
            self.keys.move_to_end((move.component, key))
        while len(self.keys) > self.num_pages:
            self.keys.popitem(last=False)

    def _leading(self, move: Move) -> int:
        for count, key in enumerate(move.page_keys):
            if (move.component, key) not in self.keys:
                return count
            self.keys.move_to_end((move.component, key))
        return len(move.page_keys)


class Replay:
    """core: the cache. us: CPU microseconds of every request, for all that the core does for it."""

    def __init__(self, setting: Setting):
        self.setting = setting
        components = tuple(KINDS[kind](setting.page_tokens) for kind in setting.components)
        self.core = PrefixCache(components, setting.config())
        self.storage = StorageOfKeys(self.core, setting.storage_tokens // setting.page_tokens)
        if setting.storage_tokens:
            self.core.attachment.attach()
        self.namespaces = [
            self.core.new_namespace(model="replay", tenant=str(i)) for i in range(setting.num_namespaces)
        ]
        self.moves_pages = bool(setting.host_tokens)
        self.events = EventStream(self.core.tiers) if setting.events else None
        self.us: list[float] = []
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_too_long = 0

    def request(self, request: TraceRequest) -> None:
        """Makes one request's tokens, serves it, and notes the time of the latter."""
        tokens = request.prompt(request.block_tokens, VOCAB_SIZE)
        outputs = None
        if self.setting.include_outputs and request.output_length:
            seed = self.num_requests  # generated text is nobody else's
            outputs = np.random.default_rng(seed).integers(0, VOCAB_SIZE, request.output_length, np.int32)
        start = time.thread_time_ns()
        self.serve(tokens, outputs)
        self.us.append((time.thread_time_ns() - start) / 1000)
        if not len(self.us) % TAKE_EVERY:
            self.take_events()

    def take_events(self) -> None:
        """Makes events of what has changed; elsewhere another thread does that."""
        if self.events is not None:
            self.events.take()

    def serve(self, tokens: np.ndarray, outputs: np.ndarray | None = None) -> None:
        """Serves one request. One that is larger than the device is computed without the cache, and counted."""
        core = self.core
        namespace = self.namespaces[self.num_requests % len(self.namespaces)]
        self.num_requests += 1
        self.num_prompt_tokens += len(tokens)
        if -(-len(tokens) // self.setting.page_tokens) > self.setting.device_tokens // self.setting.page_tokens:
            self.num_too_long += 1
            return
        sequence = core.sequence(tokens, namespace)
        ticket = core.prefetch(sequence) if core.attachment.attached else None
        while ticket is not None and not ticket.done:
            self._step()
        lease = core.admit(sequence, len(tokens) - core.match(sequence).num_tokens, ticket)
        if isinstance(lease, Wait):
            self.num_too_long += 1
            if ticket is not None:
                core.cancel(ticket)
            return
        if self.moves_pages:
            self._step()  # what was planned to be loaded back is there
        self._compute(lease, len(tokens))
        self._insert(lease, len(tokens))
        if outputs is not None and core.grow(lease, len(tokens), len(outputs)):
            sequence.extend(outputs)
            self._compute(lease, len(tokens) + len(outputs))
            self._insert(lease, len(tokens) + len(outputs))
        core.release(lease)
        if self.moves_pages:
            self._step()

    def _compute(self, lease: Lease, end: int) -> None:
        """Prefill stops where a state is to be kept."""
        for stop in sorted(lease.checkpoints):
            if lease.num_computed < stop < end:
                self._insert(lease, stop)

    def _insert(self, lease: Lease, end: int) -> None:
        """With every state that is to be kept: all have been made."""
        if lease.checkpoints:
            self.core.insert(lease, end, states=[position for position in lease.checkpoints if position <= end])
        else:
            self.core.insert(lease, end)

    def _step(self) -> None:
        """Everything that was planned is done, and the next step begins with its outcomes."""
        core = self.core
        transfers = core.take_plan().transfers
        live = set(core.live_transfers())
        core.commit({t.id: self.storage.answer(t) for t in transfers if t.id in live})

    # ---- what came of it

    def hit_tokens(self) -> dict[str, int]:
        """Prompt tokens found, by tier."""
        return {tier: self.core.counters[f"{tier}_hit_tokens"] for tier in ("device", "host", "storage")}

    def hit_rate(self) -> float:
        return sum(self.hit_tokens().values()) / self.num_prompt_tokens

    def resident_tokens(self) -> dict[str, int]:
        """What lies on each tier now, in tokens of full attention (or else the first component).

        Storage has one room for the pages of all components, so that all of them count there.
        """
        device, host = self._residencies()
        num_pages = {"device": device.num_resident, "host": host.num_resident, "storage": len(self.storage.keys)}
        return {tier: num * self.setting.page_tokens for tier, num in num_pages.items()}

    def capacity_tokens(self) -> dict[str, int]:
        """How many of them there is room for, in whole pages; 0: there is no such tier."""
        device, host = self._residencies()
        num_pages = {
            "device": device.allocator.num_pages,
            "host": host.allocator.num_pages,
            "storage": self.storage.num_pages,
        }
        return {tier: num * self.setting.page_tokens for tier, num in num_pages.items()}

    def _residencies(self) -> tuple[Residency, Residency]:
        tiers = self.core.tiers
        return tiers.device[0], tiers.host[0]

    def report(self) -> dict[str, Any]:
        """JSON: tokens by tier, CPU time of the core alone, evictions in pages. Of what `request` has served."""
        us = np.array(self.us)
        self.take_events()
        return {
            "requests": self.num_requests,
            "prompt_tokens": self.num_prompt_tokens,
            "hit_rate": self.hit_rate(),
            "hit_tokens": self.hit_tokens(),
            "requests_per_cpu_second": float(len(us) / us.sum() * 1e6),
            "us_per_request": {
                "p50": float(np.percentile(us, 50)),
                "p99": float(np.percentile(us, 99)),
                "max": float(us.max()),
            },
            "evictions": sum(self.core.tiers.num_evicted_pages),
            "bytes_per_cached_token": bytes_per_cached_token(self.core),
            "too_long": self.num_too_long,
            **(self.events.counts() if self.events is not None else {}),
        }


def bytes_per_cached_token(core: PrefixCache) -> float:
    """Host memory of the tree (nodes, edges, page ids), per token that it holds. What is shared counts once."""
    seen: dict[int, int] = {}
    num_tokens = 0
    stack = core.tiers.tree.all_roots()
    while stack:
        node = stack.pop()
        stack += node.children.values()
        num_tokens += len(node.edge) // 4
        edge = node.edge.obj if isinstance(node.edge, memoryview) else node.edge
        parts: list[Any] = [node, node.children, node.edge, edge, node.first_page, node.pins, node.pages]
        for pages in node.pages:
            parts += [pages, pages.base if pages is not None else None]
        for part in [*parts, node.resident_children, node.keys, *(node.keys or ())]:
            if part is not None:
                seen[id(part)] = sys.getsizeof(part)
    return sum(seen.values()) / max(1, num_tokens)
