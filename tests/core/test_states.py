"""Recurrent states along a path: which are kept, which leave first, and where the same prompt resumes."""

from __future__ import annotations

import pytest

from jaxcache.config import TenantShare
from jaxcache.core.admission import Admission
from jaxcache.core.kinds.window import Window
from jaxcache.types import WritePolicy
from tests.core.helpers import FULL, NEXT, PAGE, Server, prompt, state, window

ANSWER = prompt(20, 70_000)


def states(server: Server, tokens: list[int], tier: str = "device") -> list[int]:
    """Where on a path there are states."""
    assert server.core.kinds.state is not None
    residency = getattr(server.core.kinds.state, tier)
    sequence = server.sequence([*tokens, NEXT])
    path = server.core.tiers.tree.walk(sequence, len(tokens))
    return [node.end for node, _ in path if node.pages[residency.index] is not None]


def answer(server: Server, tokens: list[int], generated: list[int]) -> list[int]:
    """One turn of a loop that publishes at every token; returns the whole text."""
    lease = server.admit(tokens)
    server.compute(lease, len(tokens))
    server.insert(lease, len(tokens))
    server.decode(lease, generated)
    server.release(lease)
    return [*tokens, *generated]


# ---- one path


@pytest.mark.parametrize("num_generated", [3, 4, 11, 20])
def test_of_an_answer_one_state_is_kept_however_often_the_loop_publishes(num_generated):
    """N7: the last one; and the prompt's stays, which other answers to it need."""
    server = Server(FULL, state())
    text = answer(server, prompt(9), ANSWER[:num_generated])
    last = len(text) // PAGE * PAGE
    assert states(server, text) == [8, last]
    assert server.free("state") == 32 - 2
    assert server.match(text).num_tokens == last
    server.check_empty()


def test_a_state_from_which_another_way_goes_on_outlives_deeper_ones():
    """N7: what many prompts begin with is worth more than the earlier turns of one of them."""
    server = Server(FULL, state(), max_states_per_path=3)
    text = answer(server, prompt(17), ANSWER[:8])
    server.prefill([*prompt(16), *prompt(9, 1000)])
    for turn in range(1, 5):
        text = answer(server, [*text, *prompt(9, 1000 * turn)], ANSWER[:8])
        assert 16 in states(server, text)
        assert len(states(server, text)) <= 3
    assert server.match(prompt(16)).num_tokens == 16
    server.check_empty()


def test_states_that_are_passed_leave_before_others_and_the_newest_last():
    """N7: not even generated text's, although its pages leave first: the next turn would find nothing."""
    server = Server(FULL, state(), device_pages={"full": 200, "state": 6})
    texts = [answer(server, prompt(17, 1000 * i), ANSWER[:8]) for i in range(1, 5)]
    for text in texts:
        assert states(server, text)[-1] == 24
        assert server.match(text).num_tokens == 24
    assert not any(16 in states(server, text) for text in texts[:2])
    server.check_empty()


def test_a_passed_state_that_is_used_again_is_an_ordinary_one():
    """Another answer to the same prompt: from now on two ways go on from there."""
    server = Server(FULL, state(), device_pages={"full": 200, "state": 6})
    text = answer(server, prompt(17), ANSWER[:8])
    answer(server, prompt(17), ANSWER[8:16])
    others = [answer(server, prompt(17, 1000), ANSWER[:8])]
    assert 16 in states(server, text)
    assert 16 not in states(server, others[0])


@pytest.mark.parametrize("write_policy", [WritePolicy.WRITE_THROUGH, WritePolicy.WRITE_BACK])
def test_the_states_of_an_answer_do_not_fill_host_memory(write_policy):
    """However often the loop publishes: what was copied is given back with the state on the device."""
    pages = {"full": 200, "state": 40}
    server = Server(FULL, state(), device_pages=pages, host_pages=pages, write_policy=write_policy)
    text = answer(server, prompt(9), ANSWER)
    on_host = states(server, text, "host")
    assert on_host == ([8, 28] if write_policy is WritePolicy.WRITE_THROUGH else [])
    assert server.host_free("state") == 40 - len(on_host)
    server.check_empty()


