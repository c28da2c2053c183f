"""Looking: how long a prefix can be resumed, where it is, and that looking changes nothing."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxcache.core.match import Matcher
from jaxcache.core.tree import RadixTree
from jaxcache.types import Match
from tests.core.helpers import FULL, NEXT, PAGE, Server, prompt, state, window


@pytest.mark.parametrize(("num_tokens", "found"), [(3, 0), (4, 4), (7, 4), (8, 8), (15, 12)])
def test_whole_pages_only(num_tokens, found):
    """K2: the tail is private to the request."""
    server = Server()
    server.prefill(prompt(num_tokens))
    assert server.match(prompt(num_tokens)).num_tokens == found


@pytest.mark.parametrize("convert", [list, tuple, np.array, jnp.array, lambda t: np.array(t, np.uint16)])
def test_any_form_of_token_ids(convert):
    """K6."""
    server = Server()
    server.prefill(server.core.sequence(convert(prompt(8)), server.namespace))
    sequence = server.core.sequence(convert(prompt(10)), server.namespace)
    assert server.core.match(sequence).num_tokens == 8
    sequence.extend(convert([7, 8]))
    assert sequence.tokens.tolist() == [*prompt(10), 7, 8]


def test_at_least_one_token_is_left_to_compute():
    """M1: a prompt that is cached whole resumes a page earlier."""
    server = Server()
    server.prefill(prompt(16))
    assert server.core.match(server.sequence(prompt(16))).num_tokens == 12
    assert server.core.match(server.sequence(prompt(17))).num_tokens == 16
    assert server.core.match(server.sequence(prompt(17)), 9).num_tokens == 8


def test_looking_changes_nothing():
    """M1: no split, no touch, no other digest."""
    server = Server(FULL, window(6), host_pages=32)
    server.prefill(prompt(16))
    server.prefill(prompt(16, 1000))
    tiers = server.core.tiers
    before = server.core.digest, tiers.tree.num_nodes, tiers.tree.version, [list(r.order) for r in tiers.residencies]
    server.match(prompt(6))
    server.match([*prompt(9), 77])
    after = server.core.digest, tiers.tree.num_nodes, tiers.tree.version, [list(r.order) for r in tiers.residencies]
    assert before == after


def test_the_answer_separates_device_and_host():
    """M2."""
    server = Server(host_pages=32)
    server.prefill(prompt(16))
    assert server.match(prompt(16)) == Match(16, 16, 0, 0, ())
    server.flush_device()
    assert server.match(prompt(16)) == Match(16, 0, 16, 0, ())
    server.settle()
    assert server.prefill(prompt(9)) == 8
    assert server.match(prompt(16)) == Match(16, 8, 8, 0, ())


@pytest.mark.parametrize("page_tokens", [1, 4, 16])
@pytest.mark.parametrize("window_tokens", [1, 2, 4, 5, 9, 17, 1000])
def test_window_of_a_finished_request_is_found(window_tokens, page_tokens):
    """M3: pages larger than the window, windows of many pages, sequences shorter than their window."""
    server = Server(FULL, window(window_tokens), page_tokens=page_tokens, device_pages=64)
    for num_tokens in (page_tokens, 3 * page_tokens, 40):
        server.prefill(prompt(num_tokens, 1000 * num_tokens))
        whole = num_tokens // page_tokens * page_tokens
        assert server.match(prompt(num_tokens, 1000 * num_tokens)).num_tokens == whole


def drop_window(server: Server, start: int) -> None:
    """Takes the window entry that begins at `start` off the device."""
    device = server.core.tiers.device[1]
    (node,) = [node for node in device.order if node.start == start]
    server.core.tiers.drop(device, node)


def prefill_in_pages(server: Server, num_tokens: int) -> None:
    """A node, and with it a window entry, per page."""
    for end in range(PAGE, num_tokens + 1, PAGE):
        server.prefill(prompt(end))


def test_a_gap_deeper_than_the_window_does_not_matter():
    """M3."""
    server = Server(FULL, window(6))  # needs the last 5 tokens: two pages
    prefill_in_pages(server, 20)
    drop_window(server, 8)
    assert server.match(prompt(20)) == Match(20, 20, 0, 0, ())


@pytest.mark.parametrize("start", [12, 16])
def test_a_gap_within_the_window_makes_the_match_shorter(start):
    """M2, M3: and the answer says where making the window again would help."""
    server = Server(FULL, window(6))
    prefill_in_pages(server, 20)
    drop_window(server, start)
    assert server.match(prompt(20)) == Match(start, start, 0, 20 - start, (20,))


@pytest.mark.parametrize(("chunk", "grid"), [(1, 4), (2, 4), (3, 12), (8, 8), (6, 12)])
def test_state_only_on_its_grid(chunk, grid):
    """M4: the grid is the least common multiple of the state's chunk and the page."""
    server = Server(FULL, state(chunk), device_pages=64)
    server.prefill(prompt(27))
    found = server.match(prompt(27))
    assert found.num_tokens == 27 // grid * grid
    assert found.num_tokens + found.unusable_tokens == 24


