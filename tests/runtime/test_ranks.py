"""R1 to R6: what the ranks of a mesh agree on, through the compiled program, with one core per rank.

Every rank says something else; what comes back is the same everywhere, and no axis, stage or component is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest

import jaxcache
from jaxcache.agreement.collective import collective
from jaxcache.agreement.lanes import Lanes
from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.config import CacheConfig
from jaxcache.core import invariants
from jaxcache.core.lease import Lease
from jaxcache.core.prefetch import PrefetchState, Ticket
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.pools.storage_cells import storage_cells
from jaxcache.types import Outcome, PrefetchPolicy, TransferKind
from tests.models.serving import rig_on

PAGE = 4
FULL, WINDOW, STATE = (
    FullAttention("full", ()),
    SlidingWindow("window", (), window_tokens=6),
    RecurrentState("state", ()),
)
MIXTURES = [(FULL,), (FULL, WINDOW), (FULL, WINDOW, STATE)]
ATTENTION_MESHES = [(2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 1)]
MESHES = [*ATTENTION_MESHES, (1, 1, 2), (1, 1, 4), (2, 1, 2), (1, 2, 2), (2, 2, 2)]
PROMPT = list(range(41))


class Ranks:
    """One core per rank of a mesh; `step` is one exchange through the compiled program. clocks_ms: by rank."""

    def __init__(self, mesh, components=(FULL,), **fields):
        config = {"page_tokens": PAGE, "device_pages": 64, "host_pages": 64, "prefetch_min_tokens": 1, **fields}
        self.cores = [PrefixCache(components, CacheConfig(**config)) for _ in range(mesh.size)]
        self.lanes = Lanes(tuple(component.name for component in components), 4)
        self.program = collective(mesh, self.lanes.num_unanimous)
        self.namespaces = [core.new_namespace(model="ranks") for core in self.cores]
        self.clocks_ms = [0] * mesh.size
        for core in self.cores:
            core.attachment.attach()

    def prefetch(self, tokens: list[int] = PROMPT) -> list[Ticket]:
        pairs = zip(self.cores, self.namespaces, strict=True)
        tickets = [core.prefetch(core.sequence(tokens, namespace)) for core, namespace in pairs]
        assert all(isinstance(ticket, Ticket) for ticket in tickets)
        return [ticket for ticket in tickets if ticket is not None]

    def step(self, said: list[Mapping[int, Outcome]]) -> None:
        """said: what each rank says about every live transfer."""
        for core in self.cores:
            core.take_plan()
        packed = [
            self.lanes.pack(core.step_number, core.digest, outcomes, clock_ms, ok=True)
            for core, outcomes, clock_ms in zip(self.cores, said, self.clocks_ms, strict=True)
        ]
        reduced = np.asarray(self.program(np.stack([said.row for said in packed])))
        for core, own, row in zip(self.cores, packed, reduced, strict=True):
            agreed = self.lanes.unpack(row.tobytes(), own)
            core.commit(agreed.outcomes, agreed.clock_ms)
            invariants.check(core)
        assert len({core.digest for core in self.cores}) == 1

    def all_say(self, outcome: Outcome) -> None:
        (live,) = self.cores[0].live_transfers()
        self.step([{live: outcome} for _ in self.cores])

    def one_says(self, rank: int, outcome: Outcome, others: Outcome) -> None:
        (live,) = self.cores[0].live_transfers()
        self.step([{live: outcome if i == rank else others} for i in range(len(self.cores))])

    def admit(self, tickets: list[Ticket]) -> list[Lease]:
        leases = [core.admit(t.sequence, 41, t) for core, t in zip(self.cores, tickets, strict=True)]
        assert all(isinstance(lease, Lease) for lease in leases), leases
        return [lease for lease in leases if isinstance(lease, Lease)]


def fetching(ranks: Ranks, end: int = 40) -> list[Ticket]:
    """All have agreed to read up to `end`."""
    tickets = ranks.prefetch()
    ranks.all_say(Outcome(True, True, smallest_end=end, largest_end=end))
    assert all(ticket.state is PrefetchState.FETCH for ticket in tickets)
    return tickets


def pages(*counts: int) -> dict[str, int]:
    return dict(zip(("full", "window", "state"), counts, strict=False))


@pytest.mark.parametrize("shape", MESHES)
def test_r1_what_any_one_rank_lacks_all_lack(make_mesh, shape):
    """Both attention axes and all stages, in one reduction, whichever rank it is; an axis of 1 is no special case."""
    mesh = make_mesh(*shape)
    for rank in range(mesh.size):
        ranks = Ranks(mesh)
        tickets = fetching(ranks)
        ranks.one_says(rank, Outcome(True, True, pages(3)), Outcome(True, True, pages(10)))
        assert [lease.num_cached_tokens for lease in ranks.admit(tickets)] == [12] * mesh.size


@pytest.mark.parametrize("shape", MESHES)
@pytest.mark.parametrize("what", ["how far", "may stop", "quiet after an abort", "a store has drained"])
def test_r2_there_is_one_path_for_all_that_is_agreed(make_mesh, shape, what):
    """R2: a rank that lags, wherever it is, holds up the transition on all; then all take it in the same step."""
    mesh = make_mesh(*shape)
    for rank in {0, mesh.size // 2, mesh.size - 1}:
        ranks = Ranks(mesh)
        before, after, is_over = TRANSITIONS[what](ranks)
        assert not any(is_over(i) for i in range(mesh.size))
        ranks.one_says(rank, before, after)
        assert not any(is_over(i) for i in range(mesh.size)), f"{what}: {rank=} was not waited for"
        ranks.all_say(after)
        assert all(is_over(i) for i in range(mesh.size))


Transition = tuple[Outcome, Outcome, Callable[[int], bool]]


def how_far(ranks: Ranks) -> Transition:
    tickets = fetching(ranks)
    few, all_ = Outcome(False, False, pages(0)), Outcome(False, False, pages(10))
    return few, all_, lambda i: tickets[i].prefetch.progress == pages(10)


def may_stop(ranks: Ranks) -> Transition:
    tickets = fetching(ranks)
    return Outcome(False, False, pages(10)), Outcome(True, False, pages(10)), lambda i: tickets[i].done


def aborted(ranks: Ranks) -> Transition:
    tickets = fetching(ranks)
    for core, ticket in zip(ranks.cores, tickets, strict=True):
        core.cancel(ticket)
    hosts = [core.tiers.host[0].allocator for core in ranks.cores]
    return (
        Outcome(True, False, pages(3)),
        Outcome(True, True, pages(3)),
        lambda i: hosts[i].num_free == hosts[i].num_pages,
    )


def stored(ranks: Ranks) -> Transition:
    for core, namespace in zip(ranks.cores, ranks.namespaces, strict=True):
        lease = core.admit(core.sequence(PROMPT, namespace), 41)
        assert isinstance(lease, Lease)
        core.insert(lease, 41)
        core.release(lease)
        core.take_plan()
        core.commit({})
        assert [transfer.kind for transfer in core.take_plan().transfers] == [TransferKind.STORE]
    stores = [core.stores for core in ranks.cores]
    return Outcome(True, False, pages(10)), Outcome(True, True, pages(10)), lambda i: not stores[i].live


TRANSITIONS = {"how far": how_far, "may stop": may_stop, "quiet after an abort": aborted, "a store has drained": stored}


@pytest.mark.parametrize("shape", [shape for shape in MESHES if shape[2] > 1])
def test_r3_stages_follow_the_clock_of_stage_0(make_mesh, shape):
    """Whatever theirs say: the deadline of a prefetch comes in one step on all, in storage and so in host memory."""
    mesh = make_mesh(*shape)
    config = {"prefetch_timeout_s": 0.1, "prefetch_timeout_s_per_1k_tokens": 0.0}
    ranks = Ranks(mesh, prefetch_policy=PrefetchPolicy.TIMEOUT, **config)
    tickets = fetching(ranks)
    for core, ticket in zip(ranks.cores, tickets, strict=True):
        assert not core.admit(ticket.sequence, 41, ticket)
    is_stage_0 = np.zeros(mesh.devices.shape, bool)
    is_stage_0[..., 0] = True
    for step, clock_ms in enumerate((0, 50, 99, 100)):
        follower_ms = 1_000_000 * (step + 1)
        ranks.clocks_ms = [clock_ms if leads else follower_ms for leads in is_stage_0.ravel()]
        assert not any(ticket.done for ticket in tickets), f"decided before {clock_ms} ms"
        ranks.all_say(Outcome(False, False, pages(2)))
    assert all(ticket.done for ticket in tickets)
    assert [lease.num_cached_tokens for lease in ranks.admit(tickets)] == [8] * mesh.size
    assert len({tuple(core.tiers.host[0].allocator.free_ids().tolist()) for core in ranks.cores}) == 1


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
def test_r4_components_are_found_by_name_and_transfers_by_id(make_mesh, shape):
    """One exchange carries all counts; a rank that names them in another order, or lacks one, changes no other."""
    mesh = make_mesh(*shape)
    ranks = Ranks(mesh, MIXTURES[-1])
    first = fetching(ranks)
    second = ranks.prefetch(list(range(1000, 1041)))
    fetch, query = ranks.cores[0].live_transfers()
    assert (first[0].prefetch.id, second[0].prefetch.id) == (fetch, query)
    whole = {fetch: Outcome(False, False, pages(10, 2, 1)), query: Outcome(True, True, {}, 20, 20)}
    turned = {
        query: Outcome(True, True, {}, 12, 12),
        fetch: Outcome(False, False, {"state": 1, "full": 7}),  # in another order; of the window it knows nothing
    }
    ranks.step([turned if i == mesh.size - 1 else whole for i in range(mesh.size)])
    for ticket in first:
        assert [ticket.prefetch.progress.get(name, 0) for name in ranks.lanes.components] == [7, 0, 1]
    assert [ticket.prefetch.bound for ticket in second] == [12] * mesh.size


@pytest.mark.parametrize("shape", [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)])
@pytest.mark.parametrize("lacking", ["window", "state"])
def test_r5_a_window_is_adopted_on_all_ranks_or_none(make_mesh, shape, lacking):
    """And the full pages stay."""
    mesh = make_mesh(*shape)
    for rank in range(mesh.size):
        ranks = Ranks(mesh, MIXTURES[-1])
        fetching(ranks)
        whole = pages(10, 2, 1)
        short = {**whole, lacking: whole[lacking] - 1}
        ranks.one_says(rank, Outcome(True, True, short), Outcome(True, True, whole))
        for core in ranks.cores:
            names = [component.name for component in core.components]
            resident = dict(zip(names, (host.num_resident for host in core.tiers.host), strict=True))
            assert resident == {**whole, lacking: 0}
            assert core.counters["rejected_windows_and_states"] == 1


@pytest.mark.parametrize("components", MIXTURES, ids=len)
def test_r6_several_components_are_agreed_on_like_one(make_mesh, components):
    """On cp x tp x pp: each component's shortest rank counts, wherever it is."""
    mesh = make_mesh(2, 2, 2)
    whole = pages(10, 2, 1)
    for rank in range(mesh.size):
        ranks = Ranks(mesh, components)
        tickets = fetching(ranks)
        for component in components:
            short = {**whole, component.name: 0}
            ranks.one_says(rank, Outcome(False, False, short), Outcome(False, False, whole))
            assert all(ticket.prefetch.progress[component.name] == 0 for ticket in tickets)


