"""What a caller must not do. Each raises, on every rank, and changes nothing."""

from __future__ import annotations

from random import Random
from typing import Any

from jaxcache.core.prefix_cache import PrefixCache
from tests.independent.world import Request, World

VALUE = (ValueError,)
TYPE = (TypeError,)
RUNTIME = (RuntimeError,)


def make_mistake(world: World, rng: Random, waiting: list[Request], spaces: list[list[Any]]) -> None:
    """One that is possible now."""
    of_running, of_waiting = bool(world.running), bool(waiting)
    kinds = [lambda: _of_namespace(world, rng, spaces), lambda: _of_storage(world)]
    if world.released is not None:
        kinds.append(lambda: _of_released(world, world.released))
    if of_running:
        kinds += [lambda: _of_lease(world, rng, rng.choice(list(world.running.values())))] * 3
    if of_waiting:
        kinds += [lambda: _of_request(world, rng, rng.choice(waiting))] * 3
    rng.choice(kinds)()


def _of_namespace(world: World, rng: Random, spaces: list[list[Any]]) -> None:
    namespaces = rng.choice(spaces)
    other = PrefixCache(world.first.components, world.config)
    foreign = other.new_namespace(weights_version="1")
    choice = rng.randrange(4)
    if choice == 0:
        world.refused("no tokens", VALUE, lambda i, rank: rank.core.sequence([], namespaces[i]))
    elif choice == 1:
        world.refused("negative token", VALUE, lambda i, rank: rank.core.sequence([1, -1], namespaces[i]))
    elif choice == 2:
        world.refused("foreign namespace", VALUE, lambda i, rank: rank.core.sequence([1], foreign))
    else:
        sequence = other.sequence([1, 2, 3], foreign)
        world.refused("foreign sequence", VALUE, lambda i, rank: rank.core.admit(sequence, 1))
        world.refused("foreign sequence", VALUE, lambda i, rank: rank.core.match(sequence))
        world.refused("foreign sequence", VALUE, lambda i, rank: rank.core.prefetch(sequence))


def _of_storage(world: World) -> None:
    if world.core.attachment.attached or not world.first.has_host:
        world.refused("attach", (RuntimeError, ValueError), lambda i, rank: rank.core.attachment.attach())
    else:
        world.refused("detach", RUNTIME, lambda i, rank: rank.core.attachment.detach())


def _of_released(world: World, leases: Any) -> None:
    n = leases[0].num_computed
    world.refused("release twice", VALUE, lambda i, rank: rank.core.release(leases[i]))
    world.refused("grow what was released", VALUE, lambda i, rank: rank.core.grow(leases[i], n, 1))
    world.refused("insert what was released", VALUE, lambda i, rank: rank.core.insert(leases[i], n))


def _of_lease(world: World, rng: Random, request: Request) -> None:
    assert request.leases is not None
    leases, n, room = request.leases, request.lease.num_computed, request.lease.num_tokens
    choice = rng.randrange(8)
    if choice == 0:
        world.refused("insert too much", VALUE, lambda i, rank: rank.core.insert(leases[i], room + 1))
    elif choice == 1 and n:
        world.refused("insert backwards", VALUE, lambda i, rank: rank.core.insert(leases[i], n - 1))
    elif choice == 2:
        world.refused("grow beyond room", VALUE, lambda i, rank: rank.core.grow(leases[i], room + 1, 1))
    elif choice == 3:
        world.refused("grow by nothing", VALUE, lambda i, rank: rank.core.grow(leases[i], n, 0))
    elif choice == 4:
        world.refused("grow by text", TYPE, lambda i, rank: rank.core.grow(leases[i], n, "1"))
    elif choice == 5:
        world.refused("priority", VALUE, lambda i, rank: rank.core.insert(leases[i], n, priority=-1))
    elif choice == 6:
        world.refused("retention", VALUE, lambda i, rank: rank.core.insert(leases[i], n, retain_steps=10**9))
    else:
        world.refused("reset", RUNTIME, lambda i, rank: rank.core.reset())


def _of_request(world: World, rng: Random, request: Request) -> None:
    sequences, tickets = request.sequences, request.tickets
    choice = rng.randrange(6)
    if choice == 0:
        world.refused("admit nothing", VALUE, lambda i, rank: rank.core.admit(sequences[i], 0))
    elif choice == 1:
        world.refused("admit true", TYPE, lambda i, rank: rank.core.admit(sequences[i], True))
    elif choice == 2:
        world.refused("cap", VALUE, lambda i, rank: rank.core.admit(sequences[i], 1, None, -1))
    elif choice == 3:
        world.refused("no lease", TYPE, lambda i, rank: rank.core.release(sequences[i]))
    elif choice == 4 and tickets is not None and any(r.sequences is not sequences for r in world.running.values()):
        others = next(r.sequences for r in world.running.values() if r.sequences is not sequences)
        world.refused("ticket of another", VALUE, lambda i, rank: rank.core.admit(others[i], 1, tickets[i]))
    else:
        world.refused("no ticket", TYPE, lambda i, rank: rank.core.cancel(sequences[i]))
