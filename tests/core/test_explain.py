"""What `explain` says of windows and states that are missing: each reason made by calls of a loop, then repaired."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import NamedTuple

import pytest

from jaxcache.config import TenantShare
from jaxcache.core.explain import Explanation, Limit
from jaxcache.core.missing import Cause
from jaxcache.core.tiers import Tiers
from jaxcache.types import Span
from tests.core.driver import draw_components, draw_config, iterate
from tests.core.helpers import FULL, NEXT, Server, prompt, state, window
from tests.core.serving import compute, serve, start
from tests.core.strict import Strict
from tests.core.test_states import ANSWER, answer

PROMPT = [*prompt(16), NEXT]


def explain(server: Server, tokens: list[int] = PROMPT) -> Explanation:
    return server.core.explain(server.sequence(tokens))


# ---- reasons


def state_that_left() -> Server:
    """Two slots in all; another prompt takes both."""
    server = Server(FULL, state(), device_pages={"full": 64, "state": 2})
    server.prefill(prompt(17))
    server.prefill(prompt(17, 1000))
    return server


def state_that_left_host_memory() -> Server:
    server = Server(FULL, state(), device_pages={"full": 64, "state": 2}, host_pages={"full": 64, "state": 1})
    server.prefill(prompt(17))
    server.prefill(prompt(17, 1000))
    return server


def too_many_states() -> Server:
    server = Server(FULL, state(), max_states_per_path=1)
    server.prefill(prompt(17))
    server.prefill(prompt(25))
    return server


def state_in_an_answer() -> Server:
    server = Server(FULL, state())
    text = answer(server, prompt(9), prompt(16)[9:])
    server.prefill(text)
    answer(server, prompt(9), [*prompt(17)[9:], *ANSWER])
    return server


def state_over_a_quota() -> Server:
    pages = {"full": 400, "state": 20}
    server = Server(FULL, state(), device_pages=pages, tenants={"a": TenantShare(quota=0.25)})
    server.namespace = server.core.new_namespace(model="test", tenant="a")
    server.prefill(prompt(17))
    for i in range(1, 6):
        server.prefill(prompt(17, 1000 * i))
    return server


def no_slot() -> Server:
    server = Server(FULL, state(), device_pages={"full": 64, "state": 3})
    other = server.admit(prompt(5, 1000))
    server.prefill(prompt(17))
    server.release(other)
    return server


def not_reported() -> Server:
    server = Server(FULL, state())
    lease = server.admit(prompt(17))
    server.compute(lease, 17)
    server.core.insert(lease, 17)
    server.release(lease)
    return server


def no_chunk_ended_there() -> Server:
    server = Server(FULL, state())
    server.prefill(prompt(25))
    return server


def window_that_left() -> Server:
    server = Server(FULL, window(6), device_pages={"full": 64, "window": 5})
    server.prefill(prompt(17))
    server.prefill(prompt(17, 1000))
    return server


def window_left_behind() -> Server:
    server = Server(FULL, window(6))
    server.prefill(prompt(33))
    return server


class Reason(NamedTuple):
    """make: a server on which a request for PROMPT cannot resume at 16; what must be said of it."""

    make: Callable[[], Server]
    cause: Cause
    why: str
    remedy: str


REASONS = (
    Reason(state_that_left, Cause.EVICTED, "it left DEVICE in step 0 (room)", "state has 2 on the device"),
    Reason(state_that_left_host_memory, Cause.EVICTED, "it left HOST in step 0 (room)", "state has 1 on the host"),
    Reason(too_many_states, Cause.EVICTED, "(max_states_per_path)", "max_states_per_path would have kept it: it is 1"),
    Reason(state_in_an_answer, Cause.EVICTED, "(a later state of the same answer)", "ends a chunk at 16"),
    Reason(state_over_a_quota, Cause.EVICTED, "(quota)", "ends a chunk at 16"),
    Reason(no_slot, Cause.NO_SLOT, "no slot was free for it", "state has 3 on the device, three for each request"),
    Reason(not_reported, Cause.NOT_REPORTED, "did not report it in insert(states=...)", "insert(..., states=[16])"),
    Reason(no_chunk_ended_there, Cause.NEVER_MADE, "no chunk that was reported ended there", "ends a chunk at 16"),
    Reason(window_that_left, Cause.EVICTED, "they left DEVICE in step 0 (room)", "window has 5 on the device"),
    Reason(window_left_behind, Cause.NEVER_MADE, "had gone on past this window", "ends a chunk at 16"),
)
each_reason = pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.make.__name__)


@each_reason
def test_the_reason_is_named(reason):
    explanation = explain(reason.make())
    assert (explanation.found_tokens, explanation.resumable_tokens, explanation.limit) == (16, 16, None)
    assert explanation.usable_tokens < 16
    (missing,) = explanation.missing
    assert missing.cause is reason.cause
    assert (missing.eviction is not None) == (reason.cause is Cause.EVICTED)
    assert missing.span.stop == 16
    text = str(explanation)
    assert f"To resume at 16:\n  {missing.component}: " in text
    assert reason.why in text
    assert reason.remedy in text


@each_reason
def test_what_is_said_to_make_it_makes_it(reason):
    """The branch point of M2: the next request ends a chunk there, and reports it."""
    server = reason.make()
    explanation = explain(server)
    assert server.match(prompt(16)).branch_points == (explanation.resumable_tokens,)
    lease = server.admit(PROMPT)
    assert lease.next_stop == 16
    server.compute(lease, 16)
    server.insert(lease, 16)
    server.release(lease)
    after = explain(server)
    assert (after.usable_tokens, after.missing) == (16, ())
    server.check_empty()


def test_a_split_changes_no_reason():
    """What was noted of a state is found by its tokens, wherever nodes end by now."""
    server = not_reported()
    server.prefill([*prompt(8), *prompt(9, 1000)])
    assert explain(server).missing[0].cause is Cause.NOT_REPORTED
    other = explain(server, [*prompt(8), *prompt(8, 1000), NEXT])
    assert other.usable_tokens == other.resumable_tokens == 16


def test_a_reset_forgets_the_reasons():
    server = not_reported()
    server.core.reset()
    server.prefill(prompt(25))
    assert explain(server).missing[0].cause is Cause.NEVER_MADE


@pytest.mark.mutation
def test_without_notes_the_loop_is_not_told(monkeypatch):
    monkeypatch.setattr(Tiers, "note_unmade", lambda *args: None)
    with pytest.raises(AssertionError):
        test_the_reason_is_named(next(reason for reason in REASONS if reason.make is not_reported))


# ---- what is there


def test_the_nearest_states_are_named():
    server = Server(FULL, state())
    server.prefill(prompt(9))
    server.prefill(prompt(25))
    (missing,) = explain(server).missing
    assert missing.held == (("DEVICE", Span(8, 8)), ("DEVICE", Span(24, 24)))
    assert explain(server).usable_tokens == 8
    assert "There are: 8 on DEVICE, 24 on DEVICE." in str(explain(server))


def test_the_part_of_a_window_that_is_there_is_named_with_its_tier():
    server = Server(FULL, window(12), device_pages={"full": 64, "window": 6}, host_pages={"full": 64, "window": 2})
    server.prefill(prompt(9))
    server.prefill(prompt(17))
    server.rank.apply()
    server.release(server.admit(prompt(24, 1000)))
    (missing,) = explain(server).missing
    assert (missing.span, missing.held) == (Span(4, 8), (("HOST", Span(8, 16)),))
    assert "There are: [8, 16) on HOST." in str(explain(server))


def test_each_component_is_named():
    server = Server(FULL, window(6, "near"), window(12, "far"), state())
    server.prefill(prompt(41))
    missing = explain(server).missing
    assert [(each.component, each.span) for each in missing] == [
        ("near", Span(8, 16)),
        ("far", Span(4, 16)),
        ("state", Span(16, 16)),
    ]


def test_a_window_that_is_there_is_not_missing_with_its_state():
    server = Server(FULL, window(6), state())
    lease = server.admit(prompt(17))
    server.compute(lease, 17)
    server.core.insert(lease, 17)
    server.release(lease)
    assert [missing.component for missing in explain(server).missing] == ["state"]


# ---- limits


def test_the_last_token_has_to_be_computed():
    server = Server(FULL)
    server.prefill(prompt(16))
    explanation = explain(server, prompt(16))
    assert (explanation.usable_tokens, explanation.resumable_tokens, explanation.limit) == (12, 12, Limit.LAST_TOKEN)
    assert explanation.missing == ()
    assert "No request can resume at 16: at least the last token of a prompt has to be computed." in str(explanation)


def test_the_grid_is_named():
    server = Server(FULL, state(16))
    server.prefill(prompt(31))
    explanation = explain(server, prompt(31))
    assert (explanation.usable_tokens, explanation.found_tokens, explanation.limit) == (16, 28, Limit.GRID)
    assert "No request can resume at 28: requests resume at multiples of 16 tokens only" in str(explanation)


def test_a_retired_namespace_is_named():
    server = Server(FULL)
    server.prefill(prompt(17))
    sequence = server.sequence(PROMPT)
    server.core.retire_namespace(server.namespace)
    explanation = server.core.explain(sequence)
    assert (explanation.usable_tokens, explanation.resumable_tokens, explanation.limit) == (0, 0, Limit.RETIRED)
    assert "its namespace was retired" in str(explanation)


@pytest.mark.parametrize("tokens", [[*prompt(17), NEXT], prompt(9, 5000), prompt(3)])
def test_where_nothing_is_missing_nothing_is_said(tokens):
    server = Server(FULL, window(6), state())
    server.prefill(prompt(17))
    explanation = explain(server, tokens)
    assert explanation.usable_tokens == explanation.resumable_tokens == explanation.found_tokens
    assert (explanation.missing, explanation.limit) == ((), None)
    assert "To resume" not in str(explanation)


def test_asking_changes_nothing():
    server = no_chunk_ended_there()
    tiers = server.core.tiers
    before = server.core.digest, tiers.tree.num_nodes, tiers.tree.version, [list(r.order) for r in tiers.residencies]
    explain(server)
    after = server.core.digest, tiers.tree.num_nodes, tiers.tree.version, [list(r.order) for r in tiers.residencies]
    assert before == after


# ---- others


@pytest.mark.parametrize("whose", ["mine", "theirs"])
def test_a_lease_is_named_to_those_who_have_its_private_fields(whose):
    """As of pages: and only while it runs."""
    server = Server(FULL, state(), device_pages={"full": 64, "state": 2})
    spaces = {salt: server.core.new_namespace(model="m", tenant_salt=salt) for salt in ("mine", "theirs")}
    serve(server.core, prompt(17), spaces["mine"])
    lease = start(server.core, prompt(17, 1000), spaces[whose])
    compute(server.core, lease)
    explanation = server.core.explain(server.core.sequence(PROMPT, spaces["mine"]))
    (missing,) = explanation.missing
    assert missing.eviction is not None
    assert missing.eviction.lease == (lease.id if whose == "mine" else 0)
    assert (f"for lease {lease.id}" in str(explanation)) == (whose == "mine")
    server.core.release(lease)
    assert "for lease" not in str(server.core.explain(server.core.sequence(PROMPT, spaces["mine"])))


def test_a_note_of_one_namespace_is_none_of_another():
    """Both computed the same tokens: what the other's loop did is not said."""
    server = not_reported()
    other = server.core.new_namespace(model="test", tenant_salt="other")
    serve(server.core, prompt(25), other)
    (missing,) = server.core.explain(server.core.sequence(PROMPT, other)).missing
    assert missing.cause is Cause.NEVER_MADE


