"""Random serving on two ranks: whatever happens, ranks stay equal and every page read has the right content."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from jaxcache.core.eviction import POLICIES
from jaxcache.core.eviction.duel import SetDuel
from tests.core.driver import MIXTURES, drive

ROOT = Path(__file__).parent.parent.parent
INTERESTING = (
    "waits",
    "evicted_pages",
    "duplicate_pages",
    "backup_pages",
    "skipped_backup_pages",
    "load_back_pages",
    "stored_pages",
    "failed_store_pages",
    "dropped_stores",
    "storage_tokens_used",
    "prefetch_misses",
    "prefetch_no_room",
    "unfulfilled_transfer",
    "unfulfilled_host_capacity",
    "unfulfilled_already_present",
    "unfulfilled_aborted",
    "retentions",
    "retentions_refused",
    "quota_waits",
    "quota_pages",
)


def drive_all(first_seed: int, seeds_per_mixture: int, num_steps: int) -> Counter[str]:
    counters: Counter[str] = Counter()
    for i, mixture in enumerate(MIXTURES):
        for j in range(seeds_per_mixture):
            counters.update(drive(first_seed + i * seeds_per_mixture + j, num_steps, mixture=mixture).counters)
    return counters


def test_two_ranks_serve_random_requests(seed):
    """I1-I12, R9: no invariant breaks, no page has the wrong content, and everything that can happen has happened."""
    counters = drive_all(1000 * seed, seeds_per_mixture=2, num_steps=150)
    assert not [name for name in INTERESTING if not counters[name]]


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_ranks_serve_random_requests_for_long(seed):
    counters = drive_all(1_000_000 * (seed + 1), seeds_per_mixture=60, num_steps=250)
    assert all(counters[name] > 20 for name in INTERESTING)


@pytest.mark.parametrize("num_ranks", [1, 3, 4])
def test_any_number_of_ranks(num_ranks, seed):
    for i in range(2):
        drive(1000 * seed + 500 + i, 80, num_ranks, mixture=("full", "window", "state"))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy, seed):
    """I3 among others: an order holds exactly what may leave."""
    run = drive(1000 * seed + 700, 60, mixture=("full", "window", "state"), eviction_policy=policy)
    assert run.counters["evicted_pages"]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_for_long(policy, seed):
    for i in range(16):
        drive(1000 * seed + 800 + i, 150, mixture=MIXTURES[i % len(MIXTURES)], eviction_policy=policy)


def test_adaptive_that_often_changes_its_mind(seed, monkeypatch):
    """Between what it learned and lru, at any time."""
    calls = count()

    def use(duel: SetDuel, slots: np.ndarray, capacity: int) -> None:
        duel.learned_leads = next(calls) % 7 < 5

    monkeypatch.setattr(SetDuel, "use", use)
    for i in range(4):
        drive(1000 * seed + 900 + i, 100, num_ranks=1, eviction_policy="adaptive")
    assert next(calls) > 100


def test_same_seed_gives_the_same_digest():
    """I8: equal calls and equal agreed outcomes give equal digests; without that the fuzz could not be repeated."""
    first, again, other = (drive(seed, 100).digest for seed in (5, 5, 6))
    assert first == again != other


DIGESTS = """
import numpy as np
from jaxcache.core.eviction import POLICIES
from jaxcache.replay import workloads
from jaxcache.replay.replay import Replay, Setting
from tests.core.driver import drive

for policy in POLICIES:
    run = drive(3, 60, 1, mixture=("full", "window", "state"), host_pages=20, eviction_policy=policy)
    replay = Replay(Setting(16, 2560, host_tokens=5120, policy=policy, components=("full", "window", "state")))
    for request in workloads.requests(workloads.scan(np.random.default_rng(0), 20), 150, 8, 16):
        replay.request(request)
    tiers = replay.core.tiers
    has_learned = [duel.learned_leads for duel in tiers.profile.duels] if tiers.profile else []
    print(policy, run.digest, replay.core.digest, replay.hit_rate(), *tiers.num_evicted_pages, *has_learned)
"""


def test_same_digest_under_another_pythonhashseed():
    """R9: no decision depends on the order of a set or on hashes of strings, whatever the policy."""
    outputs = []
    for hash_seed in ("0", "4711"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        done = subprocess.run(
            [sys.executable, "-c", DIGESTS], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.splitlines())
    assert outputs[0] == outputs[1]
    assert [line.split()[0] for line in outputs[0]] == list(POLICIES)
    assert "True" in outputs[0][-1], "adaptive has learned nothing"
