"""When device pages are copied to host memory, in which order, and what that means for the pages they leave behind."""

from __future__ import annotations

import pytest

from jaxcache.types import Outcome, TransferKind, Wait, WritePolicy
from tests.core.helpers import FULL, NEXT, Server, prompt, server_with_storage, state, window

BACKUP, LOAD_BACK = TransferKind.BACKUP, TransferKind.LOAD_BACK


def num_backed_up(server: Server) -> int:
    return sum(len(move.src_page_ids) for transfer in server.planned(BACKUP) for move in transfer.moves)


@pytest.mark.parametrize(
    ("policy", "backed_up"),
    [
        (WritePolicy.NONE, [0, 0, 0, 0]),
        (WritePolicy.WRITE_THROUGH, [2, 0, 0, 0]),
        (WritePolicy.WRITE_THROUGH_SELECTIVE, [0, 0, 2, 0]),
        (WritePolicy.WRITE_BACK, [0, 0, 0, 0]),
    ],
)
def test_when_a_prompt_is_backed_up(policy, backed_up):
    """W1: at once, from the second hit on, at eviction, or never."""
    server = Server(host_pages=32, write_policy=policy)
    counts = []
    for _ in backed_up:
        server.prefill(prompt(9))
        counts.append(num_backed_up(server))
        server.rank.apply()
    assert counts == backed_up
    server.flush_device()
    expected = {WritePolicy.NONE: 0}.get(policy, 8)
    assert server.match(prompt(8)).num_tokens == expected


def test_one_backup_per_insert_with_one_move_per_component():
    """W4: ids ascend in the order in which transfers were planned, and pages are unique within one."""
    server = Server(FULL, window(6), state(), host_pages=32)
    lease = server.admit([*prompt(24), NEXT])
    server.compute(lease, 25)
    server.insert(lease, 25)
    (backup,) = server.core.outbox.transfers
    assert [(move.component, len(move.src_page_ids)) for move in backup.moves] == [
        ("full", 6),
        ("window", 2),
        ("state", 1),
    ]
    for move in backup.moves:
        assert len(set(move.dst_page_ids.tolist())) == len(move.dst_page_ids)
    server.release(lease)
    server.prefill(prompt(8, 1000))
    assert [transfer.id for transfer in server.planned(BACKUP)] == [backup.id + 1]


def test_ancestors_are_backed_up_before_descendants():
    """W2, I6: host memory is prefix-closed, also after it was too full for a while."""
    server = server_with_storage(host_pages=8)
    server.prefill(prompt(32, 1000))
    server.step(0)  # its store pins the whole host tier
    assert server.core.live_transfers()
    server.prefill(prompt(8))
    server.prefill(prompt(12))
    assert server.core.counters["skipped_backup_pages"] > 0
    assert server.host_free() == 0
    server.settle()
    lease = server.admit(prompt(16))
    server.compute(lease, 16)
    server.insert(lease, 16)
    (backup,) = server.planned(BACKUP)
    assert backup.moves[0].src_page_ids.tolist() == lease.page_ids[0].tolist()


def test_a_full_host_tier_never_stops_serving():
    """E5: backups are skipped and counted, and made up for at the next insert below."""
    server = server_with_storage(host_pages=4, device_pages=16)
    server.prefill(prompt(16))
    server.step(0)
    server.prefill(prompt(8, 1000))
    assert server.core.counters["skipped_backup_pages"] == 2
    assert server.prefill(prompt(9, 1000)) == 8
    server.settle()
    server.prefill(prompt(13, 1000))
    server.flush_device()
    assert server.match(prompt(12, 1000)).host_tokens == 12


def test_write_back_takes_along_what_hangs_below_a_dropped_page():
    """E5: device and host together stay prefix-closed."""
    server = Server(device_pages=4, host_pages=2, write_policy=WritePolicy.WRITE_BACK)
    server.prefill(prompt(12))
    server.prefill(prompt(16))
    lease = server.admit(prompt(16, 1000))
    assert server.core.tiers.tree.num_nodes == 0
    assert server.core.counters["skipped_backup_pages"] == 3
    server.release(lease)
    server.check_empty()


def test_a_late_state_is_backed_up_alone():
    """W2: its node was backed up before it had one."""
    server = Server(FULL, state(), host_pages=32)
    server.prefill(prompt(16))
    server.rank.apply()
    lease = server.admit([*prompt(8), *prompt(4, 1000)])
    server.compute(lease, 12)
    server.insert(lease, 12)
    (backup,) = server.planned(BACKUP)
    counts = {move.component: len(move.src_page_ids) for move in backup.moves}
    assert counts == {"full": 1, "state": 2}  # [8, 12) with its state, and the state at 8


