"""Mistakes of the caller, found before anything changes: TypeError or ValueError that says what was wrong."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping
from types import NoneType
from typing import Any, NamedTuple

import numpy as np

from jaxcache.config import CacheConfig
from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import Ticket
from jaxcache.core.serving import RefusedCall, RefusedType, RefusedValue
from jaxcache.core.tiers import Tiers
from jaxcache.core.tokens import Namespace, Owner, Sequence
from jaxcache.types import Transfer, TransferKind

MANY = 1 << 62


class Uncomputed(NamedTuple):
    """What a lease has reported as computed up to `end` can only be so in a later version of the pools than this."""

    version: int
    lease: int
    end: int


def said(value: Any) -> str:
    """What was passed, for a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an int of {value.bit_length()} bits"
    return reprlib.repr(value)


def count(name: str, value: Any, at_least: int | None = None) -> int:
    """A number of tokens: an int, or an integer of numpy."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise RefusedType(f"{name} must be an int, not {said(value)}")
    number = int(value)
    if at_least is not None and number < at_least:
        raise RefusedValue(f"{name}={said(number)} must be at least {at_least}")
    if not -MANY < number < MANY:
        raise RefusedValue(f"{name} is {said(number)}: more than any sequence has")
    return number


def check_namespace(owner: Owner, namespace: Any) -> None:
    if not isinstance(namespace, Namespace):
        raise RefusedType(f"a Namespace of this cache is needed, not {type(namespace).__name__}")
    if namespace.owner is not owner:
        raise RefusedValue(f"{namespace!r} belongs to another cache")
    if namespace.retired:
        raise RefusedValue(f"{namespace!r} was retired")


def check_ticket(owner: Owner, ticket: Any, sequence: Sequence | None = None) -> None:
    """sequence: that it must have been made for; None: any"""
    if not isinstance(ticket, Ticket):
        raise RefusedType(f"a Ticket is needed, not {type(ticket).__name__}")
    if ticket.sequence.namespace.owner is not owner:
        raise RefusedValue(f"{ticket!r} belongs to another cache")
    if sequence is not None and ticket.sequence is not sequence:
        raise RefusedValue(f"{ticket!r} was made for another sequence")


def check_sequence(owner: Owner, sequence: Any) -> None:
    if not isinstance(sequence, Sequence):
        raise RefusedType(f"a Sequence is needed (cache.sequence(tokens, namespace)), not {type(sequence).__name__}")
    if sequence.namespace.owner is not owner:
        raise RefusedValue(f"{sequence.namespace!r} belongs to another cache")


def check_lease(leases: Mapping[int, Lease], lease: Any, num_computed: int | None) -> None:
    if not isinstance(lease, Lease):
        raise RefusedType(f"a Lease is needed, not {type(lease).__name__}: did admit answer Wait?")
    if leases.get(lease.id) is not lease:
        raise RefusedValue(f"{lease!r} " + ("was released already" if lease._released else "belongs to another cache"))
    if num_computed is not None and not lease.num_computed <= num_computed <= lease.num_tokens:
        raise RefusedValue(
            f"num_computed={said(num_computed)} must be in [{lease.num_computed}, {lease.num_tokens}]: "
            "computed before, and its room"
        )


def check_known(lease: Lease, num_computed: int) -> None:
    """What is published is named by its tokens."""
    num_tokens = lease.sequence.num_tokens
    if num_computed > num_tokens:
        raise RefusedValue(f"{num_computed=} but the sequence has {num_tokens} tokens: call sequence.extend first")


def check_may_run(tiers: Tiers, lease: Lease) -> None:
    """Nothing can be computed before what was loaded back is there."""
    if lease.first_step > tiers.step:
        raise RefusedCall(f"{lease!r} may run from step {lease.first_step} on; this is {tiers.step}")


def check_runnable(
    live: Mapping[int, Lease], tiers: Tiers, plan_is_applied: bool, leases: Collection[Lease | None]
) -> None:
    """A model step may read the pages of all of them; RuntimeError, as `Lease.page_tables` raises it, if not yet."""
    if not isinstance(leases, (list, tuple)):
        raise RefusedType(f"leases must be a list, not {type(leases).__name__}")
    if not set(map(type, leases)) <= {Lease, NoneType}:
        for lease in leases:
            if lease is not None:
                check_lease(live, lease, None)
    for lease in leases:
        if lease is not None and (live.get(lease.id) is not lease or lease.first_step > tiers.step):
            check_lease(live, lease, None)
            _ = lease.page_tables
    if not plan_is_applied and any(lease is not None for lease in leases):
        raise RefusedCall("pages are about to move: call pools = cache.apply(pools) before a model step")


def check_no_leases(leases: Mapping[int, Lease]) -> None:
    if leases:
        raise RefusedCall(f"reset needs every lease released first; held: {sorted(leases)[:8]}")


def check_applied(planned: Collection[Transfer]) -> None:
    """A planned load-back must be on its way before its first step begins."""
    if planned and any(transfer.kind is TransferKind.LOAD_BACK for transfer in planned):
        raise RefusedCall("a load-back was planned but not applied: call pools = cache.apply(pools) before cache.step")


def check_computed(missing: Uncomputed | None, tiers: Tiers, planned: Collection[Transfer]) -> None:
    """No BACKUP is planned before the pools have come in which its pages are computed."""
    if missing is None or missing.version < tiers.pools_version:
        return
    if any(transfer.kind is TransferKind.BACKUP for transfer in planned):
        raise RefusedCall(
            f"lease {missing.lease} was published up to {missing.end} tokens by insert, but since it got room for "
            "them no model step has run on the pools: insert after the model step, and pass on what it returned"
        )


def check_lists(leases: Any, num_computed: Any) -> None:
    """Of leases, and of as many numbers of tokens."""
    for name, value in (("leases", leases), ("num_computed", num_computed)):
        if not isinstance(value, (list, tuple)) and (not isinstance(value, np.ndarray) or value.ndim != 1):
            raise RefusedType(f"{name} must be a list, not {type(value).__name__}")
    if len(leases) != len(num_computed):
        raise RefusedValue(f"{len(leases)} leases, but {len(num_computed)} numbers of computed tokens")


def check_states(lease: Lease, states: Any, num_computed: int) -> None:
    """Positions for which the lease has a slot, and which are computed."""
    if not isinstance(states, (list, tuple)):
        raise RefusedType(f"states must be a list of positions, not {type(states).__name__}")
    for position in states:
        if type(position) is not int or position not in lease.checkpoints or position > num_computed:
            raise RefusedValue(
                f"{said(position)} is no position of a state that can have been written: {num_computed} tokens are "
                f"computed, and lease.checkpoints is {dict(lease.checkpoints)}"
            )


def check_options(config: CacheConfig, priority: Any, retain_steps: Any) -> None:
    """What `insert` is asked for beyond publishing."""
    for name, value in (("priority", priority), ("retain_steps", retain_steps)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise RefusedValue(f"{name} must be an int of at least 0, not {said(value)}")
        if value >= MANY:
            raise RefusedValue(f"{name} is {said(value)}: too large")
    if retain_steps > config.max_retain_steps:
        raise RefusedValue(f"{retain_steps=} must not be above {config.max_retain_steps=}")