@pytest.mark.parametrize("tenants", [{}, {"a": TenantShare()}], ids=["no tenants", "tenants"])
def test_host_memory_too_loses_passed_states_first(tenants):
    pages = {"full": 200, "state": 8}, {"full": 200, "state": 5}
    server = Server(FULL, state(), device_pages=pages[0], host_pages=pages[1], tenants=tenants)
    server.namespace = server.core.new_namespace(model="test", tenant="a")
    texts = [answer(server, prompt(17, 1000 * i), ANSWER[:3]) for i in range(1, 5)]
    texts = [answer(server, [*text, *prompt(9, 50_000)], ANSWER[:3]) for text in texts]
    assert all(states(server, text, "host")[-1:] == [len(text) // PAGE * PAGE] for text in texts)
    server.check_empty()


def test_a_tenants_first_victim_changes_when_a_state_is_passed():
    """On the host nothing else happens then: the choice between accounts has to be told."""
    server = Server(FULL, state(), host_pages=200, tenants={"a": TenantShare()})
    server.namespace = server.core.new_namespace(model="test", tenant="a")
    old = answer(server, prompt(9, 5000), ANSWER[:3])
    text = answer(server, prompt(9), ANSWER[:3])
    host = server.core.tiers.host[1]
    passed = [node for node in host.order if node.end == 8]
    assert host.order.first() in passed
    for node in passed:
        host.touch(node)
    assert host.order.first() not in passed
    newest = passed[-1]
    host.demote(newest)
    assert host.order.first() is newest
    assert states(server, old, "host") == states(server, text, "host") == [8, 12]


def test_a_pinned_state_stays_although_it_is_passed():
    """E3: the request that resumed there has not computed anything yet."""
    server = Server(FULL, state(), max_states_per_path=1)
    server.prefill(prompt(9))
    waiting = server.admit([*prompt(8), *prompt(3, 2000)])
    text = answer(server, [*prompt(9), *prompt(9, 1000)], ANSWER[:8])
    assert states(server, text) == [8, 24]
    assert waiting.num_cached_tokens == 8
    server.compute(waiting, 11)
    server.release(waiting)
    server.check_empty()


# ---- the same prompt again

KINDS = {
    "window": (window(6),),
    "state": (state(),),
    "coarse state": (state(8),),
    "window and state": (window(6), state()),
    "window and coarse state": (window(6), state(8)),
}


@pytest.mark.parametrize("num_tokens", [15, 16, 17, 24])
@pytest.mark.parametrize("kinds", KINDS)
def test_the_same_prompt_finds_all_but_what_it_must_compute(kinds, num_tokens):
    """M1: also where it ends with a page; and a longer one finds all of it."""
    server = Server(FULL, *KINDS[kinds])
    grid = server.core.tiers.grid_tokens
    server.prefill(prompt(num_tokens))
    assert server.core.match(server.sequence(prompt(num_tokens))).num_tokens == (num_tokens - 1) // grid * grid
    assert server.match(prompt(num_tokens)).num_tokens == num_tokens // grid * grid
    assert server.prefill(prompt(num_tokens)) == (num_tokens - 1) // grid * grid
    server.check_empty()


def test_what_the_same_prompt_needs_is_let_go():
    """The page of the window when that has left its node; the state leaves before others at once."""
    server = Server(FULL, window(6), state())
    lease = server.admit(prompt(16))
    server.compute(lease, 16)
    server.insert(lease, 16)
    assert server.core.tiers.device[1].num_pinned == 3
    victim, _ = server.core.tiers.device[2].victim(1)
    assert victim is not None and victim.end == 12
    server.decode(lease, ANSWER[:8])
    assert server.core.tiers.device[1].num_pinned == 2


@pytest.mark.parametrize("found", [0, 8])
def test_a_prompt_has_two_stops_at_most(found):
    """N7: its slots are those of before; where a branch point is one of them, that is made first."""
    server = Server(FULL, state())
    if found:
        server.prefill(prompt(19))
    lease = server.admit([*prompt(found), *prompt(32 - found, 5000)])
    stops = []
    while lease.num_computed < 32:
        stops.append(lease.next_stop)
        server.compute(lease, lease.next_stop or 32)
        assert server.core.grow(lease, stops[-1], 1)
    assert stops == ([8, 32] if found else [28, 32])
    assert len(lease.checkpoints) == 2


@pytest.mark.mutation
@pytest.mark.parametrize("kinds", ["window", "state"])
def test_without_that_the_same_prompt_finds_nothing(monkeypatch, kinds):
    start = Window.window_start_to_keep
    plan = Admission._plan_stops

    def of_the_end(self, lease, num_computed):
        return max(start(self, lease, num_computed), self.first_needed(num_computed // PAGE * PAGE))

    def only_the_last(self, lease, prefix):
        plan(self, lease, prefix)
        lease._stops = lease._stops[-1:]

    monkeypatch.setattr(Window, "window_start_to_keep", of_the_end)
    monkeypatch.setattr(Admission, "_plan_stops", only_the_last)
    with pytest.raises(AssertionError):
        test_the_same_prompt_finds_all_but_what_it_must_compute(kinds, 16)
