"""Sliding-window attention: the last window_tokens - 1 tokens before n are needed, all or none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxcache.components.base import Component
from jaxcache.types import Span


@dataclass(frozen=True)
class SlidingWindow(Component):
    """Keys and values of the last tokens: the token at n sees [n - window_tokens + 1, n]."""

    window_tokens: int = 0
    kind: ClassVar[str] = "window"

    def __post_init__(self):
        super().__post_init__()
        if self.window_tokens < 1:
            raise ValueError(f"component {self.name!r}: {self.window_tokens=} must be at least 1")

    def required(self, n: int) -> Span:
        return Span(max(0, n - self.window_tokens + 1), n)