def test_backup_then_evict_then_reuse_in_one_step():
    """W3: the snapshot is taken when it is dispatched, before any later write."""
    server = Server(FULL, window(6), device_pages=4, host_pages=16)
    server.prefill(prompt(16))
    lease = server.admit(prompt(16, 1000))
    assert [transfer.kind for transfer in server.core.outbox.transfers] == [BACKUP]
    assert set(server.planned(BACKUP)[0].moves[0].src_page_ids.tolist()) == set(lease.page_ids[0].tolist())
    server.compute(lease, 16)
    server.insert(lease, 16)
    server.release(lease)
    lease = server.admit([*prompt(8), 77])  # loaded back to where the other's pages are being backed up
    assert lease.num_cached_tokens == 0  # its windows end at 12 and 16
    server.release(lease)
    server.rank.forget_device()
    server.settle()
    assert server.match(prompt(16)).host_tokens == 16


def test_load_back_of_what_is_not_backed_up_yet():
    """Design section 9: a load may be planned before the backup that fills its source has been applied."""
    server = Server(device_pages=5, host_pages=16)
    server.prefill(prompt(16))
    server.release(server.admit(prompt(20, 1000)))
    lease = server.admit(prompt(17))
    assert [transfer.kind for transfer in server.core.outbox.transfers] == [BACKUP, LOAD_BACK]
    assert lease.num_cached_tokens == 16
    server.compute(lease, 17)


def test_a_split_while_the_copy_is_under_way_changes_nothing():
    """W3."""
    server = Server(FULL, window(6), host_pages=32)
    server.prefill(prompt(16))
    leases = [server.admit([*prompt(end), 77]) for end in (12, 8, 4)]
    assert server.planned(BACKUP)
    server.rank.apply()
    for lease in leases:
        server.release(lease)
    server.rank.forget_device()
    lease = server.admit(prompt(20))
    assert lease.num_cached_tokens == 16
    server.compute(lease, 20)


def test_without_a_host_tier_nothing_is_planned():
    server = Server(FULL, window(6), state(), host_pages=0)
    server.prefill(prompt(24))
    assert not server.core.outbox.transfers
    assert server.core.counters["skipped_backup_pages"] == 0


def test_a_host_tier_that_never_hits_shows():
    """X16: what `stats` is made of says that nothing was copied, nothing is there and nothing was hit."""
    server = Server(host_pages=32, write_policy=WritePolicy.NONE)
    for _ in range(3):
        server.prefill(prompt(16))
        server.flush_device()
    counters = server.core.counters
    assert (counters["host_hit_tokens"], counters["backup_pages"]) == (0, 0)
    assert counters["prompt_tokens"] > 0
    assert server.core.tiers.host[0].num_resident == 0


# ---- a storage that hangs


def hanging_store(server: Server, num_prompts: int = 1) -> list[int]:
    """write_back: the ends of prompts have left for host memory, and storage hangs on what is written of them."""
    for i in range(num_prompts):
        server.prefill(prompt(24, 1000 * (i + 1)))
    server.prefill(prompt(16, 500_000))  # pushes the ends of the others off the device
    server.step(0)
    server.core.commit({})
    stores = list(server.core.stores.live)
    assert stores
    server.rank.apply()
    return stores


@pytest.mark.parametrize("host_pages", [64, 4])
@pytest.mark.parametrize("how", ["deadline", "detach"])
def test_write_back_with_a_storage_that_hangs_makes_room_on_the_device(how, host_pages):
    """A STORE that is decided holds host pages only, also where the device pages above have nowhere to go."""
    server = server_with_storage(device_pages=8, host_pages=host_pages, write_policy=WritePolicy.WRITE_BACK)
    stores = hanging_store(server)
    host_free = server.host_free()
    assert isinstance(server.try_admit(prompt(32, 9000)), Wait), "the path above what is stored is pinned"
    assert server.core.is_busy()
    if how == "detach":
        server.rank.detach()
    else:
        server.core.commit({store: Outcome(done=True, quiet=False) for store in stores})
    server.check()
    assert not server.core.is_busy()
    lease = server.admit(prompt(32, 9000))
    server.compute(lease, 32)
    server.insert(lease, 32)
    server.release(lease)
    assert server.core.live_transfers() == stores
    held = sum(len(pages) for later in server.core.clearing.deferred for _, pages in later.pages)
    assert bool(held) == (host_pages == 4), "what could not stay is given back when storage lets go of it"
    assert server.host_free() <= host_free
    server.core.commit({store: Outcome(done=True, quiet=True) for store in stores})
    server.check()
    assert not server.core.clearing.deferred
    server.check_empty()
