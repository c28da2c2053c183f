"""Recurrent state (Mamba, gated delta net): one state, exactly at n."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxcache.components.base import Component
from jaxcache.types import Span


@dataclass(frozen=True)
class RecurrentState(Component):
    """The state after n tokens. Its pages are called slots.

    chunk_tokens: a request can resume at multiples of this (and of the page) only. Leave it at 1 unless the model's
                  kernel can start nowhere else: each turn of a conversation computes half of it again. A chunked kernel
                  starts anywhere if its first chunk is filled up in front with tokens that change no state
    """

    chunk_tokens: int = 1
    kind: ClassVar[str] = "state"
    is_paged: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        if self.chunk_tokens < 1:
            raise ValueError(f"component {self.name!r}: {self.chunk_tokens=} must be at least 1")

    @property
    def grid_tokens(self) -> int:
        return self.chunk_tokens

    def required(self, n: int) -> Span:
        return Span(n, n)
