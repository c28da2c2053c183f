"""The end of a run: everything is released and becomes quiet, every token is accounted for, every page is free."""

from __future__ import annotations

from random import Random
from typing import Any

from tests.independent.content import demand
from tests.independent.world import World

MAX_STEPS = 5000


def finish(world: World, spaces: list[list[Any]], rng: Random) -> None:
    """What still runs or waits has been given up."""
    world.apply()
    _settle(world)
    _check_accounts(world)
    survey = world.look()
    demand(not survey.num_empty_leaves, "leak", "nodes that hold nothing:", survey.num_empty_leaves)
    demand(not any(world.core.sizes()[4::3]), "leak", "nothing runs, but pinned are", world.core.counts())
    _check_storages(world)
    _fill_device(world, rng.choice(spaces))
    world.all("reset", lambda rank: rank.core.reset())
    for _ in range(2):
        world.apply()
        world.begin_step()
    world.look()
    for rank in world.ranks:
        sizes = rank.core.sizes()
        demand(sizes[:2] == [0, 0] and sizes[2::3] == rank.capacities, "leak", rank.core.counts())


def _settle(world: World) -> None:
    """Steps until no transfer is live and nothing is retained."""
    core = world.core
    for _ in range(MAX_STEPS):
        if world.first.is_settled:
            return
        world.begin_step()
        world.apply()
        for rank in world.ranks:
            rank.plane.hurry()
    demand(False, "end", "these do not end:", core.live_transfers(), core.counts())


def _check_accounts(world: World) -> None:
    """Every token that ranks agreed to be in storage was used, or missing for one reason."""
    counters = world.core.counters
    unfulfilled = sum(count for name, count in counters.items() if name.startswith("unfulfilled_"))
    agreed, used = counters["agreed_storage_tokens"], counters["storage_tokens_used"]
    demand(agreed == used + unfulfilled, "accounts", f"{agreed=} {used=} {unfulfilled=}")


def _check_storages(world: World) -> None:
    """What was stored under a key is what the tokens behind that key demand."""
    for rank in world.ranks:
        salts = dict(zip(rank.plane.names, rank.plane.salts, strict=True))
        for (component, key), value in (rank.plane.storage or {}).items():
            h = world.runs.h_of_key.get(key)
            demand(h is None or value == h ^ salts[component], "storage", component, key.hex(), "has another's content")


def _fill_device(world: World, space: list[Any]) -> None:
    """One request as large as the device: everything has to leave for it."""
    rank = world.first
    run_pages = [rank.capacities[c] for c in range(rank.num_components) if c != rank.plane.state]
    request = world.request([0], space, 0)
    lease = world.admit(request, min(run_pages, default=4) * world.page, None)
    if not lease:
        demand(lease.reason == "floors" and bool(world.config.tenants), "leak", lease, "in an empty cache")
        return
    world.apply()
    world.look()
    world.release(request)
