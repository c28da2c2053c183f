"""Packed entries: fp8 numbers with a scale for each 128 of them, then bf16 ones, as bytes of one slot.

    | scaled x e4m3 | scaled / 128 x f32, scales | exact x bf16 |        512, 4 and 64: 512 + 16 + 128 = 656 bytes

An entry is packed when it is written, also before it is first read: what a token reads does not depend on whether the
entry was cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array, lax

GROUP = 128  # numbers that share a scale
LARGEST = 448.0  # of e4m3
SMALLEST_SCALE = 1e-20  # so that a group of zeros is divided by something


@dataclass(frozen=True)
class Packing:
    """scaled: how many of the first numbers are fp8; exact: how many follow, as bf16."""

    scaled: int
    exact: int = 0

    @property
    def num_groups(self) -> int:
        return -(-self.scaled // GROUP)

    @property
    def num_bytes(self) -> int:
        """Of an entry."""
        return self.scaled + 4 * self.num_groups + 2 * self.exact

    def pack(self, entries: Array) -> Array:
        """[..., scaled + exact] -> uint8[..., num_bytes]"""
        scaled, exact = jnp.split(entries.astype(jnp.float32), [self.scaled], axis=-1)
        groups = self._groups(scaled)
        scales = jnp.maximum(jnp.abs(groups).max(axis=-1), SMALLEST_SCALE) / LARGEST
        quotients = (groups / scales[..., None]).reshape(*scales.shape[:-1], -1)[..., : self.scaled]
        quotients = jnp.clip(quotients, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
        parts = (lax.bitcast_convert_type(x, jnp.uint8) for x in (quotients, scales, exact.astype(jnp.bfloat16)))
        return jnp.concatenate([part.reshape(*entries.shape[:-1], -1) for part in parts], axis=-1)

    def unpack(self, packed: Array) -> Array:
        """uint8[..., num_bytes] -> f32[..., scaled + exact]"""
        stop = self.scaled + 4 * self.num_groups
        scaled, scales, exact = jnp.split(packed, [self.scaled, stop], axis=-1)
        scaled = lax.bitcast_convert_type(scaled, jnp.float8_e4m3fn).astype(jnp.float32)
        scales = lax.bitcast_convert_type(scales.reshape(*scales.shape[:-1], -1, 4), jnp.float32)
        exact = lax.bitcast_convert_type(exact.reshape(*exact.shape[:-1], -1, 2), jnp.bfloat16)
        numbers = (self._groups(scaled) * scales[..., None]).reshape(*scales.shape[:-1], -1)[..., : self.scaled]
        return jnp.concatenate([numbers, exact.astype(jnp.float32)], axis=-1)

    def _groups(self, scaled: Array) -> Array:
        """[..., num_groups, GROUP]; the last one is filled up with zeros."""
        padding = [(0, 0)] * (scaled.ndim - 1) + [(0, self.num_groups * GROUP - self.scaled)]
        return jnp.pad(scaled, padding).reshape(*scaled.shape[:-1], self.num_groups, GROUP)
