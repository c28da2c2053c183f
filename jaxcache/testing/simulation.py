"""The simulation: a random serving loop on all ranks of a mesh, in one thread and in virtual time, under faults.

    settings --schedule--> operations --> Scenario, step by step --> Report, or the first thing that was wrong

Everything comes from the seed. After every step all digests are equal; every page that a model step reads is compared
byte by byte, on every rank; at the end everything is given back (I10) and every storage token accounted for (I12).

To test a loop of your own, drive a `Scenario` (or `VirtualRank`s) with it, as `Simulation` does.
"""

from __future__ import annotations

import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core import invariants
from jaxcache.testing.chance import Delays, mix
from jaxcache.testing.request import Request
from jaxcache.testing.scenario import Scenario
from jaxcache.testing.storage_faults import FAULTS, PAGE_FAULTS, StorageFaults
from jaxcache.types import PrefetchPolicy, RanksDiverged, TransferFault, TransferKind, WritePolicy

KINDS = ("full", "window", "state")
POLICIES = ("lru", "lfu", "slru", "priority")
THROUGH, SELECTIVE = WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_THROUGH_SELECTIVE
RATES = {  # kinds of operations -> how many of 1,000 steps have one
    "arrive": 245,
    "arrive_twice": 6,
    "give_up": 4,
    "abort": 8,
    "retract": 8,
    "cancel": 12,
    "reset": 2,
    "forget_device": 2,
    "detach": 2,
    "attach": 40,
    "retire": 2,
    "change_policy": 6,
    "clear_storage": 2,
}
PER_STEPS = 1000
MAX_PAGES = 8  # of one request
MAX_WAITING = 12
MAX_RUNNING = 5
PROGRESS_STEPS = 500
FAILURES = (
    AssertionError, RanksDiverged, TransferFault, RuntimeError, ValueError, TypeError, LookupError, AttributeError,
    ArithmeticError, struct.error,
)  # fmt: skip


class Operation(NamedTuple):
    """Number `index` of the whole schedule: in `step`, what `kind` says, with all its chances from `seed`."""

    index: int
    step: int
    kind: str
    seed: int


