"""The reports that end serving, and what ranks agree on at start, in one process."""

from __future__ import annotations

import gc
import json
import math
import socket
import threading
import weakref
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxcache
from jaxcache.agreement import local_outcomes
from jaxcache.agreement.lanes import DIGEST_LANES
from jaxcache.agreement.reduction import LocalReduction
from jaxcache.fleet import start as start_agreement
from jaxcache.fleet.fleet import FAULT, Fleet, ProcessReport, lines_that_differ
from jaxcache.fleet.start import agree_on_start, all_or_none
from jaxcache.types import RanksDiverged, RankUnresponsive, TransferFault

KV = jaxcache.FieldSpec("kv", (2, 2, 4, 1, 8), "float32", ("layers", None, "slots", "heads", None))
COMPONENT = jaxcache.FullAttention("full", (KV,))
CONFIG = jaxcache.CacheConfig(page_tokens=4, device_pages=64, host_pages={"full": 8}, agreement_timeout_s=0.5)
WITH_UNITS = replace(CONFIG, storage_unit_pages={"full": 64})  # of 2 KiB
DECISIONS = [(3, "admit", 4, 32, 9, 8, 1), (3, "release", 4, 0, 0, 0, 0)]
STATE = ProcessReport(3, 0xABC, "last agreed in step 2 on transfers [7]", 2, DECISIONS, {"nodes": 5, "leases": 0})


@pytest.fixture
def cache(make_mesh):
    with jaxcache.Cache([COMPONENT], make_mesh(), CONFIG) as cache:
        yield cache


class Others:
    """A bulletin on which others have said the same as this process, with some changes, or a text instead."""

    why_silent = ""

    def __init__(self, *changes: dict | str | None):
        self.changes = dict(enumerate(changes, 1))
        self.has_left: dict[int, str] = {}

    def exchange(self, kind, process, text, processes, timeout_s):
        changes = {p: change for p, change in self.changes.items() if change is not None}
        said = {p: c if isinstance(c, str) else json.dumps(json.loads(text) | c) for p, c in changes.items()}
        return {process: text, **said}

    def left(self, processes):
        return {p: why for p, why in self.has_left.items() if p in processes}


def fleet_with(make_mesh, *changes) -> Fleet:
    fleet = Fleet(make_mesh(), 60.0, "test")
    fleet.processes = list(range(len(changes) + 1))
    fleet._bulletin = Others(*changes)
    return fleet


def test_unresponsive_says_so_at_once_and_names_the_silent(make_mesh, capsys):
    fleet = fleet_with(make_mesh, None, None)
    report = fleet.unresponsive("the agreement", RankUnresponsive("was not ready after 4 s"), STATE)
    own = "the agreement was not ready after 4 s; step 3, digest 0x0000000000000abc, last decision release(lease 4)"
    assert capsys.readouterr().err == f"jaxcache: process 0: {own} in step 3, {STATE.agreed}\n"
    assert f"\n  process 0: {own}" in str(report)
    assert str(report).endswith("nothing was heard within 2 s of: process 1, 2")


def fault_from(cause: Exception) -> TransferFault:
    error = TransferFault(f"a copy failed: {cause!r}")
    error.__cause__ = cause
    return error


