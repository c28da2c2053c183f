"""The random driver: a serving loop that does everything that one may do, and now and then what it must not.

    step    begin_step -> requests come, are admitted or cancelled -> grow -> apply -> model steps -> insert, release
            every few calls: one owner for each page; every few steps: contents, longest match, events
    end     all is quiet, all is accounted for, all pages are free (ending.py)

A run is a function of its seed alone. To repeat one: python -m tests.independent.fuzzer SEED NUM_CALLS
"""

from __future__ import annotations

import sys
from collections import Counter
from random import Random
from typing import Any

from tests.independent.content import Text, demand
from tests.independent.ending import finish
from tests.independent.floors import Floors
from tests.independent.library import Library
from tests.independent.mistakes import make_mistake
from tests.independent.pledges import Pledges
from tests.independent.setting import Kind, draw
from tests.independent.survey import Survey
from tests.independent.upheavals import Upheavals
from tests.independent.world import Request, World

CALLS_PER_LOOK = 100
CALLS_PER_OWNERS = 25
MAX_WAITING = 6


class Fuzzer:
    """One run. seen: how often each interesting thing has happened. kind: what is not drawn."""

    def __init__(self, seed: int, kind: Kind | None = None):
        self.rng = rng = Random(seed)
        self.setting = setting = draw(rng, kind)
        self.world = World(setting.components, setting.config, setting.num_ranks, rng)
        self.core = self.world.core
        self.page = setting.config.page_tokens
        self.library = Library(setting, rng)
        self.waiting: list[Request] = []
        self.pledges = Pledges()
        self.seen: Counter[str] = Counter()
        self._next_look = CALLS_PER_LOOK
        self._next_owners = CALLS_PER_OWNERS
        for rank in self.world.ranks:
            rank.plane.fault_rate = setting.fault_rate
        self.upheavals = Upheavals(self.world, setting, self.pledges, rng, self.seen)
        self.spaces = self.upheavals.spaces
        self.floors = Floors(self.world)
        self.cached_tokens = 0

    def run(self, num_calls: int) -> None:
        while self.world.num_calls < num_calls:
            self.step()
        self.end()

    # ---- one iteration

    def step(self) -> None:
        world, rng = self.world, self.rng
        if not self.core.plan_is_applied() and not self._may_commit_unapplied():
            world.apply()
        world.begin_step()
        world.tick()
        for _ in range(rng.randint(1, 4)):
            self._something()
            self._check_owners()
        self._grow()
        if rng.random() < 0.1:
            return  # no model step in this iteration
        world.apply()
        self._look()
        self._model_steps()
        if rng.random() < 0.3:
            world.apply()

    def _may_commit_unapplied(self) -> bool:
        """A planned load-back must be applied first: `commit` says so, and changes nothing."""
        if self.world.first.plans_load_back:
            if self.rng.random() < 0.5:
                self.world.refused("commit", (RuntimeError,), lambda _, rank: rank.core.commit({}))
            return False
        return self.rng.random() < 0.5

    def _something(self) -> None:
        rng = self.rng
        dice = rng.random()
        if self.world.first.plane.is_fetching and rng.random() < 0.01:
            self.upheavals.strike()
        elif dice < 0.25:
            self._submit()
        elif dice < 0.75:
            self._admit()
        elif dice < 0.83:
            self._ask_again()
        elif dice < 0.86 and self.world.running:
            self._stop(rng.choice(list(self.world.running.values())))
        elif dice < 0.90:
            self._prefetch()
        elif dice < 0.94:
            make_mistake(self.world, rng, self.waiting, self.spaces)
        elif dice < 0.96:
            self.world.tick()
        elif dice < 0.98:
            self._fork()
        elif rng.random() < (0.05 if self.setting.is_calm else 0.4):
            self.upheavals.happen()

    # ---- requests

    def _prefetch(self) -> None:
        asking = [request for request in self.waiting if request.tickets is None]
        if asking:
            self.world.prefetch(self.rng.choice(asking))

    def _submit(self) -> None:
        rng = self.rng
        if len(self.waiting) >= MAX_WAITING:
            if rng.random() < 0.2:
                self._give_up(rng.choice(self.waiting))
            return
        space = self.spaces[0] if self.setting.is_calm else rng.choice(self.spaces)
        request = self.world.request(self.library.prompt(), space, rng.choice((0, 0, 1, 2 * self.page)))
        self.waiting.append(request)
        if rng.random() < 0.4:
            self.world.match(request, None)
        if rng.random() < 0.6:
            self.world.prefetch(request)
            request.patience = rng.choice((0, 3, 20))

    def _fork(self) -> None:
        """The same sequence once more, while it runs: what the first has published is found by the second."""
        if self.world.running and len(self.waiting) < MAX_WAITING:
            request = self.rng.choice(list(self.world.running.values()))
            self.waiting.append(Request(request.text, request.sequences, 0))
            self.seen["forks"] += 1

    def _give_up(self, request: Request) -> None:
        if request.tickets is not None:
            self.world.cancel(request)
        self.waiting.remove(request)

    def _ask_again(self) -> None:
        """Looking changes nothing."""
        if not self.waiting:
            return
        request = self.rng.choice(self.waiting)
        before = self.first_state()
        if self.rng.random() < 0.7:
            self.world.match(request, self.rng.choice((None, 0, len(request.text) // 2)))
        else:
            self.world.explain(request)
        demand(self.first_state() == before, "match", "looking has changed something")

    def _admit(self) -> None:
        world, rng = self.world, self.rng
        if not self.waiting or len(world.running) >= self.setting.num_running:
            return
        ready = [request for request in self.waiting if request.tickets is not None and request.tickets[0].done]
        request = rng.choice(ready if ready and rng.random() < 0.7 else self.waiting)
        request.patience -= 1
        if request.tickets is not None and request.patience > 0 and not request.tickets[0].done:
            return
        cap = rng.choice((0, len(request.text) // 2)) if rng.random() < 0.1 else None
        num_new = rng.choice((1, rng.randint(1, 3 * self.page), len(request.text)))
        if rng.random() < 0.01:
            num_new = 10**5  # more than any device holds
        match, was_busy = world.match(request, cap), bool(world.running)
        undecided = request.tickets is not None and not request.tickets[0].done
        before, is_idle = self.first_state(), not self.core.is_busy() and not self.core.live_transfers()
        self.floors.before()
        answer = world.admit(request, num_new, cap)
        self.floors.check(request)
        if not answer:
            self.seen[f"waits for {answer.reason}"] += 1
            demand(undecided or self.first_state() == before, "wait", answer, "has changed something")
            fits = is_idle and not undecided and answer.reason != "floors" and self._fits(num_new)
            demand(not fits, "wait", answer, "though nothing runs and this many tokens fit:", num_new)
            return
        self.waiting.remove(request)
        self.cached_tokens += answer.num_cached_tokens
        self.seen["storage hits"] += answer.storage_tokens > 0
        if not undecided:
            self._check_hit(answer, match, was_busy)

    def first_state(self) -> Any:
        return self.world.first.state()

    def _fits(self, num_new: int) -> bool:
        """Whether an empty device has room for so many tokens."""
        rank = self.world.first
        pages = -(-num_new // self.page)
        return all(c == rank.plane.state or pages <= rank.capacities[c] for c in range(rank.num_components))

    def _check_hit(self, lease: Any, match: Any, was_busy: bool) -> None:
        cached = lease.num_cached_tokens
        demand(cached <= match.num_tokens, "hit", lease, "beyond", match)
        parts = lease.device_tokens + lease.host_tokens + lease.storage_tokens
        demand(parts == cached, "hit", lease, "but so many came from somewhere:", parts)
        loaded = cached - lease.device_tokens
        demand(not loaded or loaded >= self.setting.config.load_back_min_tokens, "hit", lease, "loads only", loaded)
        must = was_busy and self.setting.config.load_back_min_tokens == 1
        demand(not must or cached == match.num_tokens, "hit", lease, "instead of", match)
        self.seen["hits"] += cached > 0
        self.seen["host hits"] += lease.host_tokens > 0

    def _stop(self, request: Request) -> None:
        """Releases a running request: it is over, or comes again with what it has."""
        rng = self.rng
        if rng.random() < 0.5:
            self._publish(request)
        self.pledges.released(request.lease.id)
        self.world.release(request)
        tokens = request.text.tokens[: self.setting.max_prompt]
        self.library.remember(tokens)
        if rng.random() < 0.3 and len(self.waiting) < MAX_WAITING and not request.sequences[0].namespace.retired:
            again = request
            if rng.random() < 0.5:
                namespaces = [sequence.namespace for sequence in request.sequences]
                again = self.world.request(tokens, namespaces, self.page)
            again.end = len(again.text) + rng.randint(0, self.page)
            self.waiting.append(again)
            self.seen["retracted"] += 1

    # ---- running requests

    def _grow(self) -> None:
        """Room for what the coming model step computes; somebody is released where there is none."""
        world, rng = self.world, self.rng
        deciders = []
        for request in list(world.running.values()):
            if request.leases is None or (request.lease.first_step > world.step and rng.random() < 0.9):
                continue
            left = len(request.text) - request.n
            if left > 0:
                wanted = min(left, rng.randint(1, 3 * self.page))
                if request.n + wanted > request.lease.num_tokens or rng.random() < 0.1:
                    self._grow_one(request, wanted)
            elif len(request.text) < request.end:
                if sum(other.sequences is request.sequences for other in world.running.values()) > 1:
                    sequences = request.sequences  # each of the two would append its own tokens
                    world.refused("extend for two", (ValueError,), lambda i, rank, of=sequences: of[i].extend([0]))
                    continue
                self._decode(request)
                deciders.append(request)
        deciders = [request for request in deciders if request.leases is not None]
        if not deciders:
            return
        if rng.random() < 0.5:
            have = world.grow_all(deciders)
            demand(0 <= have <= len(deciders), "room", have)
            if have < len(deciders):
                self.seen["no room to grow"] += 1
                self._stop(deciders[have] if rng.random() < 0.5 else rng.choice(deciders))
        else:
            for request in deciders:
                if request.leases is not None:
                    self._grow_one(request, 1)

    def _decode(self, request: Request) -> None:
        """One more token: the same after the same text, so that requests compute each other's pages."""
        token = [request.text.at(len(request.text)) % self.setting.vocabulary]
        request.text.extend(token)
        for sequence in request.sequences:
            sequence.extend(token)

    def _grow_one(self, request: Request, wanted: int) -> None:
        before = self.first_state()
        self.floors.before()
        has_grown = self.world.grow(request, wanted)
        self.floors.check(request)
        if has_grown:
            return
        self.seen["no room to grow"] += 1
        demand(self.core.digest == before[0], "room", "a grow that failed has changed something")
        victim = self.rng.choice(list(self.world.running.values()))
        self._stop(victim if self.rng.random() < 0.7 else request)

    def _model_steps(self) -> None:
        """All that run in one batch; what they have computed is published afterwards."""
        world, rng = self.world, self.rng
        computed = []
        for request in list(world.running.values()):
            lease = request.lease
            if lease.first_step > world.step or rng.random() < 0.1:
                continue
            m = min(len(request.text), lease.num_tokens, request.n + rng.choice((1, 3 * self.page, 1000)))
            if lease.next_stop is not None and rng.random() >= 0.03:
                m = min(m, lease.next_stop)
            if m > request.n:
                world.model_step(request, m)
            computed.append(request)
        for request in computed:
            if request.leases is None:
                continue
            over = request.n >= request.end
            if rng.random() < (0.9 if over else 0.5):
                self._publish(request)
            if over and rng.random() < 0.8:
                self._stop(request)

    def _publish(self, request: Request) -> None:
        """Up to what is computed, or a little less: but never to a checkpoint that was not written."""
        lease, n = request.lease, request.n
        if self.rng.random() < 0.1:
            n = self.rng.randint(lease.num_computed, n)
        if n in lease.checkpoints and n not in request.written:
            return
        wishes = {}
        if self.rng.random() < 0.1:
            wishes = {"priority": self.rng.randint(0, 3), "retain_steps": self.rng.choice((0, 3, 20))}
        refused = self.core.counters["retentions_refused"]
        self.world.insert(request, n, wishes)
        if wishes.get("retain_steps") and self.core.counters["retentions_refused"] == refused:
            self.pledges.made(self.world, request, wishes["retain_steps"])

    # ---- looking

    def _check_owners(self) -> None:
        if self.world.num_calls >= self._next_owners:
            self._next_owners = self.world.num_calls + CALLS_PER_OWNERS
            self.world.check_owners()

    def _look(self) -> None:
        if self.world.num_calls < self._next_look:
            return
        self._next_look = self.world.num_calls + CALLS_PER_LOOK
        survey = self.world.look()
        self.pledges.check(survey, self.world.step)
        self.seen["looks"] += 1
        for request in self.rng.sample(self.waiting, min(2, len(self.waiting))):
            self._check_match(survey, request)
        tokens = self.library.any()
        self._check_match(survey, self.world.request(tokens, self.rng.choice(self.spaces), 0))

    def _check_match(self, survey: Survey, request: Request) -> None:
        """The cache finds the longest prefix, and knows where it is."""
        text: Text = request.text
        cap = self.rng.choice((None, None, None, len(text) // 2, 0))
        limit = len(text) - 1 if cap is None else min(cap, len(text) - 1)
        found = survey.longest(text, limit)
        is_blind = request.sequences[0].namespace.retired or not self.setting.config.caching
        match = self.world.match(request, cap)
        expected = (0, 0, 0) if is_blind else found
        got = (match.num_tokens, match.device_tokens, match.num_tokens + match.unusable_tokens)
        demand(got == tuple(expected), "match", match, "but by brute force", expected, "up to", limit)
        demand(match.host_tokens == match.num_tokens - match.device_tokens, "match", match)
        explanation = self.world.explain(request)
        if not is_blind:
            usable, whole = survey.longest(text, len(text) - 1), survey.longest(text, len(text))
            told = (explanation.usable_tokens, explanation.found_tokens)
            demand(told == (usable.num_tokens, whole.found_tokens), "match", explanation, "but", usable, whole)
        for branch in match.branch_points:
            demand(match.num_tokens < branch <= got[2] and branch % self.setting.grid == 0, "match", match)

    # ---- the end

    def end(self) -> None:
        """Counts what has happened, gives up what is left, and looks at what remains."""
        world = self.world
        on_device, on_host = world.first.num_evicted()
        self.seen.update(self.core.counters)
        hits = sum(self.core.counters[f"{tier}_hit_tokens"] for tier in ("device", "host", "storage"))
        demand(hits == self.cached_tokens, "accounts", hits, "tokens hit, but leases had", self.cached_tokens)
        self.seen["evicted on device"] += on_device
        self.seen["evicted on host"] += on_host
        self.seen[f"{len(world.ranks)} ranks"] += 1
        for request in list(world.running.values()):
            self.pledges.released(request.lease.id)
            world.release(request)
        for request in list(self.waiting):
            self._give_up(request)
        finish(world, self.spaces, self.rng)


if __name__ == "__main__":
    fuzzer = Fuzzer(int(sys.argv[1]))
    print(fuzzer.setting)
    try:
        fuzzer.run(int(sys.argv[2]))
    finally:
        print(*fuzzer.world.log, sep="\n")
