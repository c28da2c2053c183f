"""The spine: full attention of a model that has none. Pages without arrays, which only say what tokens are known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.kinds.base import KINDS, Extra
from jaxcache.core.kinds.prefix import Prefix
from jaxcache.core.node import Node
from jaxcache.types import Span, Tier

SPINE_PAGES = 1 << 16  # at least; a page of it takes four bytes, and its tokens
SPINE_SHARE = 16  # and so many for every page of the largest other component


class SpineComponent(Component):
    """All tokens are needed, and nothing of them."""

    kind: ClassVar[str] = "spine"

    def required(self, n: int) -> Span:
        return Span(0, n)


SPINE = SpineComponent("spine", ())


class Spine(Prefix, name="spine"):
    """Nothing has to be loaded back of it, so where a hit comes from is what the others say: all of them or none."""

    def device_tokens(self, num_tokens: int, node: Node, extras: tuple[Extra, ...]) -> int:
        return num_tokens if all(kind.is_on_device(num_tokens, node) for kind in extras) else 0


def with_spine(components: tuple[Component, ...], config: CacheConfig) -> tuple[tuple[Component, ...], CacheConfig]:
    """Full attention first; where there is none, a spine that is never what runs out."""
    own = tuple(component for component in components if component is not SPINE)
    full = tuple(component for component in own if issubclass(KINDS[component.kind], Prefix))
    others = tuple(component for component in own if component not in full)
    if full:
        return (*full, *others), config
    return (SPINE, *others), replace(
        config,
        device_pages=_with_spine_pages(others, Tier.DEVICE, config),
        host_pages=_with_spine_pages(others, Tier.HOST, config),
    )


def first_with_arrays(components: tuple[Component, ...]) -> Component:
    """Of those in order, the first that is no spine."""
    return next(component for component in components if component is not SPINE)


def _with_spine_pages(others: tuple[Component, ...], tier: Tier, config: CacheConfig) -> dict[str, int]:
    given = config.device_pages if tier is Tier.DEVICE else config.host_pages
    pages = {component.name: config.pages_of(component.name, tier) for component in others}
    enough = max(SPINE_PAGES, SPINE_SHARE * max(pages.values())) if any(pages.values()) else 0
    return {SPINE.name: enough, **pages, **(given if isinstance(given, Mapping) else {})}