# ---- whatever happens


@pytest.mark.parametrize(
    "mixture", [("full", "window"), ("full", "state"), ("full", "window", "state"), ("window", "state")], ids="+".join
)
def test_what_is_found_and_cannot_be_used_has_a_reason(mixture, seed):
    """Of random serving, at every moment: `missing` says something exactly where something is missing, and of the
    branch point of `match`."""
    rng = Random(seed)
    components = draw_components(rng, mixture, page_tokens=4)
    scenario = Strict(components, draw_config(rng, components, 4, max_pages=12), seed)
    num_missing = 0
    for _ in range(150):
        iterate(scenario, rng, max_tokens=48, abort_chance=0.03)
        for space, tokens in scenario.finished[-2:]:
            sequence = scenario.core.sequence(tokens, scenario.namespace(space)[0])
            found, explanation = scenario.core.match(sequence), scenario.core.explain(sequence)
            assert explanation.usable_tokens == found.num_tokens <= explanation.resumable_tokens
            is_short = found.num_tokens < explanation.resumable_tokens
            assert found.branch_points == ((explanation.resumable_tokens,) if is_short else ())
            assert bool(explanation.missing) == is_short
            assert all(each.remedies and str(each) for each in explanation.missing)
            num_missing += is_short
    assert num_missing
