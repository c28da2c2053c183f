"""Processes that die, stop, or differ: the others end, soon, and say why."""

from __future__ import annotations

import json
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxcache.launch import Exit, Processes

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
LOOP = str(Path(__file__).parent / "fleet_loop.py")
TIMEOUT_S = 5.0  # agreement_timeout_s of fleet_loop.py
START_S = 60.0
AT = 3


def fleet(num_processes: int, **plan) -> Processes:
    return Processes([LOOP, json.dumps(plan)], num_processes, env={"PYTHONPATH": str(ROOT)})


def fail(
    num_processes: int, victim: int, model: bool, end: Callable[[Processes, int], None], timeout_s: float = TIMEOUT_S
) -> tuple[list[Exit], float]:
    """One process halts in step AT and is then ended. Returns the others' ends, and how long after they came."""
    with fleet(num_processes, steps=50, model=model, halts=victim, at=AT, timeout_s=timeout_s) as processes:
        deadline = time.monotonic() + START_S
        while "halts" not in processes.stdout(victim):
            assert not processes.has_ended(victim), processes.stderr(victim)
            assert time.monotonic() < deadline, processes.stderr(victim)
            time.sleep(0.01)
        start = time.monotonic()
        end(processes, victim)
        others = [index for index in range(num_processes) if index != victim]
        while any(not processes.has_ended(index) for index in others) and time.monotonic() < start + 3 * TIMEOUT_S:
            time.sleep(0.01)
        seconds = time.monotonic() - start
        exits = processes.wait(0.0)
    return [exits[index] for index in others], seconds


def assert_names_step(exit: Exit, model: bool) -> None:
    """A step of the model needs all ranks at once; an agreement is read one step later, if it did not fail before."""
    steps = f"{AT + 1}" if model else f"[{AT + 1}{AT + 2}]"  # the cache counts its steps from 1
    assert re.search(
        rf"step {steps}, digest 0x[0-9a-f]{{16}}, last decision .* in step {steps}, last agreed", exit.stderr
    )


@pytest.mark.parametrize("model", [False, True], ids=["agreement", "model"])
@pytest.mark.parametrize("end", [Processes.kill, Processes.stop])
def test_a_process_that_dies_or_stops_is_reported_by_all_others(end, model):
    """R8: within the bound."""
    exits, seconds = fail(3, 2, model, end)
    what = "a computation" if model else "the agreement"
    assert seconds < TIMEOUT_S
    for exit in exits:
        assert (exit.code, exit.was_ended) == (1, False), exit.stderr
        assert f"jaxcache.types.RankUnresponsive: {what}" in exit.stderr
        assert re.search(r"nothing was heard within 1 s of: process (0, |1, )?2\n", exit.stderr)
        assert_names_step(exit, model)
        if end is Processes.kill:  # the collective fails, or another process that saw it fail has said so before
            how = "(failed: UNKNOWN: Gloo|was not ready after .* when another process gave up)"
            assert re.search(rf"RankUnresponsive: {what} {how}", exit.stderr)
        else:
            assert f"RankUnresponsive: {what} was not ready after 3.5 s" in exit.stderr
            assert f"\n  process {1 - exit.index}: {what} was not ready" in exit.stderr
    assert end is Processes.stop or any(f"{what} failed: UNKNOWN: Gloo" in exit.stderr for exit in exits)


@pytest.mark.parametrize("model", [False, True], ids=["agreement", "model"])
def test_when_the_coordinators_process_dies_the_others_have_reported_before_jax_aborts_them(model):
    exits, seconds = fail(3, 0, model, Processes.kill)
    assert seconds < TIMEOUT_S
    for exit in exits:
        assert exit.code in (1, -signal.SIGABRT), exit.stderr
        assert f"jaxcache: process {exit.index}: " in exit.stderr
        assert_names_step(exit, model)