def test_r6_one_mesh_reaches_every_part(make_mesh):
    """No part is told cp, tp or pp by anybody else."""
    mesh = make_mesh(2, 2, 2)
    with rig_on(mesh).cache(jaxcache.MemoryStorage()) as cache:
        layout, pool = cache.layouts["full"], cache.engine.effects.host_pools["full"]
        assert layout.mesh is mesh and pool.layout is layout and set(pool.devices) == set(mesh.devices.flat)
        cells = {cell.name for at in np.ndindex(mesh.devices.shape) for cell in storage_cells(layout, at)}
        assert {
            c.name for share in cache.engine.storage_io._parts["full"].shares for c in share.cells
        } == cells and len(cells) == 8


def test_r6_the_order_of_the_axes_does_not_matter(make_mesh, rng):
    """They are found by name."""
    import jax

    mesh = make_mesh(2, 2, 2)
    turned = jax.sharding.Mesh(mesh.devices.transpose(2, 0, 1), ("pp", "cp", "tp"))
    rows = rng.integers(-100, 100, (8, 12)).astype(np.int32)
    by_rank = rows.reshape(2, 2, 2, 12).transpose(2, 0, 1, 3).reshape(8, 12)
    np.testing.assert_array_equal(
        np.asarray(collective(mesh, 9)(rows))[0], np.asarray(collective(turned, 9)(by_rank))[0]
    )
