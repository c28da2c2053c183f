"""A hybrid never loses full attention because the window or state of a leaf is absent (N4, L4, X5).

    |-- SHORT: resumable at 16 --|
    |-- LONG: found up to 40, resumable at 40 ------|        its window or state leaves alone, on every tier in turn

Then 40 tokens are found, 16 are used, and the next prefill, which ends a chunk at the branch point, restores the 40.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jaxcache.core.kinds.window import Window
from jaxcache.core.match import Matcher, Prefix
from jaxcache.core.prefetch import PrefetchState
from jaxcache.types import Match
from tests.core.helpers import FULL, PAGE, Server, prompt, server_with_storage, state, window

MIXTURES = {
    "full+window": (FULL, window(6)),
    "full+state": (FULL, state()),
    "full+window+state": (FULL, window(6), state()),
    "full+window+coarse state": (FULL, window(6), state(8)),
    "full+window+window": (FULL, window(6, "window"), window(14, "far")),
}
SHORT, LONG = 16, 40
FEW = {"full": 200, "window": 12, "far": 17, "state": 4}  # another prompt of 40 tokens pushes out what was used first
FEW_ON_HOST = {"full": 200, "window": 6, "far": 9, "state": 3}

Make = Callable[[tuple], Server]


def pages(components: tuple, few: dict[str, int]) -> dict[str, int]:
    return {component.name: few[component.name] for component in components}


def serve_both(server: Server) -> None:
    server.prefill(prompt(LONG + 1))
    server.prefill([*prompt(SHORT), *prompt(1, 5000)])


def left_the_device(components: tuple) -> Server:
    server = Server(*components, device_pages=pages(components, FEW))
    serve_both(server)
    server.prefill(prompt(LONG, 1000))
    return server


def left_host_memory(components: tuple) -> Server:
    server = Server(*components, device_pages=200, host_pages=pages(components, FEW_ON_HOST))
    serve_both(server)
    server.prefill(prompt(LONG, 1000))
    server.rank.apply()
    server.rank.forget_device()
    return server


def did_not_come_from_storage(components: tuple) -> Server:
    """The fetch brings full attention, and fails to read the end of the window and the state."""
    server = server_with_storage(*components)
    server.prefill([*prompt(SHORT), *prompt(1, 5000)])
    server.store(prompt(LONG))
    ticket = server.prefetch(prompt(LONG))
    while ticket.state is not PrefetchState.FETCH:
        server.step(0)
    last = server.sequence(prompt(LONG)).page_keys(LONG // PAGE)[-1]
    for component in components[1:]:
        server.storage.lose(0, component.name, last)
    server.settle()
    server.core.cancel(ticket)
    return server


each_mixture = pytest.mark.parametrize("mixture", MIXTURES)
each_way = pytest.mark.parametrize("make", [left_the_device, left_host_memory, did_not_come_from_storage])


@each_mixture
@each_way
def test_full_attention_is_found_and_used_up_to_the_next_end_before(make: Make, mixture: str):
    components = MIXTURES[mixture]
    server = make(components)
    found = server.match(prompt(LONG))
    assert (found.num_tokens, found.unusable_tokens, found.branch_points) == (SHORT, LONG - SHORT, (LONG,))
    explanation = server.core.explain(server.sequence([*prompt(LONG), 77]))
    assert {missing.component for missing in explanation.missing} == {c.name for c in components[1:]}
    lease = server.admit([*prompt(LONG), 77])
    assert lease.num_cached_tokens == SHORT
    server.compute(lease, LONG + 1)
    server.release(lease)
    server.check_empty()


@each_mixture
@each_way
def test_the_next_prefill_restores_the_long_hit(make: Make, mixture: str):
    """And gives back its own pages of full attention, which were there."""
    server = make(MIXTURES[mixture])
    lease = server.admit([*prompt(LONG), 77])
    assert lease.next_stop == LONG
    server.compute(lease, LONG)
    server.insert(lease, LONG)
    server.compute(lease, LONG + 1)
    server.release(lease)
    assert server.match(prompt(LONG)) == Match(LONG, LONG, 0, 0, ())
    later = server.admit([*prompt(LONG), 78])
    assert later.num_cached_tokens == LONG
    server.compute(later, LONG + 1)
    server.release(later)
    server.check_empty()


@each_mixture
def test_a_leaf_without_any_window_or_state_stays(mixture: str):
    """Nothing before it is resumable either: then nothing is used, and still nothing is lost."""
    components = MIXTURES[mixture]
    server = Server(*components, device_pages=pages(components, FEW))
    server.prefill(prompt(LONG + 1))
    for first in (1000, 2000):
        server.prefill(prompt(LONG, first))
    assert server.match(prompt(LONG)) == Match(0, 0, 0, LONG, (LONG,))
    lease = server.admit([*prompt(LONG), 77])
    server.compute(lease, LONG)
    server.insert(lease, LONG)
    assert server.core.counters["duplicate_pages"] == LONG // PAGE
    server.compute(lease, LONG + 1)
    server.release(lease)
    assert server.match(prompt(LONG)).num_tokens == LONG
    server.check_empty()


# ---- broken on purpose


def nothing_is_found_beyond_what_can_be_used(patch: pytest.MonkeyPatch) -> None:
    """As in a tree whose leaves go with their windows."""
    plain = Matcher.longest

    def usable_only(self, sequence, max_tokens) -> Prefix:
        prefix = plain(self, sequence, max_tokens)
        return prefix._replace(found_tokens=prefix.num_tokens)

    patch.setattr(Matcher, "longest", usable_only)


def nodes_adopt_no_windows(patch: pytest.MonkeyPatch) -> None:
    """N3: one that is there already stays as it is."""
    patch.setattr(Window, "publish", lambda self, lease, child, at, live: self.device.pin(child))


@pytest.mark.mutation
@pytest.mark.parametrize("mutate", [nothing_is_found_beyond_what_can_be_used, nodes_adopt_no_windows])
def test_mutations_restore_nothing(monkeypatch, mutate):
    server = left_the_device(MIXTURES["full+window"])
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        test_the_next_prefill_restores_the_long_hit(lambda components: server, "full+window")