def test_state_exactly_at_its_position():
    """M4: a shorter prefix has no state, and the answer names where one would help."""
    server = Server(FULL, state(1))
    server.prefill(prompt(24))
    assert server.match(prompt(24)).num_tokens == 24
    assert server.match(prompt(16)) == Match(0, 0, 0, 16, (16,))


def test_matching_again_costs_nothing_when_nothing_changed(monkeypatch):
    """M5."""
    server = Server()
    server.prefill(prompt(16))
    sequence = server.sequence([*prompt(16), NEXT])
    first = server.core.match(sequence)
    monkeypatch.setattr(RadixTree, "_resume", None)  # neither a walk nor a new answer
    monkeypatch.setattr(Matcher, "_describe", None)
    assert server.core.match(sequence) is first


def test_matching_again_continues_where_it_ended(monkeypatch):
    """M5: only what changed is walked."""
    server = Server()
    server.prefill(prompt(40))
    sequence = server.sequence([*prompt(60), NEXT])
    assert server.core.match(sequence).num_tokens == 40
    server.prefill(prompt(60))
    starts = []
    resume = RadixTree._resume

    def resume_and_note(*arguments):
        node = resume(*arguments)
        starts.append(node.end)
        return node

    monkeypatch.setattr(RadixTree, "_resume", staticmethod(resume_and_note))
    assert server.core.match(sequence).num_tokens == 60
    assert starts == [40]


def test_matching_again_after_the_end_was_evicted():
    """M5: falls back to what is still there."""
    server = Server(FULL, window(6))
    prefill_in_pages(server, 20)
    sequence = server.sequence([*prompt(20), NEXT])
    assert server.core.match(sequence).num_tokens == 20
    device = server.core.tiers.device[0]
    server.core.tiers.drop(device, next(node for node in device.order if node.end == 20))
    assert server.core.match(sequence).num_tokens == 16
    server.core.reset()
    assert server.core.match(sequence).num_tokens == 0


def test_an_admit_counts_as_access_and_a_match_does_not():
    """M6."""
    for use, oldest in ((lambda server: server.match(prompt(8)), 0), (lambda server: server.prefill(prompt(9)), 1000)):
        server = Server(device_pages=8)
        server.prefill(prompt(8))
        server.prefill(prompt(8, 1000))
        use(server)
        lease = server.admit(prompt(20, 2000))
        assert server.match(prompt(8, oldest)).num_tokens < 8
        assert server.match(prompt(8, 1000 - oldest)).num_tokens == 8
        server.release(lease)


def test_a_deep_hit_does_not_refresh_a_shallow_window():
    """M6."""
    server = Server(FULL, window(6))
    server.prefill(prompt(8))
    server.prefill(prompt(32))
    server.prefill(prompt(8, 1000))
    order = server.core.tiers.device[1].order
    server.prefill(prompt(33))
    ends = [node.end for node in order]
    assert ends.index(8) < ends.index(32)
    assert next(iter(order)).end == 8
