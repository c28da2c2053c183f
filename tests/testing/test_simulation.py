"""The simulation: everything happens, nothing is ever wrong, and the same seed gives the same run."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jaxcache.agreement.collective import collective
from jaxcache.components.base import Component, FieldSpec
from jaxcache.engine.host_page_order import HostPageOrder
from jaxcache.runtime.controller import Controller
from jaxcache.testing import scenario, simulation
from jaxcache.testing.chance import Delays
from jaxcache.testing.scenario import Scenario
from jaxcache.testing.simulation import Report, Settings, Simulation, schedule
from jaxcache.testing.simulation_failure import Failure, attempt, simulate
from jaxcache.testing.storage_faults import FAULTS, fault_kinds
from jaxcache.testing.virtual_rank import Exchange
from jaxcache.types import PrefetchPolicy

ROOT = Path(__file__).parent.parent.parent
MESHES = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (2, 2, 2), (1, 1, 4), (8, 1, 1))
SHORT = Settings(num_steps=240, seed=3)


def total(seeds: range, num_steps: int, mesh: tuple[int, int, int] = (2, 2, 2)) -> Counter[str]:
    counts: Counter[str] = Counter()
    for seed in seeds:
        report = Simulation(Settings(mesh, num_steps, seed)).run()
        counts.update({**report.counts, **{f"fault {kind}": n for kind, n in report.faults.items()}})
    return counts


def test_everything_happens_and_nothing_is_wrong(seed):
    """I1-I12, R1-R6, L1-L9 on eight ranks: each count is of something that must have happened."""
    counts = total(range(10 * seed, 10 * seed + 3), 2000)
    assert not [name for name, count in counts.items() if not count], counts
    assert counts["arrivals"] >= 6000 / 5


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_happens_for_long(seed):
    for i in range(4):
        report = Simulation(Settings(num_steps=20_000, seed=1000 * (seed + 1) + i)).run()
        assert not report.missing


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_every_mesh(mesh):
    """R1: an axis of one rank needs no special case."""
    assert Simulation(replace(SHORT, mesh=mesh)).run().counts["admits"]


MIXTURES = (
    ("full",),
    ("full", "window"),
    ("full", "state"),
    ("full", "window", "state"),
    ("window",),
    ("state",),
    ("window", "state"),
)


@pytest.mark.parametrize("components", MIXTURES, ids="+".join)
def test_every_mixture(components):
    """R6."""
    assert Simulation(replace(SHORT, components=components)).run().counts["admits"]


def fields(component: Component, num_fields: int, page_tokens: int) -> tuple[FieldSpec, ...]:
    """Arrays of different sizes; a state has no slots for tokens."""
    if component.kind == "state":
        shape, axes = (4, 16), ("heads", None)
    else:
        shape, axes = (2, page_tokens, 4, 16), (None, "slots", "heads", None)
    return tuple(FieldSpec(f"field{i}", (2 + i, *shape), "bfloat16", ("layers", *axes)) for i in range(num_fields))


@pytest.mark.parametrize("num_fields", [1, 3])
@pytest.mark.parametrize("components", [("full", "window"), ("full", "window", "state")], ids="+".join)
def test_how_many_arrays_a_component_has_decides_nothing(monkeypatch, components, num_fields):
    """All fields of a component live, move and die together: the digest is that of components without any."""
    settings = replace(SHORT, components=components)
    plain = Simulation(settings).run().digest
    make = simulation.make_components

    def with_fields(rng, kinds, page_tokens):
        made = make(rng, kinds, page_tokens)
        return tuple(replace(component, fields=fields(component, num_fields, page_tokens)) for component in made)

    monkeypatch.setattr(simulation, "make_components", with_fields)
    run = Simulation(settings)
    assert all(len(component.fields) == num_fields for component in run.scenario.core.components)
    assert run.run().digest == plain


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_the_exchange_is_that_of_the_compiled_program(make_mesh, rng, mesh):
    program = collective(make_mesh(*mesh), 30)
    exchange = Exchange(dict(zip(("cp", "tp", "pp"), mesh, strict=True)), 30)
    for _ in range(3):
        rows = rng.integers(-(2**31), 2**31, (np.prod(mesh), 40)).astype(np.int32)
        np.testing.assert_array_equal(exchange.reduce([row.tobytes() for row in rows]), np.asarray(program(rows)))


# ---- the same again


def test_the_same_seed_gives_the_same_digest():
    """R9: and another one another."""
    digests = [Simulation(replace(SHORT, seed=seed)).run().digest for seed in (3, 3, 4)]
    assert digests[0] == digests[1] != digests[2]


def test_the_same_digest_under_another_pythonhashseed():
    code = (
        "from jaxcache.testing.simulation import Settings, Simulation\n"
        "print(Simulation(Settings(num_steps=100, seed=5)).run().digest)"
    )
    outputs = []
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]


def test_a_schedule_of_fewer_steps_is_the_beginning_of_one_of_more():
    long = schedule(1, 400)
    short = schedule(1, 150)
    assert short == long[: len(short)]
    assert all(operation.index == i for i, operation in enumerate(long))


def test_faults_strike_the_same_places_whatever_else_happens():
    """Delta debugging relies on it: leaving out an operation of a late step changes nothing before."""
    operations = schedule(SHORT.seed, SHORT.num_steps)
    early = [operation for operation in operations if operation.step < 200]
    digests = []
    for some in (operations, early):
        run = Simulation(replace(SHORT, num_steps=200), some)
        run.run()
        digests.append(run.scenario.core.digest)
    assert digests[0] == digests[1]


# ---- what decides, and what does not


def without_storage(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Scenario, "attach", lambda self: None)


def test_waiting_is_not_a_decision(monkeypatch):
    """Copies between device and host may end in any order, at any time, on each rank for itself: docs/decisions/02."""
    without_storage(monkeypatch)
    bounds = ((0, 1), (100, 30_000), (1_000, 1_000_000))
    num_waits = [0] * len(bounds)
    for seed in range(4):
        settings = replace(SHORT, seed=seed)
        reports = [Simulation(settings, delays=Delays(seed, copies=copies)).run() for copies in bounds]
        assert len({report.digest for report in reports}) == 1
        num_waits = [n + report.counts["waits_for_copies"] for n, report in zip(num_waits, reports, strict=True)]
    assert num_waits[0] == 0 < num_waits[1] < num_waits[2]


@pytest.mark.parametrize("guard", ["before_read", "before_write"])
def test_whoever_needs_the_bytes_has_to_wait(monkeypatch, guard):
    """Without the order of host pages some rank reads what is not there yet, or writes what is still read."""
    monkeypatch.setattr(HostPageOrder, guard, lambda self, page_ids: [])
    with pytest.raises(AssertionError, match="rank"):
        total(range(40), 600)


def test_only_the_clocks_of_stage_0_matter(monkeypatch):
    """L5, R3."""
    make = simulation.make_config
    timeout = PrefetchPolicy.TIMEOUT
    monkeypatch.setattr(simulation, "make_config", lambda *args: replace(make(*args), prefetch_policy=timeout))
    clock = Controller._clock_ms
    digests, timeouts = [], []
    for wrong_stages in ((), (1,), (0,)):

        def wrong_clock_ms(self: Controller, wrong_stages: tuple[int, ...] = wrong_stages) -> int:
            return clock(self) * (41 if self.engine.effects.rank % 2 in wrong_stages else 1)

        monkeypatch.setattr(Controller, "_clock_ms", wrong_clock_ms)
        report = Simulation(replace(SHORT, num_steps=600)).run()
        digests.append(report.digest)
        timeouts.append(report.counts["prefetch_timeouts"])
    assert digests[0] == digests[1] != digests[2]
    assert timeouts[2] > 0


# ---- options


@pytest.mark.parametrize("kinds", [(), *((kind,) for kind in FAULTS)], ids=lambda kinds: "".join(kinds) or "none")
def test_each_fault_alone(kinds):
    """L8: serving goes on, it does strike, and nothing else does."""
    run = Simulation(Settings(num_steps=600, seed=0, faults=kinds))
    report = run.run()
    assert report.counts["admits"] > 50
    assert {kind for kind, count in run.faults.counts.items() if count} == set(kinds)


@pytest.mark.parametrize(
    ("components", "faults", "possible"),
    [
        (("full",), ("lost", "short"), {"lost", "short", "unasked"}),
        (("full", "state"), ("slow",), {"slow", "unasked", "timeout"}),
        (("window", "state"), FAULTS, {"short", "slow", "stalled", "refused", "unasked", "timeout"}),
        (("window",), ("torn",), {"unasked"}),
        (("full",), (), set()),
    ],
)
def test_what_cannot_strike_is_not_missed(components, faults, possible):
    settings = replace(SHORT, num_steps=100, components=components, faults=faults)
    report = Simulation(settings, []).run()
    assert set(report.faults) == set(settings.possible_faults) == possible
    assert possible == set(report.missing) & {*FAULTS, "unasked", "timeout"}
    assert ("rejected_windows_and_states" in report.missing) == (components != ("full",))


def test_what_is_never_finished_is_noticed(monkeypatch):
    monkeypatch.setattr(scenario, "MAX_WIND_DOWN", 20)
    run = Simulation(replace(SHORT, num_steps=40))
    monkeypatch.setattr(run.scenario.core, "is_busy", lambda: True)
    with pytest.raises(AssertionError, match=r"after 20 more steps transfers .* go on"):
        run.run()


# ---- failures


def breaking(monkeypatch: pytest.MonkeyPatch, error_of) -> list[int]:
    """Every run gets the next number, and fails at its 50th step with `error_of` that and the run, if that is one."""
    runs: list[int] = []

    def run(self: Simulation, progress) -> Report:
        runs.append(len(runs))
        self.step = 49
        error = error_of(runs[-1], self)
        if error is not None:
            raise error
        return Report(0, 0, 1.0, {}, {})

    monkeypatch.setattr(Simulation, "run", run)
    return runs


def test_a_run_that_passes_the_second_time_depends_on_more_than_its_seed(monkeypatch):
    breaking(monkeypatch, lambda number, run: None if number else KeyError("once"))
    failure = simulate(SHORT)
    assert isinstance(failure, Failure)
    assert not failure.repeats


def test_another_error_is_another_failure(monkeypatch):
    """Without any operation it fails as well, but otherwise; that is not the smallest failing input."""
    wrong = schedule(SHORT.seed, 50)[3]
    breaking(
        monkeypatch, lambda number, run: KeyError() if wrong in run._operations.get(wrong.step, []) else TypeError()
    )
    failure = simulate(SHORT)
    assert isinstance(failure, Failure)
    assert failure.repeats
    assert isinstance(failure.error, KeyError)
    assert failure.operations == [wrong]
    assert f"--only {wrong.index}" in failure.command()


def test_what_needs_no_operation_is_told_so(monkeypatch):
    breaking(monkeypatch, lambda number, run: struct.error("short"))
    failure = simulate(SHORT)
    assert isinstance(failure, Failure)
    assert failure.operations == []
    assert failure.command().endswith(" --only none")
    assert "test_simulation.py:" in failure.where


def test_of_a_whole_schedule_nothing_need_be_chosen(monkeypatch):
    breaking(monkeypatch, lambda number, run: ZeroDivisionError())
    failure = attempt(SHORT, schedule(SHORT.seed, SHORT.num_steps))
    assert isinstance(failure, Failure)
    assert len(failure.operations) > 0
    assert "--only" not in failure.command()


def test_names_of_faults():
    assert fault_kinds("all") == FAULTS
    assert fault_kinds("none") == ()
    assert fault_kinds("lost,torn") == ("lost", "torn")
    with pytest.raises(ValueError, match="'moon' is no fault: use all, none, or some of lost"):
        fault_kinds("lost,moon")
