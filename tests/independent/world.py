"""One to three ranks that are given the same calls, and what lies between them: the exchange of outcomes.

Every call of a core goes through here: all ranks make it, must answer alike, and must have the same digest afterwards.
What differs between ranks is when their storage gets how far, and what it has lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from random import Random
from typing import Any

import numpy as np

from jaxcache.components import Component, RecurrentState, SlidingWindow
from jaxcache.config import CacheConfig
from jaxcache.types import Outcome, TransferKind, Wait
from tests.independent.adapter import Rank
from tests.independent.consumer import Consumer
from tests.independent.content import Runs, Text, Violation, demand
from tests.independent.record import Record
from tests.independent.survey import Survey, check_owners

CLOCK_MODULUS = 1 << 31


class Request:
    """A text that somebody wants computed. One sequence, ticket and lease for each rank.

    n: how far the model has computed it; written: checkpoints of states that the model has filled
    kept: the page tables that the loop uses, on each rank
    """

    def __init__(self, text: Text, sequences: list[Any], num_to_decode: int):
        self.text = text
        self.sequences = sequences
        self.tickets: list[Any] | None = None
        self.leases: list[Any] | None = None
        self.n = 0
        self.written: set[int] = set()
        self.kept: list[dict[str, np.ndarray]] = []
        self.end = len(text) + num_to_decode
        self.patience = 0

    @property
    def lease(self) -> Any:
        assert self.leases is not None
        return self.leases[0]

    def __repr__(self) -> str:
        return f"Request({len(self.text)} tokens, n={self.n}, {self.leases and self.leases[0]})"


class World:
    """num_calls: public calls, each counted once however many ranks make it. log: the last ones, for a report.

    record: of all that was answered, if it is wanted
    """

    def __init__(self, components: tuple[Component, ...], config: CacheConfig, num_ranks: int, rng: Random):
        self.rng = rng
        self.config = config
        self.page = config.page_tokens
        self.ranks = [Rank(components, config, Random(rng.random())) for _ in range(num_ranks)]
        self.first = self.ranks[0]
        self.core = self.first.core
        self.consumers = [Consumer() for _ in self.ranks]
        self.runs = Runs(config.page_tokens)
        self.running: dict[int, Request] = {}  # by lease id
        self.tenant_of: dict[bytes, str] = {}  # by namespace digest
        self.agreed: tuple[Mapping[int, Outcome], int] | None = None
        self.clock_ms = rng.choice((0, CLOCK_MODULUS - 500))
        self.released: list[Any] | None = None  # the last ones
        self.handed_out: list[tuple[Any, bytes]] = []  # page tables that a running program may still read
        self.num_calls = 0
        self.log: deque[tuple[Any, ...]] = deque(maxlen=40)
        self.record: Record | None = None
        self.windows = [c.window_tokens for c in components if isinstance(c, SlidingWindow)]
        self.has_state = any(isinstance(c, RecurrentState) for c in components)

    @property
    def step(self) -> int:
        return self.core.step_number

    # ---- calls

    def call(self, name: str, *details: Any) -> None:
        self.num_calls += 1
        self.log.append((self.core.step_number, name, *details))

    def alike(self, answers: list[Any]) -> Any:
        """What all ranks answered; their digests agree, too."""
        first = self.ranks[0].core
        for answer, rank in zip(answers[1:], self.ranks[1:], strict=True):
            demand(answer == answers[0], "ranks", answers, "after", self.log[-1])
            demand(rank.core.digest == first.digest, "ranks", "digests differ after", self.log[-1])
        if self.record is not None:
            self.record.note(self.log[-1][1], first.digest, answers[0])
        return answers[0]

    def all(self, name: str, call: Callable[[Rank], Any], *details: Any) -> Any:
        self.call(name, *details)
        return self.alike([call(rank) for rank in self.ranks])

    def namespaces(self, fields: Mapping[str, str]) -> list[Any]:
        self.call("new_namespace", fields)
        made = [rank.core.new_namespace(**fields) for rank in self.ranks]
        digest = self.alike([namespace.digest for namespace in made])
        self.tenant_of[digest] = fields.get("tenant", "")
        return made

    def request(self, tokens: list[int], namespaces: list[Any], num_to_decode: int) -> Request:
        self.call("sequence", len(tokens))
        pairs = zip(self.ranks, namespaces, strict=True)
        given = tokens if self.rng.random() < 0.5 else np.array(tokens, np.int32)
        sequences = [rank.core.sequence(given, namespace) for rank, namespace in pairs]
        return Request(Text(namespaces[0].digest, tokens), sequences, num_to_decode)

    def match(self, request: Request, cap: int | None) -> Any:
        self.call("match", request, cap)
        pairs = zip(self.ranks, request.sequences, strict=True)
        return self.alike([rank.core.match(sequence, cap) for rank, sequence in pairs])

    def explain(self, request: Request) -> Any:
        self.call("explain", request)
        pairs = zip(self.ranks, request.sequences, strict=True)
        explanations = [rank.core.explain(sequence) for rank, sequence in pairs]
        self.alike([(explanation.usable_tokens, explanation.found_tokens) for explanation in explanations])
        demand(all(explanation == explanations[0] for explanation in explanations), "ranks", explanations)
        return explanations[0]

    def prefetch(self, request: Request) -> None:
        self.call("prefetch", request)
        pairs = zip(self.ranks, request.sequences, strict=True)
        tickets = [rank.core.prefetch(sequence) for rank, sequence in pairs]
        self.alike([ticket is None for ticket in tickets])
        request.tickets = None if tickets[0] is None else tickets

    def cancel(self, request: Request) -> None:
        self.call("cancel", request)
        for rank, ticket in zip(self.ranks, request.tickets or (), strict=True):
            rank.core.cancel(ticket)
        self.alike([None] * len(self.ranks))
        request.tickets = None

    def admit(self, request: Request, num_new_tokens: int, cap: int | None) -> Any:
        """A lease of the first rank, or its Wait."""
        self.call("admit", request, num_new_tokens, cap)
        tickets = request.tickets or [None] * len(self.ranks)
        parts = zip(self.ranks, request.sequences, tickets, strict=True)
        got = [rank.core.admit(sequence, num_new_tokens, ticket, cap) for rank, sequence, ticket in parts]
        self.alike([lease if isinstance(lease, Wait) else self.first.lease_state(lease) for lease in got])
        if isinstance(got[0], Wait):
            return got[0]
        request.leases, request.tickets = got, None
        request.n = got[0].num_cached_tokens
        request.written.clear()
        request.kept = [{} for _ in got]
        self.running[got[0].id] = request
        for rank, lease in zip(self.ranks, got, strict=True):
            self._give(rank, lease, request.n // self.page, ())
        return got[0]

    def _give(self, rank: Rank, lease: Any, first: int, known: tuple[int, ...]) -> None:
        for c, page_ids in enumerate(rank.fresh(lease, first)):
            if len(page_ids):
                rank.plane.give(c, page_ids)
            elif c == rank.plane.state:
                slots = [slot for slot in lease.checkpoints.values() if slot not in known]
                rank.plane.give(c, slots if known else [*slots, lease.write_slot])

    def number(self, n: int) -> Any:
        """Callers count with Python or with numpy."""
        return n if self.rng.random() < 0.97 else np.int64(n)

    def grow(self, request: Request, num_new_tokens: int) -> bool:
        self.call("grow", request, num_new_tokens)
        assert request.leases is not None
        answers = []
        for rank, lease in zip(self.ranks, request.leases, strict=True):
            first, known = -(-lease.num_tokens // self.page), (lease.write_slot, *lease.checkpoints.values())
            answers.append(rank.core.grow(lease, self.number(request.n), num_new_tokens))
            self._give(rank, lease, first, known)
        self.alike([self.first.lease_state(lease) for lease in request.leases])
        return self.alike(answers)

    def grow_all(self, requests: list[Request]) -> int:
        self.call("grow_all", len(requests))
        answers = []
        for i, rank in enumerate(self.ranks):
            leases = [request.leases[i] for request in requests if request.leases is not None]
            before = [(-(-lease.num_tokens // self.page), tuple(lease.checkpoints.values())) for lease in leases]
            answers.append(rank.core.grow_all(leases, [request.n for request in requests], 1))
            for lease, (first, known) in zip(leases, before, strict=True):
                self._give(rank, lease, first, (lease.write_slot, *known))
        return self.alike(answers)

    def insert(self, request: Request, n: int, wishes: Mapping[str, int]) -> None:
        """THE place where something is published."""
        self.call("insert", request, n, wishes)
        assert request.leases is not None
        states = tuple(p for p in sorted(request.written) if p <= n and p in request.lease.checkpoints)
        for rank, lease in zip(self.ranks, request.leases, strict=True):
            rank.insert(lease, self.number(n), states, wishes)
        request.written = {position for position in request.written if position > n}
        self.alike([self.first.lease_state(lease) for lease in request.leases])

    def release(self, request: Request) -> None:
        self.call("release", request)
        assert request.leases is not None
        del self.running[request.lease.id]
        for rank, lease in zip(self.ranks, request.leases, strict=True):
            rank.core.release(lease)
        self.released, request.leases = request.leases, None
        self.alike([None] * len(self.ranks))

    def forget_device(self) -> None:
        for request in self.running.values():
            request.leases = None
        self.running.clear()
        self.all("forget_device", lambda rank: rank.forget_device())

    def refused(self, name: str, errors: tuple[type[Exception], ...], call: Callable[[int, Rank], Any]) -> None:
        """A mistake of the caller: it raises, and nothing has changed."""
        self.call("bad", name)
        for i, rank in enumerate(self.ranks):
            before = rank.state()
            try:
                answer = call(i, rank)
            except errors:
                pass
            else:
                raise Violation("bad call", f"{name} was answered with {answer!r}")
            demand(rank.state() == before, "bad call", name, "has changed something")

    # ---- steps

    def begin_step(self) -> None:
        """Commits what was agreed, and says what each rank has to say next."""
        for table, before in self.handed_out:
            demand(table.tobytes() == before and not table.flags.writeable, "tables", "a table has changed:", table)
        self.handed_out.clear()
        outcomes, clock = ({}, None) if self.agreed is None else self.agreed
        ended = self.all("commit", lambda rank: rank.core.commit(outcomes, clock), outcomes)
        for rank in self.ranks:
            for id in ended:
                work = rank.plane.work.pop(id, None)
                early = work is not None and work.kind is not TransferKind.QUERY and not work.quiet
                demand(not early, "quiet", "transfer", id, "ended while a rank still worked on it")
            for id in rank.core.unwanted_transfers():
                rank.plane.stop(id)
        self.clock_ms = (self.clock_ms + self.rng.randrange(20)) % CLOCK_MODULUS
        exchanges = self.core.needs_exchange() or self.rng.random() < 0.3
        self.agreed = (self._reduce(), self.clock_ms) if exchanges else None

    def _reduce(self) -> dict[int, Outcome]:
        """What all ranks together say of the live transfers: the least of everything."""
        agreed = {}
        for id in self.core.live_transfers():
            said = [rank.outcome(id) for rank in self.ranks]
            known = [outcome for outcome in said if outcome is not None]
            if self.rng.random() < 0.1 or len(known) < len(said):
                continue  # no lane for it in this step
            done, quiet = all(o.done for o in known), all(o.quiet for o in known)
            pages = {name: min(o.pages[name] for o in known) for name in known[0].pages}
            ends = [o.smallest_end for o in known] if done else [0]
            agreed[id] = Outcome(done, quiet, pages, min(ends), max(ends))
        return agreed

    def apply(self) -> None:
        self.all("take_plan", lambda rank: rank.apply())
        demand(self.core.plan_is_applied(), "plan", "nothing is planned after an apply")

    def model_step(self, request: Request, m: int) -> None:
        """Computes [n, m) of a request whose first step has come."""
        n = request.n
        assert request.leases is not None
        reads = self.rng.random() < 0.4
        for rank, lease, kept in zip(self.ranks, request.leases, request.kept, strict=True):
            tables = rank.tables(lease, kept, reads)
            self.handed_out += [(table, table.tobytes()) for table in lease.page_tables.values()]
            rank.plane.step(tables, rank.slots(lease, n, m), request.text, n, m)
        if m in request.lease.checkpoints:
            request.written.add(m)
        request.n = m
        self.num_calls += 1

    def tick(self) -> None:
        for rank in self.ranks:
            rank.plane.tick()

    # ---- looking

    def check_owners(self) -> None:
        for rank in self.ranks:
            check_owners(rank)

    def look(self) -> Survey:
        """Everything that can be seen of the tree, between an apply and the next insert."""
        surveys = []
        for rank, consumer in zip(self.ranks, self.consumers, strict=True):
            check_owners(rank)
            survey = Survey(rank, self.runs)
            survey.check_content()
            survey.check_sizes()
            if rank.stream is not None:
                consumer.take(rank.take_events())
                survey.check_events(consumer.there)
            surveys.append(survey)
        self.alike([rank.core.sizes() for rank in self.ranks])
        return surveys[0]
