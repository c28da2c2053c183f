"""What one tenant or salt may learn of another: nothing. Salts and names of tenants are in no text at all."""

from __future__ import annotations

from typing import Any

import pytest

from jaxcache.config import TenantShare
from jaxcache.core import invariants
from jaxcache.core.decisions import describe
from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.core.tokens import PUBLIC_FIELDS, Namespace
from jaxcache.runtime.events import EventStream
from jaxcache.types import Tier, WritePolicy
from tests.core.helpers import FULL, NEXT, PAGE, make_core, prompt, state, window
from tests.core.serving import flood, serve, start

SALT = "correct-horse-battery"
TENANT = "acme-incorporated"
SECRETS = (SALT, TENANT, "my-own-value")
PRIVATE = {"tenant": TENANT, "tenant_salt": SALT, "clearance": "my-own-value"}
each_private = pytest.mark.parametrize("name", PRIVATE)


def tells(text: Any) -> list[str]:
    """The secrets that a text contains."""
    return [secret for secret in SECRETS if secret in str(text) or secret in repr(text)]


# ---- what a namespace says of itself


def test_a_namespace_prints_the_names_of_its_private_fields_only():
    core = make_core()
    namespace = core.new_namespace(model="m", adapter="b", **PRIVATE)
    assert repr(namespace) == "Namespace(adapter='b', clearance=..., model='m', tenant=..., tenant_salt=...)"


def test_nothing_of_the_digest_is_printed():
    """It would tell whether a guessed salt is the right one."""
    core = make_core()
    namespace = core.new_namespace(model="m", tenant_salt=SALT)
    digest = namespace.digest.hex()
    assert not any(digest[i : i + 4] in repr(namespace) for i in range(len(digest) - 3))
    assert repr(namespace) == repr(core.new_namespace(model="m", tenant_salt="another"))


def test_what_is_not_known_to_be_public_is_private():
    namespace = make_core().new_namespace(**dict.fromkeys([*PUBLIC_FIELDS, *PRIVATE, "dtype"], "x"))
    assert list(namespace.private) == ["clearance", "dtype", "tenant", "tenant_salt"]


# ---- explain


@each_private
@pytest.mark.parametrize("here", ["another-value", None])
def test_explain_says_the_same_whether_or_not_another_has_the_prompt(name, here):
    """A guessed first page must not be confirmed: the whole answer is equal to that of a cache without the other."""
    explanations = []
    for others in (True, False):
        core = make_core()
        if others:
            serve(core, prompt(16), core.new_namespace(model="m", **{name: PRIVATE[name]}))
        mine = core.new_namespace(model="m", **({} if here is None else {name: here}))
        explanations.append(core.explain(core.sequence(prompt(16), mine)))
    assert explanations[0] == explanations[1]
    assert explanations[0].other_namespace == ()
    assert not tells(explanations[0])


@pytest.mark.parametrize("name", PUBLIC_FIELDS)
def test_explain_names_a_public_field_that_differs(name):
    """Among the namespaces of one tenant and salt, also when a namespace of another one has the page as well."""
    core = make_core()
    serve(core, prompt(16), core.new_namespace(**{name: "other"}))
    serve(core, prompt(16), core.new_namespace(**PRIVATE, **{name: "there"}))
    mine = core.new_namespace(**PRIVATE, **{name: "here"})
    explanation = core.explain(core.sequence(prompt(16), mine))
    assert explanation.other_namespace == ((name, "here", "there"),)
    assert f"{name} is 'here' here and 'there' there" in str(explanation)
    assert not tells(explanation)


def eviction_for(core: PrefixCache, mine: Namespace, theirs: Namespace) -> tuple[Any, Lease]:
    """What `explain` says of a page of `mine` that left for a lease of `theirs`, and the lease."""
    serve(core, prompt(16), mine)
    pages = core.tiers.device[0].allocator.num_pages
    lease = start(core, prompt(pages * PAGE, 5000), theirs)
    eviction = core.explain(core.sequence([*prompt(16), NEXT], mine)).eviction
    assert eviction is not None
    return eviction, lease


@each_private
def test_explain_does_not_name_the_lease_of_another(name):
    """Nor that there was one: what a prefetch or a lease of another displaced reads the same."""
    core = make_core()
    mine = core.new_namespace(model="m", **{name: "mine"})
    theirs = core.new_namespace(model="m", **{name: PRIVATE[name]})
    eviction, lease = eviction_for(core, mine, theirs)
    assert (eviction.lease, eviction.reason, eviction.step) == (0, "room", core.step_number - 1)
    text = str(core.explain(core.sequence([*prompt(16), NEXT], mine)))
    assert f"full left DEVICE in step {eviction.step}: room." in text
    assert "lease" not in text and not tells(text)
    core.release(lease)


@pytest.mark.parametrize("public", [{"model": "m"}, {"model": "another"}])
def test_explain_names_a_running_lease_of_the_same_private_fields(public):
    core = make_core()
    mine = core.new_namespace(model="m", **PRIVATE)
    eviction, lease = eviction_for(core, mine, core.new_namespace(**public, **PRIVATE))
    assert eviction.lease == lease.id
    core.release(lease)
    after = core.explain(core.sequence([*prompt(16), NEXT], mine)).eviction
    assert after == eviction._replace(lease=0)


