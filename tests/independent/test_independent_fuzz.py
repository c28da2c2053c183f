"""The second fuzzer: random serving loops against an oracle that shares nothing with the first one (tests/core).

The quick test repeats the same few runs. The slow one makes 10**6 calls of the core from seeds that nobody has seen,
unless --seed is given; a failure names the run, and how to repeat it.
"""

from __future__ import annotations

import os
import time
from collections import Counter

import pytest

from tests.independent.fuzzer import Fuzzer

CALLS_PER_RUN = 4000
NUM_QUICK_RUNS = 6
NUM_CALLS = 10**6
OFTEN = (
    "hits",
    "host hits",
    "evicted on device",
    "evicted on host",
    "backup_pages",
    "load_back_pages",
    "duplicate_pages",
    "stored_pages",
    "prefetch_misses",
    "waits for no room",
    "no room to grow",
    "retracted",
    "forks",
    "retentions",
    "retentions_refused",
    "retirements",
    "looks",
)
SOMETIMES = (
    "storage hits",
    "agreed_fetches",
    "joined_prefetches",
    "fetches_cancelled_in_flight",
    "failed_store_pages",
    "dropped_stores",
    "skipped_backup_pages",
    "waits for prefetch",
    "waits for over quota",
    "waits for floors",
    "quota_pages",
    "prefetch_timeouts",
    "rejected_windows_and_states",
    "unfulfilled_aborted",
    "unfulfilled_already_present",
    "unfulfilled_deadline",
    "unfulfilled_host_capacity",
    "unfulfilled_not_taken",
    "unfulfilled_transfer",
    "event_overflows",
    "resets",
    "lost devices",
    "attached",
    "detached",
    "cleared",
    "1 ranks",
    "2 ranks",
    "3 ranks",
)


def run(seed: int) -> Fuzzer:
    """One run; what it finds names the command that repeats it."""
    fuzzer = Fuzzer(seed)
    try:
        fuzzer.run(CALLS_PER_RUN)
    except Exception as error:
        error.add_note(f"repeat it: python -m tests.independent.fuzzer {seed} {CALLS_PER_RUN}")
        error.add_note(f"{fuzzer.setting}")
        raise
    return fuzzer


def check_that_it_happened(seen: Counter[str], names: tuple[str, ...]):
    """A fuzzer to which nothing happens finds nothing."""
    never = [name for name in names if not seen[name]]
    assert not never, f"these never happened: {never} in {seen}"


def test_few_runs(seed):
    seen: Counter[str] = Counter()
    for i in range(NUM_QUICK_RUNS):
        seen.update(run(seed * NUM_QUICK_RUNS + i).seen)
    check_that_it_happened(seen, OFTEN)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_calls(request, seed):
    is_given = request.config.getoption("--seed") is not None
    first = (seed if is_given else int.from_bytes(os.urandom(5), "little")) << 20
    seen: Counter[str] = Counter()
    num_calls = num_runs = 0
    start = time.monotonic()
    while num_calls < NUM_CALLS:
        fuzzer = run(first + num_runs)
        num_calls += fuzzer.world.num_calls
        num_runs += 1
        seen.update(fuzzer.seen)
    seconds = time.monotonic() - start
    print(f"{num_calls} calls in {num_runs} runs from seed {first} on, {num_calls / seconds:.0f} a second")
    assert num_calls >= NUM_CALLS
    check_that_it_happened(seen, OFTEN + SOMETIMES)


def test_a_run_depends_on_its_seed_alone():
    one, again = run(5), run(5)
    assert one.world.num_calls == again.world.num_calls and one.seen == again.seen
    assert one.core.digest == again.core.digest