def schedule(seed: int, num_steps: int) -> list[Operation]:
    """What happens to the loop from outside, in order, written down before it runs.

    Each operation has a seed of its own, so that a run with some of them left out is the same where the rest is the
    same. A schedule of fewer steps is the beginning of one of more.
    """
    operations: list[Operation] = []
    for step in range(num_steps):
        for number, (kind, rate) in enumerate(RATES.items()):
            chance = mix(seed, step, number)
            if chance % PER_STEPS < rate:
                operations.append(Operation(len(operations), step, kind, chance // PER_STEPS))
    return operations


@dataclass(frozen=True)
class Settings:
    """What a run depends on, and nothing else.

    mesh:        extents of cp, tp and pp
    faults:      kinds of storage faults (storage_faults.FAULTS)
    components:  of KINDS; storage is asked only with "full" among them
    check_every: so many steps between full checks of the invariants; 0: only at the end
    """

    mesh: tuple[int, int, int] = (2, 2, 2)
    num_steps: int = 50_000
    seed: int = 0
    faults: tuple[str, ...] = FAULTS
    components: tuple[str, ...] = KINDS
    check_every: int = 1000

    @property
    def num_ranks(self) -> int:
        return self.mesh[0] * self.mesh[1] * self.mesh[2]

    @property
    def possible_faults(self) -> tuple[str, ...]:
        """What can strike: pages only where they are read, deadlines only where something takes long."""
        if not self.faults:
            return ()
        struck = [kind for kind in self.faults if "full" in self.components or kind not in PAGE_FAULTS]
        can_be_late = "slow" in struck or "stalled" in struck
        return (*struck, "unasked", *(("timeout",) if can_be_late else ()))


@dataclass(frozen=True)
class Report:
    """digest: of all ranks at the end. counts: what happened, once for all ranks.

    faults: of `Settings.possible_faults`, once for each rank struck
    """

    digest: int
    num_rank_steps: int
    cpu_seconds: float
    counts: dict[str, int]
    faults: dict[str, int]

    @property
    def rank_steps_per_cpu_second(self) -> float:
        return self.num_rank_steps / self.cpu_seconds

    @property
    def missing(self) -> list[str]:
        """What could have happened, and never did."""
        return [name for name, count in {**self.counts, **self.faults}.items() if not count]


class Simulation:
    """One run. operations: all of `schedule`, or a part of it. delays: how long everything takes; from the seed."""

    def __init__(self, settings: Settings, operations: Sequence[Operation] | None = None, delays: Delays | None = None):
        self.settings = settings
        rng = random.Random(settings.seed)
        page_tokens = rng.choice([4, 8, 16])
        components = make_components(rng, settings.components, page_tokens)
        self.config = make_config(rng, settings.components, page_tokens)
        self.faults = StorageFaults(settings.seed, settings.num_ranks, settings.faults)
        self.scenario = Scenario(
            components,
            self.config,
            settings.seed,
            settings.mesh,
            self.faults,
            delays or Delays(settings.seed, declines=True, copies_inline=8),
        )
        self.scenario.num_namespaces = 3
        self.scenario.decode_tokens = (1, *[2 * page_tokens] * 7)
        self.scenario.chunk_tokens = (page_tokens, *[1000] * 11)
        self.scenario.insert_chance = self.scenario.stop_insert_chance = 0.05
        self.scenario.max_new_tokens, self.scenario.max_output_tokens = 3 * page_tokens // 2, page_tokens // 2
        self.scenario.elsewhere_chance, self.scenario.prefetch_chance = 0.2, 0.1
        self.max_tokens = MAX_PAGES * page_tokens
        self.step = 0
        if operations is None:
            operations = schedule(settings.seed, settings.num_steps)
        self._operations: dict[int, list[Operation]] = {}
        for operation in operations:
            self._operations.setdefault(operation.step, []).append(operation)

    def run(self, progress: Callable[[int], object] = lambda num_steps: None) -> Report:
        """Raises one of FAILURES as soon as anything is wrong; `step` says when. progress: told of steps done."""
        settings = self.settings
        start = time.process_time()
        for self.step in range(settings.num_steps):
            self._iterate(self._operations.get(self.step, ()))
            if settings.check_every and self.step % settings.check_every == settings.check_every - 1:
                self._check()
            if self.step % PROGRESS_STEPS == PROGRESS_STEPS - 1:
                progress(PROGRESS_STEPS)
        seconds = time.process_time() - start
        counts = self._finish()
        struck = self.faults.counts + self._noticed()
        faults = {kind: struck[kind] for kind in settings.possible_faults}
        num_rank_steps = settings.num_steps * settings.num_ranks
        digest = self.scenario.core.digest
        return Report(digest, num_rank_steps, seconds, counts, faults)

    def _iterate(self, operations: Sequence[Operation]) -> None:
        """One iteration of the serving loop, with what comes from outside between the step and the admissions."""
        scenario = self.scenario
        scenario.step()
        for operation in operations:
            self._operate(operation)
        for request in list(scenario.waiting):
            if len(scenario.running) >= MAX_RUNNING:
                break
            self._admit(request)
        scenario.apply()
        for _ in range(1 + (mix(self.settings.seed, self.step) % 4 == 0)):  # sometimes two model steps
            for request in list(scenario.running):
                if request in scenario.running:
                    scenario.run(request)
        if any(transfer.kind is TransferKind.LOAD_BACK for transfer in scenario.core.outbox.transfers):
            scenario.apply()

    def _admit(self, request: Request) -> None:
        scenario, core = self.scenario, self.scenario.core
        is_idle = not scenario.running and not core.live_transfers() and not core.is_busy()
        is_held = core.prefetches.policy is not PrefetchPolicy.BEST_EFFORT and request.has_running_prefetch
        assert scenario.admit(request) or not is_idle or is_held, "A1: starved in an empty system"

    def _operate(self, operation: Operation) -> None:
        """Does it, or nothing where there is nobody to do it to."""
        scenario, kind, seed = self.scenario, operation.kind, operation.seed
        if kind in ("arrive", "arrive_twice"):
            if len(scenario.waiting) < MAX_WAITING:
                request = scenario.arrive(self.max_tokens, seed)
                if kind == "arrive_twice":
                    scenario.arrive_again(request, seed + 1)
        elif kind in ("give_up", "cancel"):
            requests = [r for r in scenario.waiting if r.has_running_prefetch or kind == "give_up"]
            if requests:
                getattr(scenario, kind)(requests[seed % len(requests)])
        elif kind in ("abort", "retract"):
            if scenario.running:
                request = scenario.running[seed % len(scenario.running)]
                (scenario.finish if kind == "abort" else scenario.retract)(request)
        elif kind in ("attach", "detach", "clear_storage"):
            if scenario.core.attachment.attached is (kind != "attach"):
                getattr(scenario, kind)()
        elif kind == "retire":
            scenario.retire(seed % scenario.num_namespaces)
        elif kind == "change_policy":
            self._change_policy(seed)
        else:
            getattr(scenario, kind)()

    def _change_policy(self, seed: int) -> None:
        """Of prefetches; and of writes, unless it is the one that cannot change."""
        write_policy = None
        if self.config.write_policy is not WritePolicy.WRITE_BACK:
            write_policy = (THROUGH, SELECTIVE)[seed % 2]
        policies = list(PrefetchPolicy)
        for core in self.scenario.cores:
            core.attachment.change(policies[seed // 2 % len(policies)], write_policy)

    def _check(self) -> None:
        for core in self.scenario.cores:
            invariants.check(core)

    def _finish(self) -> dict[str, int]:
        """Winds down, checks everything, and returns what has happened."""
        scenario = self.scenario
        scenario.wind_down()
        self._check()
        counts = self._counts()
        for core in scenario.cores:
            invariants.check_empty(core)
        return counts

    def _noticed(self) -> Counter[str]:
        """By the engines of all ranks."""
        stats = [rank.engine.stats() for rank in self.scenario.ranks]
        names = {"unasked": "storage_not_asked", "timeout": "storage_timeouts"}
        return Counter({kind: int(sum(own.get(name, 0) for own in stats)) for kind, name in names.items()})

    def _counts(self) -> dict[str, int]:
        scenario = self.scenario
        core, own = scenario.core.counters, scenario.counts
        counts = {
            "arrivals": own["arrivals"],
            "admits": core["admits"],
            "waits": core["waits"],
            "backup_pages": core["backup_pages"],
            "load_back_pages": core["load_back_pages"],
            "waits_for_copies": sum(plane.num_waits for plane in scenario.planes),
            "evicted_pages": sum(scenario.core.tiers.num_evicted_pages),
            "retractions": own["retractions"],
            "resets": own["resets"],
            "lost_devices": own["lost_devices"],
            "retired_namespaces": own["retired_namespaces"],
        }
        storage = Counter(own) + Counter(core)
        names = (
            "prefetches", "joined_prefetches", "agreed_fetches", "prefetch_timeouts", "cancels_in_flight",
            "storage_tokens_used", "stored_pages", "detaches", "cleared_storages",
        )  # fmt: skip
        counts |= {name: storage[name] for name in names}
        if scenario.core.kinds.extras:
            counts["rejected_windows_and_states"] = storage["rejected_windows_and_states"]
        return counts


def make_components(rng: random.Random, kinds: Sequence[str], page_tokens: int) -> tuple[Component, ...]:
    """ValueError for a kind that does not exist, or that comes twice."""
    if not kinds or any(kind not in KINDS for kind in kinds) or len(set(kinds)) != len(kinds):
        raise ValueError(f"components are some of {', '.join(KINDS)}, each once, not {', '.join(kinds)!r}")
    made: dict[str, Component] = {
        "full": FullAttention("full", ()),
        "window": SlidingWindow("window", (), window_tokens=rng.choice([3, page_tokens, 2 * page_tokens + 1])),
        "state": RecurrentState("state", (), chunk_tokens=rng.choice([1, page_tokens, 2 * page_tokens])),
    }
    return tuple(made[kind] for kind in kinds)


def make_config(rng: random.Random, kinds: Sequence[str], page_tokens: int) -> CacheConfig:
    """Tiers so small that everything runs out now and then, but hits are usual."""
    device_pages = {"full": rng.choice([44, 60]), "window": rng.choice([44, 60]), "state": rng.choice([20, 28])}
    host_pages = {"full": rng.choice([80, 140]), "window": rng.choice([60, 100]), "state": rng.choice([20, 40])}
    choices: dict[str, Any] = {
        "page_tokens": page_tokens,
        "device_pages": {kind: device_pages[kind] for kind in kinds},
        "host_pages": {kind: host_pages[kind] for kind in kinds},
        "write_policy": rng.choice([THROUGH, THROUGH, SELECTIVE, WritePolicy.WRITE_BACK]),
        "eviction_policy": rng.choice(POLICIES),
        "prefetch_policy": rng.choice(list(PrefetchPolicy)),
        "prefetch_timeout_s": rng.choice([0.01, 0.05]),
        "prefetch_min_tokens": page_tokens,
        "prefetch_host_share": rng.choice([0.3, 0.7]),
        "max_stores": 3,
        "max_queued_stores": rng.choice([2, 16]),
        "max_stored_beliefs": rng.choice([50, 2000]),
        "max_live_transfers": rng.choice([5, 8, 16]),
        "agreement_every_steps": rng.choice([1, 8]),
        "max_states_per_path": rng.choice([2, 4]),
        "storage_unit_pages": rng.choice([1, 1, 4, 16]),
    }
    return CacheConfig(**choices)