def test_a_fault_of_this_process_stays_one(make_mesh):
    """Also where a process is too busy to answer."""
    error = fault_from(OSError("broken"))
    assert fleet_with(make_mesh, None).fault(error, STATE) is error
    error = fault_from(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED"))
    assert fleet_with(make_mesh, "busy with step 3").fault(error, STATE) is error


def test_a_copy_that_fails_because_a_process_is_lost_is_no_fault(make_mesh):
    """The copy waited for a model step that the lost one was part of."""
    error = fault_from(jax.errors.JaxRuntimeError("UNKNOWN: Gloo: connection closed"))
    report = fleet_with(make_mesh, "step 3", None).fault(error, STATE)
    assert isinstance(report, RankUnresponsive)
    assert "Gloo" in str(report) and str(report).endswith("of: process 2")
    other = fleet_with(make_mesh, f"{FAULT}{error}", None)
    report = other.unresponsive("the agreement", RankUnresponsive("was not ready after 4 s"), STATE)
    assert isinstance(report, RankUnresponsive) and "process 1: TransferFault: a copy failed" in str(report)


def test_a_fault_that_was_agreed_on_names_whose_it_was(make_mesh):
    agreed = TransferFault("step=3: a copy failed on some rank")
    report = fleet_with(make_mesh, "step 3", f"{FAULT}a copy failed: broken").fault(agreed, STATE, is_own=False)
    assert isinstance(report, TransferFault) and str(report) == "process 2: a copy failed: broken"
    assert fleet_with(make_mesh, None).fault(agreed, STATE, is_own=False) is agreed


def test_why_a_silent_process_has_left(make_mesh):
    fleet = fleet_with(make_mesh, None, None)
    fleet._bulletin.has_left = {2: "MemoryError: pools"}
    report = str(fleet.unresponsive("the agreement", RankUnresponsive("was not ready"), STATE))
    assert report.endswith(
        "\n  process 2: has ended: MemoryError: pools\n  nothing was heard within 2 s of: process 1, 2"
    )


def test_diverged_names_the_first_difference(make_mesh):
    other = {"log": [DECISIONS[0], (3, "release", 5, 0, 0, 0, 0)], "counts": {"nodes": 4, "leases": 0}}
    report = str(fleet_with(make_mesh, {}, other).diverged(RanksDiverged("step=3: differ"), STATE))
    assert "process 0: release(lease 4); process 1: release(lease 4); process 2: release(lease 5)" in report
    assert "first difference: decision 1 of step 3" in report
    assert "nodes differs: process 0: 5; process 1: 5; process 2: 4" in report
    assert "leases" not in report
    assert "last agreed in step 2 on transfers [7]" in report


def test_diverged_without_a_decision_that_differs(make_mesh):
    report = str(fleet_with(make_mesh, {"counts": {"nodes": 4}}).diverged(RanksDiverged("x"), STATE))
    assert "first difference: none since step 2" in report


@pytest.mark.parametrize("timeout_s", [0.1, 5.0, 60.0])
def test_the_bound_holds_waiting_and_listening(make_mesh, timeout_s):
    fleet = Fleet(make_mesh(), timeout_s, "test")
    assert fleet.wait_s == math.inf  # nobody to wait for
    fleet.processes = [0, 1]
    assert 0.85 * timeout_s < fleet.wait_s + fleet.listen_s < timeout_s
    assert 0 < fleet.listen_s < fleet.wait_s


def test_different():
    assert lines_that_differ({0: {"a": 1, "b": 2}, 1: {"a": 1}}) == ["b differs: process 0: 2; process 1: None"]
    assert lines_that_differ({0: {"a": 1}, 1: {"a": 1}}) == []


# ---- at start


def other_rank(monkeypatch, change) -> None:
    """Reduces with a second rank whose row is this one's, changed."""

    class WithOther(LocalReduction):
        def finish(self, timeout_s, is_reported):
            other = self._reduced.copy()
            change(other)
            return np.minimum(self._reduced, other).tobytes()

    monkeypatch.setattr(start_agreement, "reduction_of", lambda mesh: WithOther)


def test_one_process_keeps_its_config(make_mesh):
    assert agree_on_start([COMPONENT], make_mesh(), CONFIG, None).config == WITH_UNITS


def test_the_smallest_capacities_are_used_before_anything_is_allocated(make_mesh, monkeypatch):
    """R7."""

    def change(row):
        row[DIGEST_LANES] = 48

    other_rank(monkeypatch, change)
    with jaxcache.Cache([COMPONENT], make_mesh(), CONFIG) as cache:
        assert cache.config == replace(WITH_UNITS, device_pages={"full": 48})
        assert cache.init_pools()["full"]["kv"].shape[0] == cache.device_pages["full"] == 48


def test_larger_capacities_of_others_change_nothing(make_mesh, monkeypatch):
    def change(row):
        row[DIGEST_LANES : DIGEST_LANES + 2] += 1

    other_rank(monkeypatch, change)
    assert agree_on_start([COMPONENT], make_mesh(), CONFIG, None).config == WITH_UNITS


def test_other_settings_are_refused_before_anything_is_allocated(make_mesh, monkeypatch):
    def change(row):
        row[0] -= 1

    other_rank(monkeypatch, change)
    monkeypatch.setattr("jaxcache.cache.PrefixCache", None)
    with pytest.raises(RanksDiverged, match="the ranks' settings differ"):
        jaxcache.Cache([COMPONENT], make_mesh(), CONFIG)


def test_every_setting_but_the_capacities_counts(make_mesh):
    mesh = make_mesh()
    base = start_agreement.settings([COMPONENT], mesh, CONFIG, None)
    assert base == start_agreement.settings([COMPONENT], mesh, replace(CONFIG, device_pages=1, host_pages=0), None)
    share = jaxcache.TenantShare(floor=0.1)
    changed = {
        "config.page_tokens": ([COMPONENT], mesh, replace(CONFIG, page_tokens=8), None),
        "config.tenants": ([COMPONENT], mesh, replace(CONFIG, tenants={"a": share}), None),
        "mesh": ([COMPONENT], make_mesh(2, 1, 1), CONFIG, None),
        "storage": ([COMPONENT], mesh, CONFIG, jaxcache.MemoryStorage()),
        "component full": ([replace(COMPONENT, fields=(replace(KV, dtype="float16"),))], mesh, CONFIG, None),
    }
    for name, args in changed.items():
        assert [
            line.split(" differs")[0] for line in lines_that_differ({0: base, 1: start_agreement.settings(*args)})
        ] == [name]
    one, other = ({"a": share, "b": jaxcache.TenantShare()}, {"b": jaxcache.TenantShare(), "a": share})
    assert start_agreement.settings([COMPONENT], mesh, replace(CONFIG, tenants=one), None) == start_agreement.settings(
        [COMPONENT], mesh, replace(CONFIG, tenants=other), None
    )


@pytest.mark.parametrize(
    ("name", "owner"),
    [("jaxcache", start_agreement), ("jax", jax), ("python", start_agreement.sys)],
    ids=["jaxcache", "jax", "python"],
)
def test_versions_are_settings(make_mesh, monkeypatch, name, owner):
    base = start_agreement.settings([COMPONENT], make_mesh(), CONFIG, None)
    assert list(base)[:4] == ["jaxcache", "jax", "jaxlib", "python"]
    if name == "python":
        monkeypatch.setattr(owner, "version_info", SimpleNamespace(major=2, minor=7))
    else:
        monkeypatch.setattr(owner, "__version__", "9.9")
    other = start_agreement.settings([COMPONENT], make_mesh(), CONFIG, None)
    assert [line.split(" differs")[0] for line in lines_that_differ({0: base, 1: other})] == [name]


@pytest.mark.parametrize(
    ("components", "config"),
    [
        ([replace(COMPONENT, name=f"c{i}") for i in range(65)], CONFIG),
        ([replace(COMPONENT, fields=(replace(KV, shape=(2, 2, 5, 1, 8)),))], CONFIG),
        ([COMPONENT], replace(CONFIG, device_pages=0)),
    ],
    ids=["components", "slots", "capacities"],
)
def test_who_refuses_its_own_settings_tells_the_others_first(make_mesh, monkeypatch, components, config):
    rows = []
    other_rank(monkeypatch, rows.append)
    with pytest.raises(ValueError, match=r"65 components|5 slots do not divide|at least 1"):
        agree_on_start(components, make_mesh(2, 1, 1), config, None)
    assert rows[0][DIGEST_LANES] == start_agreement.REFUSED


class Allocates:
    """The two agreements of a start. ours: first lane of this process's rows; other_ok: of another's second row."""

    def __init__(self, monkeypatch, other_ok: int):
        self.ours: list[int] = []

        def change(row):
            self.ours.append(int(row[0]))
            if len(self.ours) == 2:
                row[0] = other_ok

        other_rank(monkeypatch, change)


def test_a_process_that_cannot_allocate_says_so_in_the_agreement(make_mesh, monkeypatch):
    said, exchanged = Allocates(monkeypatch, other_ok=1), []
    monkeypatch.setattr(Fleet, "failures", lambda fleet, own: exchanged.append(own) or [])

    def fails(*args):
        raise MemoryError("no room for the host pool")

    monkeypatch.setattr("jaxcache.engine.device_effects.HostPool", fails)
    with pytest.raises(MemoryError, match="no room for the host pool"):
        jaxcache.Cache([COMPONENT], make_mesh(), CONFIG)
    assert said.ours[1] == 0
    assert exchanged == ["MemoryError: no room for the host pool"]


def test_no_process_starts_when_another_could_not_allocate(make_mesh, monkeypatch):
    said, heard = Allocates(monkeypatch, other_ok=0), {1: "MemoryError: no room"}
    monkeypatch.setattr(Fleet, "_exchange", lambda fleet, kind, text: {0: text, **heard})
    with pytest.raises(RanksDiverged, match=r"could not start \(process 0\)\n  process 1: MemoryError: no room$"):
        jaxcache.Cache([COMPONENT], make_mesh(), CONFIG)
    assert said.ours[1] == 1


def test_what_failed_here_is_raised_though_another_process_does_not_answer(make_mesh, monkeypatch, capsys):
    fleet = fleet_with(make_mesh, None)

    class Never(LocalReduction):
        def finish(self, timeout_s, is_reported):
            raise RankUnresponsive("was not ready")

    monkeypatch.setattr(start_agreement, "reduction_of", lambda mesh: Never)
    with pytest.raises(MemoryError, match="here"), all_or_none(make_mesh(), fleet):
        raise MemoryError("here")
    assert "the agreement that all could start was not ready" in capsys.readouterr().err
    with pytest.raises(RankUnresponsive), all_or_none(make_mesh(), fleet):
        pass


def test_failures_are_named_with_their_reasons(make_mesh):
    fleet = fleet_with(make_mesh, "", "OSError: x", None)
    assert fleet.failures("MemoryError: y") == [
        "process 0: MemoryError: y",
        "process 2: OSError: x",
        "nothing was heard within 2 s of: process 3",
    ]


@pytest.mark.parametrize("processes", [[0], [0, 1]], ids=["alone", "fleet"])
def test_pools_that_cannot_be_made_end_serving_in_a_fleet_only(cache, monkeypatch, processes):
    fleet, told = cache._controller.fleet, []
    fleet.processes = processes
    monkeypatch.setattr(fleet, "_exchange", lambda kind, text: told.append((kind, text)) or {0: text})

    def fails(*args):
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr("jaxcache.cache.init_pools", fails)
        with pytest.raises(MemoryError, match="no room"):
            cache.init_pools()
    if processes == [0]:
        cache.step(cache.init_pools())
        assert not told
    else:
        assert told == [("unresponsive", "cannot go on: MemoryError: no room")]
        with pytest.raises(jaxcache.ServingEnded, match="MemoryError"):
            cache.step(cache.init_pools())


def test_a_start_waits_for_no_process_that_has_left(make_mesh, monkeypatch):
    class Asks(LocalReduction):
        def finish(self, timeout_s, is_reported):
            assert is_reported()
            raise RankUnresponsive("was not ready when another process ended")

    monkeypatch.setattr(start_agreement, "reduction_of", lambda mesh: Asks)
    monkeypatch.setattr(Fleet, "is_reported", lambda fleet: True)
    with pytest.raises(RankUnresponsive, match="the agreement on capacities was not ready when another"):
        agree_on_start([COMPONENT], make_mesh(), CONFIG, None)


# ---- in the loop


def test_the_agreement_that_does_not_come_ends_the_loop_with_a_report(cache, monkeypatch):
    cache._controller.fleet.processes = [0, 1]
    pools = cache.step(cache.init_pools())

    def never(timeout_s, is_reported):
        assert timeout_s == pytest.approx(0.35)
        raise RankUnresponsive(f"was not ready after {timeout_s:g} s")

    monkeypatch.setattr(cache._controller.agreement._reduction, "finish", never)
    with pytest.raises(RankUnresponsive, match=r"the agreement was not ready after 0.35 s(.|\n)*step 1, digest"):
        cache.step(pools)
    for call in (lambda: cache.step(pools), lambda: cache.apply(pools), lambda: cache.wait(pools)):
        with pytest.raises(RankUnresponsive, match="the agreement was not ready"):
            call()
    monkeypatch.setattr(cache.engine, "close", None)
    cache.close()  # joins nobody: threads may wait for ever


@pytest.mark.parametrize("error", [MemoryError("no room"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_a_plan_that_was_not_carried_out_ends_serving(cache, monkeypatch, error):
    """The core believes that it was: what it holds for a backup may be anything."""
    pools = cache.apply(cache.step(cache.init_pools()))
    lease = cache.admit(cache.sequence(range(8), cache.new_namespace(model="m")), num_new_tokens=8)
    pools = jax.tree.map(lambda array: array + 0, pools)  # a model step
    cache.insert(lease, 8)

    def fails(*args):
        raise error

    monkeypatch.setattr(cache.engine, "_back_up", fails)
    with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else TransferFault):
        cache.apply(pools)
    for call in (lambda: cache.step(pools), lambda: cache.apply(pools), lambda: cache.wait(pools)):
        with pytest.raises(TransferFault, match="a plan was not carried out"):
            call()


def test_wait_returns_what_it_was_given(cache):
    pools = cache.init_pools()
    tree = {"pools": pools, "numpy": np.ones(2), "none": None}
    assert cache.wait(tree) is tree


def test_in_one_process_an_error_is_nobody_elses(cache, monkeypatch):
    own = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    def fails(arrays, timeout_s, is_reported):
        raise RankUnresponsive(f"failed: {own}") from own

    monkeypatch.setattr("jaxcache.fleet.fleet.wait_until_ready", fails)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        cache.wait(jax.numpy.ones(2))
    cache._controller.fleet.processes, cache.core.serving.ended = [0, 1], None
    with pytest.raises(RankUnresponsive, match="a computation failed: RESOURCE_EXHAUSTED"):
        cache.wait(jax.numpy.ones(2))


def test_the_digest_sees_a_tree_that_was_damaged_before_anything_is_decided(cache):
    before = cache.core.digest, local_outcomes.digest(cache.core)
    assert local_outcomes.digest(cache.core) == before[1]
    cache.core.tiers.device[0].allocator.num_free -= 1
    assert cache.core.digest == before[0]
    assert local_outcomes.digest(cache.core) != before[1]
    cache.core.tiers.device[0].allocator.num_free += 1


def test_a_copy_that_failed_ends_the_loop_and_closing_joins_nobody(cache, monkeypatch, capsys):
    pools = cache.step(cache.init_pools())

    def fails(pools, transfers, step):
        raise TransferFault("a copy between device and host failed: here")

    monkeypatch.setattr(cache.engine, "apply", fails)
    for call in (cache.apply, cache.step):
        with pytest.raises(TransferFault, match="here"):
            call(pools)
    assert "a copy between device and host failed: here; step 1, digest" in capsys.readouterr().err
    monkeypatch.setattr(cache.engine, "close", None)
    cache.close()


def test_another_process_stopped_for_a_fault(make_mesh):
    fleet = fleet_with(make_mesh, f"{FAULT}a copy failed")
    error = fleet.unresponsive("the agreement", RankUnresponsive("was not ready"), STATE)
    assert isinstance(error, TransferFault) and str(error) == "process 1: a copy failed"


def test_a_cache_that_was_dropped_is_kept_by_no_watch(make_mesh):
    """On every process but 0 a thread watches process 0."""
    fleet = Fleet(make_mesh(), 1.0, "test")
    fleet.processes, fleet.process = [0, 1], 1

    class Cache:
        def state(self) -> ProcessReport:
            return STATE

    cache, gone = Cache(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("jaxcache.fleet.fleet.coordinator_address", lambda: address)
            fleet.watch(cache.state)
        connection, _ = server.accept()
        weakref.finalize(cache, gone.set)
        del cache
        gc.collect()
        assert gone.is_set()
        fleet.close()
        watching = [thread for thread in threading.enumerate() if thread.name == "jaxcache-watch"]
        for thread in watching:
            thread.join(60.0)
        assert not any(thread.is_alive() for thread in watching)
        connection.close()
