"""The state machine: match, admit, grow, insert, release, prefetch, cancel, commit. No I/O, no clock, no threads.

Calls and agreed outcomes go in, plans come out. Every process runs the same calls in the same order and so holds the
same tree: same node ids, same page ids, same evictions, same digest.

    sequence -> match -> [prefetch] -> admit -> grow/insert ... -> release
                             |           |            |
                          QUERY,FETCH LOAD_BACK  BACKUP,STORE      take_plan() -> runtime
                             +---- agreed outcomes: commit() <---- runtime
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core import bad_input
from jaxcache.core.admission import Admission, Needs
from jaxcache.core.attachment import Attachment
from jaxcache.core.backups import Backups
from jaxcache.core.clearing import Clearing
from jaxcache.core.decisions import Counters, Decisions
from jaxcache.core.explain import Explanation, explain
from jaxcache.core.kinds import first_with_arrays, make_kinds, residency_of, validate, with_spine
from jaxcache.core.lease import NO_POSITIONS, Lease, TokenPositions
from jaxcache.core.leases import Leases
from jaxcache.core.limits.quotas import Quotas
from jaxcache.core.limits.retention import Retentions
from jaxcache.core.match import Matcher, Prefix
from jaxcache.core.outbox import Outbox
from jaxcache.core.prefetch import Ticket
from jaxcache.core.prefetches import Prefetches
from jaxcache.core.serving import RefusedType, RefusedValue, Serving, changes
from jaxcache.core.stores import Stores
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Namespace, Sequence, extend_all
from jaxcache.types import Match, Outcome, Plan, PrefetchPolicy, Wait

ZERO, ONE = 0, 1  # compared by identity: any other object takes the longer way


class PrefixCache:
    """Generic over any tuple of components. counters: what `stats` reports, from zero."""

    def __init__(self, components: tuple[Component, ...], config: CacheConfig):
        validate(components, config)
        self.components, self.config = with_spine(components, config)
        self.counters: Counters = defaultdict(int)
        self.decisions = Decisions()
        self.outbox = Outbox(self.decisions)
        self.tiers = tiers = Tiers(self.components, self.config, residency_of, first_with_arrays(self.components))
        self.kinds = kinds = make_kinds(tiers, self.counters)
        self.matcher = Matcher(tiers, kinds)
        self.clearing = Clearing(self)
        self.stores = Stores(tiers, kinds, self.decisions, self.outbox, self.counters)
        self.backups = Backups(tiers, kinds, self.outbox, self.stores, self.counters, self.clearing.drop)
        self.admission = Admission(tiers, kinds, self.matcher, self.outbox, self.counters)
        self.quotas = None if tiers.tenants is None else Quotas(tiers.tenants, tiers, kinds, self.counters)
        self.leases = Leases(tiers, kinds, self.decisions, self.counters, self.quotas)
        self.serving = Serving(self.leases)
        self.next_lease_id = 1
        self.prefetches = Prefetches(
            tiers, kinds, self.matcher, self.decisions, self.outbox, self.stores, self.backups, self.counters
        )
        self.retentions = Retentions(tiers, kinds, self.counters)
        self.attachment = Attachment(self.serving, tiers, self.decisions, self.stores, self.prefetches, self.backups)
        self._scatter_is_due = False

    @property
    def digest(self) -> int:
        return self.decisions.digest

    def sizes(self) -> list[int]:
        """Of the tree and of pages: equal on ranks which hold the same, whatever they decided."""
        sizes = [self.tiers.tree.num_nodes, len(self.leases)]
        for residency in self.tiers.residencies:
            sizes += (residency.allocator.num_free, residency.num_resident, residency.num_pinned)
        return sizes

    def counts(self) -> dict[str, int]:
        """The same by name, for people."""
        pages = [f"{r.tier.name.lower()} pages of {r.component.name}" for r in self.tiers.residencies]
        names = [f"{what} {name}" for name in pages for what in ("free", "resident", "pinned")]
        return dict(zip(["nodes", "leases", *names], self.sizes(), strict=True))

    @property
    def step_number(self) -> int:
        return self.tiers.step

    # ---- sequences

    @changes
    def new_namespace(self, **fields: str) -> Namespace:
        """A namespace from fields such as model, weights_version, tenant_salt; equal fields are the same one.

        Raises ValueError for the fields of one that was retired: storage may still hold its pages.
        """
        for name, value in fields.items():
            if not isinstance(value, str):
                raise RefusedType(f"namespace field {name!r} must be a str, not {type(value).__name__}")
        try:
            namespace = Namespace(self, fields)
        except UnicodeEncodeError:
            raise RefusedValue("the fields of a namespace must be text that can be encoded as UTF-8") from None
        if namespace.digest in self.tiers.tree.retired:
            raise RefusedValue(
                f"{namespace!r} was retired, and storage may still hold its pages, which would be found again: "
                "give the new one another weights_version"
            )
        known = self.tiers.tree.namespaces.get(namespace.digest)
        if known is not None:
            return known
        root = self.tiers.tree.root(namespace)
        if self.tiers.tenants is not None:
            root.account = self.tiers.tenants.open(namespace, root)
        self.decisions.note("namespace", namespace.checksum, root.id)
        return namespace

    @changes
    def retire_namespace(self, namespace: Namespace) -> None:
        """Makes all its pages unreachable at once, O(live prefetches), which are given up; reclaims lazily."""
        bad_input.check_namespace(self, namespace)
        self.retentions.release_all(namespace)
        self.prefetches.abandon_all(namespace)
        if self.tiers.tenants is not None:
            self.tiers.tenants.retire(self.tiers.tree.root(namespace).account)
        self.tiers.tree.retire(namespace)
        self.decisions.note("retire", namespace.checksum, len(self.tiers.tree.roots))

    def sequence(self, tokens: Any, namespace: Namespace) -> Sequence:
        if type(namespace) is not Namespace or namespace.owner is not self or namespace.retired:
            bad_input.check_namespace(self, namespace)
        return Sequence(namespace, self.tiers.tree.root(namespace), tokens, self.config.page_tokens, self.decisions)

    def extend_all(self, sequences: list[Sequence], tokens: Any) -> None:
        """`Sequence.extend` by one token each, for many at once."""
        extend_all(self, sequences, tokens)

    def match(self, sequence: Sequence, max_tokens: int | None = None) -> Match:
        """Where a request could resume; changes nothing."""
        if type(sequence) is not Sequence or sequence.namespace.owner is not self:
            bad_input.check_sequence(self, sequence)
        if max_tokens is not None:
            max_tokens = bad_input.count("max_tokens", max_tokens, 0)
        return self.matcher.match(sequence, max_tokens)

    def explain(self, sequence: Sequence) -> Explanation:
        """Why a prompt is a hit or a miss; changes nothing."""
        bad_input.check_sequence(self, sequence)
        return explain(self.matcher, sequence, self.leases)

    # ---- requests

    def admit(
        self,
        sequence: Sequence,
        num_new_tokens: int,
        ticket: Ticket | None = None,
        max_cached_tokens: int | None = None,
    ) -> Lease | Wait:
        """Pins the longest resumable prefix and makes room for the next chunk, evicting and loading back if needed.

        |---- on device ----|---- loaded back ----|---- new pages ----|
        0             device_tokens       num_cached_tokens    + num_new_tokens

        Wait(reason): not now, and nothing has changed (but a running best_effort ticket may have been decided, and
        with "prefetch" the time of PrefetchPolicy.TIMEOUT begins). While nothing else runs a shorter hit that fits is
        taken, so only a chunk larger than the device waits for ever; or, with the reason "floors", one larger than
        what the floors of other tenants leave of it.
        """
        try:  # as @changes
            if self.serving.ended is not None:
                self.serving.check()
            if type(sequence) is not Sequence or sequence.namespace.owner is not self:
                bad_input.check_sequence(self, sequence)
            if type(num_new_tokens) is not int or not 0 < num_new_tokens < bad_input.MANY:
                num_new_tokens = bad_input.count("num_new_tokens", num_new_tokens, 1)
            if max_cached_tokens is not None:
                max_cached_tokens = bad_input.count("max_cached_tokens", max_cached_tokens, 0)
            if ticket is not None:
                bad_input.check_ticket(self, ticket, sequence)
            prefix, needs = self.admission.longest(sequence, max_cached_tokens, num_new_tokens)
            if needs is None and not self._runs():
                prefix, needs = self.admission.longest_that_fits(sequence, max_cached_tokens, num_new_tokens)
            if needs is None:
                floors = self.quotas is not None and not self.is_busy() and self.quotas.floors_block(num_new_tokens)
                return self._wait("floors" if floors else "no room")
            if self.quotas is not None and self.quotas.over(sequence, prefix, num_new_tokens):
                self.counters["quota_waits"] += 1
                return self._wait("over quota")
            if ticket is not None and not ticket.done:
                if self.prefetches.policy is not PrefetchPolicy.BEST_EFFORT:
                    self.prefetches.wait_for(ticket)
                    return self._wait("prefetch")
                self.prefetches.take_what_came(ticket)
                prefix, needs = self.admission.longest_that_fits(sequence, max_cached_tokens, num_new_tokens)
                if needs is None:  # under write_back the pages that came pin those above them
                    return self._wait("no room")
            return self._admit(sequence, prefix, needs, num_new_tokens, ticket)
        except BaseException as error:
            self.serving.interrupted(error, "admit")
            raise

    def _wait(self, reason: str) -> Wait:
        self.counters["waits"] += 1
        return Wait(reason)

    def is_busy(self) -> bool:
        """Whether waiting could make room on the device: something runs, is retained until some step, or on its way
        back."""
        return self._runs() or bool(self.retentions.live) or self.clearing.frees_device_pages()

    def _runs(self) -> bool:
        """Whether anything runs whose end could make room on the device (storage: only under write_back)."""
        if self.leases or self.admission.loading:
            return True
        return self.tiers.writes_back and self.tiers.holds.are_on_device()

    def _admit(
        self, sequence: Sequence, prefix: Prefix, needs: Needs, num_new_tokens: int, ticket: Ticket | None
    ) -> Lease:
        num_cached, _, _, device_tokens = prefix
        tiers, counters = self.tiers, self.counters
        id = self.next_lease_id
        self.next_lease_id = id + 1
        lease = self.admission.admit(id, sequence, prefix, needs, num_new_tokens, self.plan_is_applied)
        if ticket is not None:
            lease.storage_tokens = self.prefetches.use(ticket, device_tokens, num_cached)
        if num_cached > device_tokens:
            lease.device_tokens = device_tokens
            lease.host_tokens = num_cached - device_tokens - lease.storage_tokens
            counters["host_hit_tokens"] += lease.host_tokens
            counters["storage_hit_tokens"] += lease.storage_tokens
        self.leases[id] = lease
        if self.quotas is not None:
            self.quotas.settle(lease)
        if tiers.profile is not None:
            tiers.profile.admitted(sequence, lease._node)
        counters["admits"] += 1
        counters["prompt_tokens"] += sequence.num_tokens
        counters["device_hit_tokens"] += device_tokens
        content = sequence.checksum(num_cached, lease._node.id + (sum(lease._stops) << 32))
        self.decisions.note("admit", id, num_cached, sequence.namespace.checksum, content, num_new_tokens)
        return lease

    def grow(self, lease: Lease, num_computed: int, num_new_tokens: int) -> bool:
        """Room for the next `num_new_tokens` after `num_computed`. False: there is none, retract a request; what is
        computed counts all the same, and pages that a window has left behind are free."""
        try:  # as @changes
            if (
                type(lease) is Lease
                and type(num_computed) is int
                and (num_new_tokens is ONE or (type(num_new_tokens) is int and num_new_tokens > 0))
                and (end := num_computed + num_new_tokens) <= lease._room_end
                and lease.num_computed <= num_computed <= lease.num_tokens
                and lease._tiers is self.tiers
            ):  # one of the many tokens that need no new page
                if num_computed > lease._last_room:
                    self.leases.note_uncomputed(lease, num_computed)
                lease.num_computed = num_computed
                if end > lease.num_tokens:
                    lease.num_tokens = end
                return True
            self.serving.check()
            return self.leases.grow(lease, num_computed, num_new_tokens)
        except BaseException as error:
            self.serving.interrupted(error, "grow")
            raise

    @changes
    def grow_all(self, leases: list[Lease], num_computed: list[int], num_new_tokens: int = 1) -> int:
        """`grow` for many at once; returns how many of them, from the first on, have their room."""
        return self.leases.grow_all(leases, num_computed, num_new_tokens)

    def insert(
        self,
        lease: Lease,
        num_computed: int,
        *,
        states: TokenPositions = NO_POSITIONS,
        priority: int = 0,
        retain_steps: int = 0,
    ) -> None:
        """Publishes the whole pages of what is computed, and plans their backup. Publishing again changes nothing.

        states: positions of `lease.checkpoints` whose slots the loop has written; others up to here are lost
        priority: at least this, for all that the lease has published; only eviction_policy="priority" looks at it
        retain_steps: what resuming at the published end needs stays on the device until so many steps have begun
        """
        try:  # as @changes
            if self.serving.ended is not None:
                self.serving.check()
            options = () if priority is ZERO and retain_steps is ZERO else (priority, retain_steps)
            if type(num_computed) is not int:
                num_computed = bad_input.count("num_computed", num_computed)
            if (
                type(lease) is not Lease
                or lease._released
                or lease._tiers is not self.tiers
                or not lease.num_computed <= num_computed <= lease.num_tokens
            ):
                bad_input.check_lease(self.leases, lease, num_computed)
            if num_computed > lease.sequence.num_tokens:
                bad_input.check_known(lease, num_computed)
            if options:
                bad_input.check_options(self.config, *options)
            if states is not NO_POSITIONS:
                bad_input.check_states(lease, states, num_computed)
            if lease.first_step > self.tiers.step and num_computed > lease.num_computed:
                bad_input.check_may_run(self.tiers, lease)
            self._insert(lease, num_computed, states, options)
        except BaseException as error:
            self.serving.interrupted(error, "insert")
            raise

    def _insert(self, lease: Lease, num_computed: int, states: TokenPositions, options: tuple[int, ...]) -> None:
        """options: priority and retain_steps, unless both are 0."""
        quotas, old_end = self.quotas, lease._published
        publishes = self.config.caching and not lease.sequence.namespace.retired
        self.leases.insert(lease, num_computed, states, publishes)
        positions = sum(states) if states else 0
        self.decisions.note("insert", lease.id, lease._published, lease._node.id, num_computed, positions)
        if publishes:
            if options:
                self._set_options(lease, *options)
            if self.backups.on_insert:
                self.backups.after_insert(lease, old_end)
        if quotas is not None:
            quotas.settle(lease)
            if publishes:
                quotas.enforce(lease)

    @changes
    def tables_were_read(self, leases: list[Lease]) -> None:
        """The loop has the present tables of these leases, and will use no earlier ones: own pages that only those name
        are given back."""
        if self.config.stable_tables:
            return
        for lease in leases:
            if lease._duplicates is not None and not lease._released:
                self.decisions.note("duplicates", lease.id, self.leases.free_duplicates(lease))
                if self.quotas is not None:
                    self.quotas.settle(lease)

    def _set_options(self, lease: Lease, priority: int, retain_steps: int) -> None:
        self.tiers.raise_priority(lease._node, priority)
        if retain_steps:
            self.retentions.retain(lease, retain_steps)
        self.decisions.note("options", lease.id, priority, retain_steps)

    def release(self, lease: Lease) -> None:
        """Gives back what the lease holds. Raises ValueError the second time."""
        try:  # as @changes
            if self.serving.ended is not None:
                self.serving.check()
            if type(lease) is not Lease or self.leases.get(lease.id) is not lease:
                bad_input.check_lease(self.leases, lease, None)
            self.leases.release(lease)
            self.decisions.note("release", lease.id)
        except BaseException as error:
            self.serving.interrupted(error, "release")
            raise

    # ---- storage

    @changes
    def prefetch(self, sequence: Sequence) -> Ticket | None:
        """Asks storage for what follows the longest match; None where that cannot pay. Give the ticket to `admit`."""
        bad_input.check_sequence(self, sequence)
        if not self.attachment.is_readable or not self.config.caching or sequence.namespace.retired:
            return None
        return self.prefetches.prefetch(sequence)

    @changes
    def cancel(self, ticket: Ticket) -> None:
        """Nothing more is wanted of it. Harmless when it is over."""
        bad_input.check_ticket(self, ticket)
        self.prefetches.cancel(ticket)

    def live_transfers(self) -> list[int]:
        """Ids of the storage transfers whose outcomes are awaited, ascending."""
        return sorted([*self.stores.live, *self.prefetches.live])

    def needs_exchange(self) -> bool:
        """Whether something waits for what the ranks have to tell each other."""
        return bool(self.stores.live or self.prefetches.live or self.stores.num_awaited_exchanges)

    def unwanted_transfers(self) -> list[int]:
        """Those of which only quiet is awaited: their workers may stop."""
        return [*self.stores.forgotten(), *self.prefetches.over()]

    def largest_end(self, transfer_id: int, exists: Mapping[str, Any]) -> int:
        """What one process answers to a live QUERY: the largest end within its bound that its storage can serve."""
        return self.prefetches.largest_end(self.prefetches.live[transfer_id], exists)

    # ---- steps

    @changes
    def commit(self, agreed: Mapping[int, Outcome], clock_ms: int | None = None) -> list[int]:
        """Begins a step: takes the outcomes that all ranks agreed on, in the order of their ids.

        clock_ms: stage 0's clock as agreed with them, modulo CLOCK_MODULUS; None: nothing was exchanged
        returns:  the ids of the transfers that have ended
        Raises RuntimeError while a planned load-back is unapplied.
        """
        bad_input.check_applied(self.outbox.transfers)
        self.tiers.step += 1
        self.decisions.step = self.tiers.step
        if self.admission.loading:
            self._scatter_is_due |= self.admission.scattered()
        self.retentions.expire()
        live = [id for id in self.live_transfers() if id in agreed] if agreed else []  # others were never applied
        for id in live:
            if id in self.stores.live:
                self.stores.commit(id, agreed[id])
            else:
                self.prefetches.commit(self.prefetches.live[id], agreed[id])
        if clock_ms is not None:
            self.stores.exchanged()
            if self.prefetches.policy is PrefetchPolicy.TIMEOUT:
                self.prefetches.expire(clock_ms)
        if self.clearing.deferred:
            self.clearing.settle()
        self.stores.start()
        log = self.tiers.log
        if log is not None and log.overflows():
            log.restart(self.tiers.tree)
            self.counters["event_overflows"] += 1
        return [id for id in live if id not in self.stores.live and id not in self.prefetches.live]

    @changes
    def take_plan(self) -> Plan:
        """What has been planned since the last time; the caller applies it."""
        self._scatter_is_due = False
        return self.outbox.take()

    def plan_is_applied(self) -> bool:
        """Whether a model step may run: nothing is planned, and no load-back waits to be scattered in this step.

        Raises ServingEnded if none may ever run again.
        """
        self.serving.check()
        return not self.outbox.transfers and not self._scatter_is_due

    # ---- everything at once

    @changes
    def reset(self) -> None:
        """Forgets everything on device and host. Raises RuntimeError while leases are out."""
        bad_input.check_no_leases(self.leases)
        self.retentions.release_all()
        self.clearing.clear_all()
        self.leases.uncomputed = None
        self.decisions.note("reset")

    @changes
    def forget_device(self) -> None:
        """What the device holds is lost (a donated step failed, an engine sleeps): keeps what host memory has.

        Every lease ends, as if released; what it has published may be found again if it is in host memory.
        """
        for lease in list(self.leases.values()):
            self.release(lease)
        self.retentions.release_all()
        self.clearing.keep_host()
        self.leases.uncomputed = None
        self.decisions.note("forget_device")
