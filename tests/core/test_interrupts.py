"""An exception from the middle of a call ends serving: nothing goes on with a tree that is half changed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcache.core.attachment import Attachment
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.restoring import Restoring
from jaxcache.types import ServingEnded
from tests.core.helpers import make_core, prompt
from tests.core.interrupted import BY_HAND, RUNS

ROOT = Path(__file__).parents[2]
READS = {  # what changes nothing
    *("digest", "sizes", "counts", "step_number", "sequence", "match", "explain", "is_busy", "live_transfers"),
    *("needs_exchange", "unwanted_transfers", "largest_end", "plan_is_applied"),
    *("attached", "is_readable"),
    *("check", "fitted"),
}
ALL_CALLS = {"admit", "commit", "forget_device", "grow", "grow_all", "insert", "new_namespace", "prefetch", "release"}
ALL_CALLS |= {"extend_all", "reset", "retire_namespace", "take_plan"}
WITH_STORAGE = {"attach", "change", "cleared", "detach"}


def interrupt(name: str, one_of: int) -> dict:
    """What tests/core/interrupted.py says; it has failed if any call went on."""
    program = [sys.executable, "-W", "ignore", "-m", "tests.core.interrupted", name, "60", str(one_of)]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize(("name", "one_of"), [("full", 4), ("every kind", 40)])
def test_some_places(name, one_of):
    assert set(interrupt(name, one_of)["calls"]) >= ALL_CALLS


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", RUNS)
def test_every_line_of_every_call_that_changes_the_cache(name):
    """Outside of what is guarded are only the first lines, where nothing has changed."""
    said = interrupt(name, 1)
    assert set(said["calls"]) >= (ALL_CALLS if name == "full" else ALL_CALLS | WITH_STORAGE)
    first_lines = {"serving.py:guarded", *(f"prefix_cache.py:{name}" for name in BY_HAND)}
    reads_tokens = {f"tokens.py:{name}" for name in ("extend_all", "token_bytes")}
    assert set(said["unended"]) <= first_lines | reads_tokens
    assert said["places"] > 1000


@pytest.mark.parametrize("kind", [PrefixCache, Attachment, Restoring])
def test_every_public_method_is_guarded_or_changes_nothing(kind):
    public = {name: method for name, method in vars(kind).items() if not name.startswith("_")}
    unguarded = {name for name, method in public.items() if not getattr(method, "changes", False)}
    assert unguarded - READS <= set(BY_HAND)


def test_refusals_do_not_end_serving():
    core = make_core()
    namespace = core.new_namespace(model="test")
    lease = core.admit(core.sequence(prompt(8), namespace), 8)
    digest = core.digest
    for call in (
        lambda: core.grow(lease, None, 1),
        lambda: core.grow(lease, "8", 1),
        lambda: core.grow_all(lease, [8]),
        lambda: core.grow_all([lease], [8, 9]),
        lambda: core.grow_all([lease], [None]),
        lambda: core.grow_all([None], [8]),
        lambda: core.insert(lease, 99),
        lambda: core.insert(lease, 8, priority="high"),
        lambda: core.release(None),
        lambda: core.admit(None, 8),
        lambda: core.admit(core.sequence(prompt(8), namespace), 0),
        lambda: core.admit(core.sequence(prompt(8), namespace), 8, ticket="none"),
        lambda: core.admit(core.sequence(prompt(8), namespace), 8, max_cached_tokens=-1),
        lambda: core.prefetch(None),
        lambda: core.cancel(None),
        lambda: core.new_namespace(model=3),
        lambda: core.new_namespace(tenant_salt="\ud800"),
        lambda: core.retire_namespace(None),
        lambda: core.attachment.detach(),
        lambda: core.attachment.change("never", None),
        core.reset,
    ):
        with pytest.raises((ValueError, TypeError, RuntimeError)):
            call()
        assert core.serving.ended is None and core.digest == digest
    core.release(lease)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ValueError])
def test_what_ended_serving_is_said_by_every_later_call(error, monkeypatch):
    core = make_core()
    lease = core.admit(core.sequence(prompt(8), core.new_namespace(model="test")), 8)

    def fails(*_):
        raise error("no more")

    monkeypatch.setattr(core.tiers.tree, "add", fails)
    with pytest.raises(error, match="no more"):
        core.insert(lease, 8)
    for call in (
        lambda: core.grow(lease, 8, 1),
        lambda: core.release(lease),
        core.take_plan,
        lambda: lease.page_tables,
    ):
        with pytest.raises(ServingEnded, match=f"insert was interrupted by {error.__name__}") as ended:
            call()
        assert type(ended.value.__cause__) is error
