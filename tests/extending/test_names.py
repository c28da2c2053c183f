"""What is registered by a name: found by it, once, and refused with a reason where it cannot be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.eviction import POLICIES
from jaxcache.core.eviction.lru import Lru
from jaxcache.core.eviction.order import EvictionOrder
from jaxcache.core.kinds import KINDS, Kind, validate
from jaxcache.core.kinds.prefix import Prefix
from jaxcache.core.kinds.state import State
from jaxcache.core.prefix_cache import PrefixCache
from models.decoder import DecoderConfig
from models.families import FAMILIES
from tests.core.helpers import FULL, state, window

REGISTRIES = {
    "kind": (KINDS, Kind, {"name": "window"}),
    "policy": (POLICIES, EvictionOrder, {"name": "lru"}),
    "family": (FAMILIES, DecoderConfig, {"model_types": ("llama",)}),
}


@pytest.mark.parametrize("what", REGISTRIES)
def test_a_name_that_is_taken_is_refused(what):
    registry, base, keywords = REGISTRIES[what]
    before = dict(registry)
    with pytest.raises(ValueError, match=r"already: (jaxcache|models)\."):
        type("Mine", (base,), {}, **keywords)
    assert registry == before


def test_a_class_that_is_read_again_takes_the_place_of_the_one_before():
    """A cell of a notebook, or a file that could not be imported to its end at first."""
    for _ in range(2):

        class Again(Lru, name="again"):
            pass

        assert POLICIES["again"] is Again
    del POLICIES["again"]


@pytest.fixture
def made():
    """Makes a component of a kind that derives from others, known by a name while a test runs."""
    names = []

    def make(name: str, *bases: type) -> Component:
        names.append(f"a_{name}")
        type(name, bases, {}, name=f"a_{name}")
        return type(name, (RecurrentState,), {"kind": f"a_{name}"})(name, ())

    yield make
    for name in names:
        del KINDS[name]


CONFIG = CacheConfig(page_tokens=4, device_pages=16)


@dataclass(frozen=True)
class Odd(SlidingWindow):
    kind: ClassVar[Any] = "odd"


def test_kinds_that_make_no_cache(made):
    no_kind = type("NoKind", (Component,), {"required": SlidingWindow.required})("none", ())
    fake = type("Fake", (RecurrentState,), {"kind": "spine"})("fake", ())
    for components, message in (
        ((FULL, Odd("odd", (), window_tokens=3)), "of kind 'odd', none of .*'window'"),
        ((FULL, no_kind), "'none' is of kind None, none of"),
        ((FULL, fake), "'fake' is of kind 'spine', none of"),
        ((FULL, state(), made("other_state", State)), "declare one component with several fields"),
        ((FULL, made("other_full", Prefix)), "declare one component with several fields"),
        ((FULL, made("strange", Kind)), "must derive from Prefix or Extra"),
    ):
        with pytest.raises(ValueError, match=message):
            validate(components, CONFIG)


def test_another_kind_of_full_attention_is_the_tree(made):
    """No spine comes before it, wherever it is declared."""
    full = made("quantised", Prefix)
    core = PrefixCache((window(6), full), CONFIG)
    assert [component.name for component in core.components] == ["quantised", "window"]
    assert isinstance(core.kinds.full, Prefix)
    assert [c.name for c in PrefixCache((FullAttention("f", ()), window(6)), CONFIG).components] == ["f", "window"]
