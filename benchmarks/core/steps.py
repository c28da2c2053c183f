"""What the core costs the scheduler in every step, while hundreds of requests decode.

One step is one iteration of the reference serving loop, which calls the core in this order:

    commit, prefetch + match + admit the newcomers, take_plan      decode: grow everybody, take_plan
    insert and release who is finished                             commit, take_plan
    prefill the newcomers: grow, take_plan, insert

Where the model would run, everybody gets a token (`extend_all`), which has a figure of its own. The whole of a step is
that, the calls named above, and the page tables of those who decode and of the newcomers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import numpy as np

from benchmarks.core.loaded_core import EVERY_KIND, FULL, LoadedCore, random_tokens, written
from benchmarks.core.reference_tree import ReferenceTree
from benchmarks.core.workload import Workload
from benchmarks.figure import Figure, Goal, figure
from benchmarks.measure import CPU, clock_cost_us
from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import Sequence
from jaxcache.runtime.batch_tables import BatchTables, tables_of
from jaxcache.types import Wait

STEP_GOAL = Goal("value", "<=", 200)
WHOLE_GOAL, WHOLE_GOAL_3_COMPONENTS = Goal("value", "<=", 600), Goal("value", "<=", 1000)
SHARED_PROMPTS = 8  # a newcomer begins with one of these
SHARED_TOKENS = 512


class Request:
    """Running: lease is set. num_computed lags one token behind its sequence while it decodes."""

    __slots__ = ("lease", "num_computed", "num_left", "sequence")

    def __init__(self, sequence: Sequence, num_new_tokens: int):
        self.sequence = sequence
        self.num_left = num_new_tokens
        self.num_computed = 0
        self.lease: Lease | None = None


Grow = Callable[[PrefixCache, deque[Request]], None]


def grow_all(core: PrefixCache, running: deque[Request]) -> None:
    """Room for the next token of everybody, in every step, as the reference loop asks."""
    leases = [request.lease for request in running if request.lease is not None]
    if core.grow_all(leases, [request.num_computed for request in running]) < len(running):
        raise MemoryError("the cache of this benchmark is too small")


def grow_each(core: PrefixCache, running: deque[Request]) -> None:
    """The same, asked one by one."""
    for request in running:
        assert request.lease is not None
        if not core.grow(request.lease, request.num_computed, 1):
            raise MemoryError("the cache of this benchmark is too small")


class Scheduler:
    """Serves as many newcomers in every step as finish in it; each decodes for `running / arriving` steps.

    core_us, token_us, table_us: by step: the core's calls named above; the tokens that everybody gets; the page tables
    floor_us: the stripped tree serving those who finish
    """

    def __init__(self, workload: Workload, kinds: tuple[str, ...], grow: Grow, page: int, host_tokens: int = 0):
        self.workload = workload
        self.loaded = LoadedCore(page, workload.step_capacity // page, kinds, host_pages=host_tokens // page)
        self.tree = ReferenceTree(page, workload.step_capacity // page)
        self.tables = BatchTables({r.component.name: r.allocator.num_pages for r in self.loaded.core.tiers.device})
        self.table_pages = -(-(workload.context_tokens[1] + workload.running // workload.arriving + 2) // page)
        self.grow = grow
        self.running: deque[Request] = deque()  # those who finish first are first
        self.shared = random_tokens(SHARED_PROMPTS, min(SHARED_TOKENS, workload.context_tokens[0]))
        self.random = np.random.default_rng(1)
        self.clock_us = clock_cost_us(CPU)
        self.core_us: list[float] = []
        self.token_us: list[float] = []
        self.table_us: list[float] = []
        self.floor_us: list[float] = []

    def step(self) -> None:
        newcomers = [self.newcomer() for _ in range(self.workload.arriving)]
        start = CPU()
        self.begin(newcomers)
        table = CPU()
        self.build_tables(self.running)
        model = CPU()
        self.sample(self.running)
        again = CPU()
        finished = self.finish(newcomers)
        prefill_table = CPU()
        self.build_tables(newcomers)
        prefill = CPU()
        self.sample(newcomers)
        last = CPU()
        self.publish(newcomers)
        end = CPU()
        self.running += newcomers
        core_ns = (table - start) + (prefill_table - again) + (end - last)
        self.table_us.append(((model - table) + (prefill - prefill_table)) / 1000 - 2 * self.clock_us)
        self.core_us.append(core_ns / 1000 - 3 * self.clock_us)
        self.token_us.append(((again - model) + (last - prefill)) / 1000 - 2 * self.clock_us)
        self.serve_stripped(finished)

    def newcomer(self) -> Request:
        low, high = self.workload.context_tokens
        shared = self.shared[self.random.integers(SHARED_PROMPTS)]
        own = random_tokens(int(self.random.integers(low, high)) - len(shared) + 1)
        sequence = self.loaded.sequence(np.concatenate([shared, own]))
        return Request(sequence, 1 + self.workload.running // self.workload.arriving)  # the first one by its prefill

    def begin(self, newcomers: list[Request]) -> None:
        """commit, admit the newcomers, room for everybody's next token."""
        core = self.loaded.core
        core.commit({})
        for request in newcomers:
            sequence = request.sequence
            ticket = core.prefetch(sequence)
            lease = core.admit(sequence, sequence.num_tokens - core.match(sequence).num_tokens, ticket)
            assert not isinstance(lease, Wait), f"{lease}: the cache of this benchmark is too small"
            request.lease, request.num_computed = lease, lease.num_cached_tokens
        core.take_plan()
        if self.running:
            self.grow(core, self.running)
        core.take_plan()

    def build_tables(self, requests: deque[Request] | list[Request]) -> None:
        """As `Cache.tables` does."""
        tables_of(self.loaded.core, self.tables, [request.lease for request in requests], self.table_pages)

    def sample(self, requests: deque[Request] | list[Request]) -> None:
        """The model has run: what was there is computed, and there is one more token."""
        for request in requests:
            request.num_computed = request.sequence.num_tokens
            request.num_left -= 1
        self.loaded.core.extend_all([request.sequence for request in requests], [7] * len(requests))

    def finish(self, newcomers: list[Request]) -> list[Request]:
        """Those who have all their tokens leave; then the newcomers' prefill, chunks ending where a state is kept."""
        core, running = self.loaded.core, self.running
        finished = []
        while running and running[0].num_left <= 0:
            request = running.popleft()
            assert request.lease is not None
            core.insert(request.lease, request.num_computed, states=written(request.lease, request.num_computed))
            core.release(request.lease)
            finished.append(request)
        core.commit({})
        core.take_plan()
        for request in newcomers:
            lease, end = request.lease, request.sequence.num_tokens
            assert lease is not None
            while request.num_computed < end:
                stop = min(end, lease.next_stop or end)
                core.grow(lease, request.num_computed, stop - request.num_computed)
                request.num_computed = stop
                if stop < end:  # a state is kept here: the core must hear of it
                    core.insert(lease, stop, states=written(lease, stop))
        core.take_plan()
        return finished

    def publish(self, newcomers: list[Request]) -> None:
        """Their prompts are computed."""
        for request in newcomers:
            assert request.lease is not None
            lease, end = request.lease, request.num_computed
            self.loaded.core.insert(lease, end, states=written(lease, end))

    def whole_us(self) -> list[float]:
        """By step: all that the scheduler's thread does for the cache."""
        return [sum(parts) for parts in zip(self.core_us, self.token_us, self.table_us, strict=True)]

    def serve_stripped(self, finished: list[Request]) -> None:
        datas = [bytes(request.sequence.data) for request in finished]
        start = CPU()
        for data in datas:
            self.tree.serve(data)
        self.floor_us.append(max((CPU() - start) / 1000 - self.clock_us, 0.001))


