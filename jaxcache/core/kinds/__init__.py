"""The kinds of components, and all in which they differ. Every file of this folder is read, and a class that is given a
name there, or in a program that uses jaxcache, is the kind of the components that say so: a new kind is one file."""

from __future__ import annotations

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.decisions import Counters
from jaxcache.core.kinds.base import KINDS, Extra, Kind, Need, Path
from jaxcache.core.kinds.prefix import Prefix
from jaxcache.core.kinds.spine import SPINE, first_with_arrays, with_spine
from jaxcache.core.kinds.state import State
from jaxcache.core.pages import Residency
from jaxcache.core.registry import read_folder
from jaxcache.core.tiers import Tiers

read_folder(__name__, __path__)


class Kinds(tuple[Kind, ...]):
    """One for each component, in their order. full: full attention; extras: all others; state: one of them, or None"""

    full: Prefix
    extras: tuple[Extra, ...]
    state: State | None


def make_kinds(tiers: Tiers, counters: Counters) -> Kinds:
    kinds = Kinds(KINDS[component.kind](tiers, c, counters) for c, component in enumerate(tiers.components))
    full, *extras = kinds
    assert isinstance(full, Prefix), f"full attention comes first, not {full.name}"
    kinds.full, kinds.extras = full, tuple(kind for kind in extras if isinstance(kind, Extra))
    kinds.state = next((kind for kind in extras if isinstance(kind, State)), None)
    return kinds


def residency_of(component: Component) -> type[Residency]:
    return KINDS[component.kind].residency


def _kind_of(component: Component) -> type[Kind]:
    kind = getattr(component, "kind", None)
    if kind not in KINDS or (kind == SPINE.kind and component is not SPINE):
        known = sorted(KINDS.keys() - {SPINE.kind})
        raise ValueError(f"component {component.name!r} is of kind {kind!r}, none of {known}")
    if not issubclass(KINDS[kind], (Prefix, Extra)):
        raise ValueError(f"kind {kind!r} must derive from Prefix or Extra")
    return KINDS[kind]


def validate(components: tuple[Component, ...], config: CacheConfig) -> None:
    """Raises ValueError for what a model cannot declare."""
    names = [component.name for component in components]
    if not components or len(set(names)) != len(names):
        raise ValueError(f"a cache needs components with different names, not {names}")
    if any(component.name == SPINE.name and component is not SPINE for component in components):
        raise ValueError(f"{SPINE.name!r} is what the cache calls its own component: name yours otherwise")
    kinds = {component.name: _kind_of(component) for component in components}
    for single in (Prefix, State):
        same = [name for name, kind in kinds.items() if issubclass(kind, single)]
        if len(same) > 1:
            raise ValueError(f"{same} live and move together: declare one component with several fields")
    for component in components:
        for spec in component.fields:
            if spec.page_tokens not in (None, config.page_tokens):
                raise ValueError(
                    f"{component.name}.{spec.name} has pages of {spec.page_tokens} tokens, but {config.page_tokens=}"
                )
    for pages in (config.device_pages, config.host_pages):
        if not isinstance(pages, int):
            unknown = sorted(set(pages) - set(names))
            if unknown:
                raise ValueError(f"pages are given for {unknown}, but the components are {names}")


__all__ = [
    "KINDS",
    "SPINE",
    "Extra",
    "Kind",
    "Kinds",
    "Need",
    "Path",
    "Prefix",
    "first_with_arrays",
    "make_kinds",
    "residency_of",
    "validate",
    "with_spine",
]