def test_explain_does_not_name_leases_that_took_windows_and_states():
    """`lost` is told by the same rule."""
    core = make_core(FULL, window(6), state(4), device_pages={"full": 64, "window": 8, "state": 4})
    mine, theirs = (core.new_namespace(model="m", tenant_salt=salt) for salt in ("mine", SALT))
    serve(core, prompt(16), mine)
    lease = start(core, prompt(32, 5000), theirs)
    lost = core.explain(core.sequence([*prompt(16), NEXT], mine)).lost
    assert {(eviction.component, eviction.lease) for _, eviction in lost} == {("window", 0), ("state", 0)}
    core.release(lease)


def test_the_quota_of_one_is_no_reason_that_another_is_told():
    """Under write_back what leaves the device for its tenant's quota takes room in host memory, which is just room."""
    core = make_core(
        tenants={TENANT: TenantShare(quota=0.25)}, device_pages=40, host_pages=12, write_policy=WritePolicy.WRITE_BACK
    )
    other, mine = (core.new_namespace(model="m", tenant=name) for name in (TENANT, "b"))
    serve(core, prompt(32), mine)
    core.release(start(core, prompt(160, 7000), mine))  # pushes it to host memory, and leaves the device empty
    for i in range(2):
        serve(core, prompt(40, 10_000 + 1000 * i), other)
    assert core.counters["quota_pages"] == 10 + 7  # on the device and in host memory
    eviction = core.explain(core.sequence(prompt(32), mine)).eviction
    assert eviction is not None
    assert (eviction.tier, eviction.reason) == (Tier.HOST, "room")


# ---- every text


def every_text(core: PrefixCache, namespace: Namespace, foreign: Namespace) -> list[Any]:
    """All that a cache says to people: errors of every call, names of things, explanations, counts and decisions."""
    sequence, lease = core.sequence(prompt(16), namespace), start(core, prompt(20, 3000), namespace)
    strange = core.sequence(prompt(16), namespace)
    strange.namespace = foreign
    released = start(core, prompt(20, 4000), namespace)
    core.release(released)
    retired = core.new_namespace(model="old", **PRIVATE)
    core.retire_namespace(retired)
    mistakes = (
        lambda: core.new_namespace(tenant_salt=SALT.encode()),  # pyright: ignore[reportArgumentType]
        lambda: core.new_namespace(tenant=[TENANT]),  # pyright: ignore[reportArgumentType]
        lambda: core.sequence(prompt(8), SALT),  # pyright: ignore[reportArgumentType]
        lambda: core.sequence(prompt(8), PRIVATE),  # pyright: ignore[reportArgumentType]
        lambda: core.retire_namespace(PRIVATE),  # pyright: ignore[reportArgumentType]
        lambda: core.sequence(prompt(8), foreign),
        lambda: core.sequence(prompt(8), retired),
        lambda: core.retire_namespace(retired),
        lambda: core.retire_namespace(foreign),
        lambda: core.match(strange),
        lambda: core.admit(strange, 8),
        lambda: core.explain(strange),
        lambda: core.prefetch(strange),
        lambda: core.prefetch(namespace),  # pyright: ignore[reportArgumentType]
        lambda: core.admit(namespace, 8),  # pyright: ignore[reportArgumentType]
        lambda: core.admit(sequence, 8, ticket=namespace),  # pyright: ignore[reportArgumentType]
        lambda: core.insert(released, 20),
        lambda: core.release(released),
        lambda: core.release(namespace),  # pyright: ignore[reportArgumentType]
        lambda: core.insert(lease, 10_000),
        core.reset,
    )
    texts = []
    for mistake in mistakes:
        with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
            mistake()
        texts.append(caught.value)
    core.insert(lease, 20, priority=1, retain_steps=3)
    ticket = core.prefetch(core.sequence(prompt(40, 8000), namespace))
    nodes = invariants.all_nodes(core)
    texts += [namespace, retired, sequence, lease, ticket, *nodes, *core.tiers.tree.all_roots()]
    texts += [core.explain(core.sequence(prompt(n), namespace)) for n in (4, 16, 40)]
    texts += [core.counts(), core.sizes(), dict(core.counters), list(core.retentions.live.values())]
    texts += [describe(decision) for decision in core.decisions.recent]
    texts += EventStream(core.tiers).take()
    texts += list(core.tiers.evictions)
    core.release(lease)
    return texts


@pytest.mark.parametrize("mixture", [(FULL,), (FULL, window(6), state(4))])
def test_no_text_contains_a_salt_or_the_name_of_a_tenant(mixture):
    """Errors, names of things, explanations, counts, decisions (which RanksDiverged reports), events."""
    fields = {"tenants": {TENANT: TenantShare(floor=0.1)}, "host_pages": 64, "events": True, "max_retained_share": 0.5}
    core = make_core(*mixture, device_pages=64, **fields)
    core.attachment.attach()
    namespace = core.new_namespace(model="m", **PRIVATE)
    flood(core, namespace, 40)
    for text in every_text(core, namespace, make_core().new_namespace(model="m", **PRIVATE)):
        assert not tells(text), text


def test_a_broken_invariant_names_no_tenant():
    core = make_core(tenants={TENANT: TenantShare(floor=0.1)})
    namespace = core.new_namespace(model="m", **PRIVATE)
    assert core.tiers.tenants is not None
    core.tiers.tenants.tenant_of[core.tiers.tree.root(namespace).account] = 0
    with pytest.raises(AssertionError) as caught:
        invariants.check(core)
    assert "I15" in str(caught.value)
    assert not tells(caught.value)
