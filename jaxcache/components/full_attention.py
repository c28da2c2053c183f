"""Full attention: every token of the prefix is needed."""

from __future__ import annotations

from typing import ClassVar

from jaxcache.components.base import Component
from jaxcache.types import Span


class FullAttention(Component):
    """Keys and values of all earlier tokens: pages [0, n)."""

    kind: ClassVar[str] = "prefix"

    def required(self, n: int) -> Span:
        return Span(0, n)
