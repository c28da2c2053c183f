"""Yarn: how a rotary embedding is stretched to contexts longer than those it was trained on (arXiv 2309.00071)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from models.layers import Rope, plain_rope


@dataclass(frozen=True)
class Yarn:
    """How the rotary embedding of `original_tokens` is stretched: slow dimensions by `factor`, fast ones not at all.

    beta_fast, beta_slow: rotations over the original length from which on a dimension is fast, up to which it is slow
    attention_factor:     of cosine and sine; None: what the paper suggests for `factor`
    """

    factor: float
    original_tokens: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None

    @classmethod
    def published(cls, hf: Mapping[str, Any], rope: Mapping[str, Any]) -> Yarn:
        """From a `config.json` and what it says of the rotary embedding."""
        original = rope.get("original_max_position_embeddings") or hf["max_position_embeddings"]
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        given = {name: rope[name] for name in names if rope.get(name) is not None}
        if "attention_factor" not in given and rope.get("mscale") and rope.get("mscale_all_dim"):
            scales = (stretched_scale(float(rope["factor"]), rope[name]) for name in ("mscale", "mscale_all_dim"))
            given["attention_factor"] = next(scales) / next(scales)
        return cls(float(rope["factor"]), original, **given)

    def rope(self, theta: float, head_dim: int) -> Rope:
        frequencies = plain_rope(theta, head_dim).frequencies
        low, high = (self._dimension(beta, theta, head_dim) for beta in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        stretched = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0, 1)
        frequencies = frequencies * (1 - stretched) + frequencies / self.factor * stretched
        default = stretched_scale(self.factor)
        return Rope(frequencies, default if self.attention_factor is None else self.attention_factor)

    def _dimension(self, rotations: float, theta: float, head_dim: int) -> float:
        """That turns so often over the original length."""
        return head_dim * math.log(self.original_tokens / (rotations * 2 * math.pi)) / (2 * math.log(theta))


def stretched_scale(factor: float, weight: float = 1.0) -> float:
    """By what queries and keys grow when the context is stretched by `factor`."""
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0