def steps(workload: Workload) -> list[Figure]:
    num, arriving = workload.running, workload.arriving
    what = f"step: {num} decode, {arriving} come, {arriving} go"
    small, large = workload.page_tokens[0], workload.page_tokens[-1]
    host = 2 * workload.step_capacity
    together, each, every_kind, whole, whole_every_kind, whole_with_host, all_with_host = (
        scheduled(Scheduler(workload, kinds, grow, page, host_tokens))
        for kinds, grow, page, host_tokens in (
            (FULL, grow_all, small, 0),
            (FULL, grow_each, small, 0),
            (EVERY_KIND, grow_all, small, 0),
            (FULL, grow_all, large, 0),
            (EVERY_KIND, grow_all, large, 0),
            (FULL, grow_all, large, host),
            (EVERY_KIND, grow_all, large, host),
        )
    )
    whole_of = f"{what}, page {large}"
    floor = f"stripped tree serving {arriving}"
    return [
        figure(f"step_{num}", f"{what} / {floor}", together.core_us, together.floor_us, goal=STEP_GOAL),
        p99(f"step_{num}", what, together),
        figure(f"step_{num}_tokens", f"{what}; a token for everybody", together.token_us),
        figure(f"step_{num}_tables", f"{what}; page tables of everybody", together.table_us),
        figure(f"step_{num}_whole", f"{whole_of}; all of it", whole.whole_us(), goal=WHOLE_GOAL),
        figure(f"step_{num}_whole_host", f"{whole_of}, host tier; all of it", whole_with_host.whole_us()),
        figure(f"step_{num}_grow_each", f"{what}, growing one by one / {floor}", each.core_us, each.floor_us),
        p99(f"step_{num}_grow_each", f"{what}, growing one by one", each),
        figure(f"step_{num}_3_components", f"{what}, 3 components / {floor}", every_kind.core_us, every_kind.floor_us),
        p99(f"step_{num}_3_components", f"{what}, 3 components", every_kind),
        figure(f"step_{num}_3_components_whole", f"{whole_of}, 3 components; all of it", whole_every_kind.whole_us()),
        figure(
            f"step_{num}_3_components_whole_host",
            f"{whole_of}, 3 components, host tier; all of it",
            all_with_host.whole_us(),
            goal=WHOLE_GOAL_3_COMPONENTS,
        ),
    ]


def p99(name: str, meaning: str, scheduler: Scheduler) -> Figure:
    return figure(f"{name}_p99", f"{meaning}; p99", [float(np.percentile(scheduler.core_us, 99))])


def scheduled(scheduler: Scheduler) -> Scheduler:
    """After all its steps; those that warm up do not count."""
    workload = scheduler.workload
    for _ in range(workload.warmup_steps):
        scheduler.step()
    for times in (scheduler.core_us, scheduler.token_us, scheduler.table_us, scheduler.floor_us):
        times.clear()
    for _ in range(workload.num_steps):
        scheduler.step()
    assert len(scheduler.running) == workload.running
    return scheduler
