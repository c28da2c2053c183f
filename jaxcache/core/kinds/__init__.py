"""The kinds of components: a new one is a file here, and its line in these tables."""

from __future__ import annotations

from collections.abc import Mapping

from jaxcache.components.base import Reach
from jaxcache.core.kinds.base import Extra, Kind, Need, Path
from jaxcache.core.kinds.prefix import Prefix, PrefixResidency
from jaxcache.core.kinds.state import State, StateResidency
from jaxcache.core.kinds.window import Window, WindowResidency
from jaxcache.core.pages import Residency
from jaxcache.core.plan import Counters
from jaxcache.core.tiers import Tiers

RESIDENCIES: Mapping[Reach, type[Residency]] = {
    Reach.PREFIX: PrefixResidency,
    Reach.SUFFIX: WindowResidency,
    Reach.POINT: StateResidency,
}
KINDS: Mapping[Reach, type[Kind]] = {Reach.PREFIX: Prefix, Reach.SUFFIX: Window, Reach.POINT: State}


class Kinds(tuple[Kind, ...]):
    """One for each component, in their order. full: full attention; extras: all others; state: one of them, or None"""

    full: Prefix
    extras: tuple[Extra, ...]
    state: State | None


def make_kinds(tiers: Tiers, counters: Counters) -> Kinds:
    kinds = Kinds(KINDS[component.reach](tiers, c, counters) for c, component in enumerate(tiers.components))
    full, *extras = kinds
    assert isinstance(full, Prefix), f"full attention comes first, not {full.name}"
    kinds.full, kinds.extras = full, tuple(kind for kind in extras if isinstance(kind, Extra))
    kinds.state = next((kind for kind in extras if isinstance(kind, State)), None)
    return kinds


__all__ = ["KINDS", "RESIDENCIES", "Extra", "Kind", "Kinds", "Need", "Path", "Prefix", "make_kinds"]