@pytest.mark.parametrize("victim", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_those_who_are_not_connected_to_the_dead_process_hear_of_it(victim):
    """With the default bound, too: process 0 stays until all have reported, or jax would abort them."""
    exits, seconds = fail(4, victim, True, Processes.kill, timeout_s=60.0)
    assert seconds < 2 * TIMEOUT_S
    for exit in exits:
        assert (exit.code, exit.was_ended) == (1, False), exit.stderr
        assert "jaxcache.types.RankUnresponsive: a computation" in exit.stderr


@pytest.mark.parametrize(("model", "early"), [(False, False), (True, False), (False, True)])
def test_a_copy_that_fails_in_one_process_is_a_fault_in_all(model, early):
    with fleet(2, steps=50, model=model, faults=1, early=early, at=AT) as processes:
        exits = processes.wait(START_S)
    assert "jaxcache.types.TransferFault: process 1: " in exits[0].stderr
    for exit in exits:
        assert (exit.code, exit.was_ended) == (1, False), exit.stderr
        assert "jaxcache.types.TransferFault" in exit.stderr
        assert "a copy that failed" in exit.stderr


def test_a_call_that_breaks_off_in_one_process_is_told_to_all():
    """Its tree may be half changed, so it ends, and the others need not wait for it."""
    with fleet(2, steps=50, model=True, breaks=1, at=AT) as processes:
        exits = processes.wait(START_S)
    for exit in exits:
        assert (exit.code, exit.was_ended) == (1, False), exit.stderr
    said = "serving has ended: insert was interrupted by OverflowError"
    assert "OverflowError: in the middle of a call" in exits[1].stderr and f"process 1: {said}" in exits[1].stderr
    assert f"jaxcache.types.TransferFault: process 1: {said}" in exits[0].stderr


@pytest.mark.parametrize("hangs", [False, True])
def test_a_tree_that_was_damaged_in_one_process_ends_all_within_two_steps(hangs):
    """Also while a thread waits for a storage that never answers."""
    with fleet(2, steps=50, model=True, corrupts=1, at=AT, hangs=hangs) as processes:
        exits = processes.wait(START_S)
    for exit in exits:
        assert (exit.code, exit.was_ended) == (1, False), exit.stderr
        assert "jaxcache.types.RanksDiverged" in exit.stderr
        assert f"finished step {AT + 1}\n" in exit.stdout
        assert f"finished step {AT + 2}\n" not in exit.stdout
        what = "(admit: other cached tokens and content checksum)"
        assert f"first difference: decision 0 of step {AT + 1} {what}: process 0: " in exit.stderr
        assert "admit(lease 4, cached tokens 32, " in exit.stderr
        assert "; process 1: admit(lease 4, cached tokens 0, " in exit.stderr


def test_other_content_in_one_process_ends_all_within_two_steps():
    """R8: a prompt, a generated token, a namespace, a retirement: nothing else differs, not even a length."""
    names = {
        "prompt": "(admit: other content checksum)",
        "generated": "(extend: other checksum of the new tokens)",
        "namespace": "(namespace: other namespace checksum)",
        "retired": "(retire: other namespace checksum)",
    }
    with fleet(2, content=1) as processes:
        exits = processes.check(START_S)
    for exit in exits:
        for what, name in names.items():
            said = [line for line in exit.stdout.splitlines() if line.startswith(f"{what}: ")]
            assert f"{what}: finished step {3}" in said, said
            assert f"{what}: finished step {4}" not in said, said
            assert "first difference: " in said[-1] and name in said[-1], said


@pytest.mark.slow
def test_all_give_up_draining_in_the_same_step_and_go_on():
    """Longer than the bound, and decided by the clock that they agree on: nobody waits for who has left."""
    with fleet(2, steps=3, model=False, at=AT, drains=1, timeout_s=3.0, drain_s=4.0) as processes:
        printed = [exit.stdout.splitlines()[-1] for exit in processes.check(START_S)]
    assert "were still running after 4.0 s in step" in printed[0]
    assert printed[0] == printed[1]


def test_capacities_become_the_smallest_and_other_differences_are_refused():
    with fleet(2) as processes:
        exits = processes.check(START_S)
    for exit in exits:
        assert "{'full': 48} {'full': 8} 48" in exit.stdout
        named = "another process refuses its own settings (process 0)\n  process 1: ValueError: "
        assert (named, "at least 1 pages, not 0")[exit.index] in exit.stdout
        assert "config.max_states_per_path differs: process 0: 4; process 1: 5" in exit.stdout
        assert "components differs: process 0: ['full0']; process 1: ['full1']" in exit.stdout


@pytest.mark.parametrize("starved", [1, 0])
@pytest.mark.parametrize(
    ("of", "error"),
    [
        ("host", "RanksDiverged: another process could not start"),
        ("device", "RankUnresponsive: the agreement was not ready"),
    ],
)
def test_a_process_without_memory_at_start_is_named_to_the_others_at_once(of, error, starved):
    """Not after the bound, although it does not end: a normal exit waits for the others, for minutes."""
    with fleet(3, steps=50, model=False, at=AT, starved=starved, of=of, timeout_s=60.0) as processes:
        others = [index for index in range(3) if index != starved]
        deadline = time.monotonic() + START_S
        while not all(processes.has_ended(index) for index in others) and time.monotonic() < deadline:
            time.sleep(0.01)
        exits = processes.wait(0.0)
        stays = processes.stdout(starved)
    assert stays.endswith(f"stays: no room for the {of} pool\n")
    assert exits[starved].was_ended
    reason = f"process {starved}: {'cannot go on: ' if of == 'device' else ''}MemoryError: no room for the {of} pool"
    for index in others:
        assert (exits[index].code, exits[index].was_ended) == (1, False), exits[index].stderr
        assert f"jaxcache.types.{error}" in exits[index].stderr
        assert f"\n  {reason}\n" in exits[index].stderr
        assert exits[index].seconds < START_S / 2


def test_what_a_process_ends_for_reaches_the_others():
    with fleet(3, steps=50, model=False, at=AT, leaves=1, timeout_s=60.0) as processes:
        exits = processes.wait(START_S, grace_s=START_S / 2)
    assert [(exit.code, exit.was_ended) for exit in exits] == [(1, False)] * 3, exits
    for index in (0, 2):
        assert "jaxcache.types.RankUnresponsive: the agreement" in exits[index].stderr
        assert "\n  process 1: has ended: LookupError: no such model\n" in exits[index].stderr
