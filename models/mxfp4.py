"""MXFP4, as gpt-oss publishes its experts: 32 neighbouring inputs have four bits each, and share a power of two.

    X_blocks  u8[E, out, in / 32, 16]   a byte holds inputs 2 i (low bits) and 2 i + 1
    X_scales  u8[E, out, in / 32]       2 ** (scale - 127)
    X         f32[E, in, out]           what they mean

Source: Open Compute Project, Microscaling Formats (MX) 1.0.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

GROUP = 32
BLOCKS, SCALES = "_blocks", "_scales"
VALUES = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)


def packed_shapes(shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    """Of the two tensors, by the endings of their names; ValueError where the inputs make no whole groups."""
    *experts, inputs, outputs = shape
    if inputs % GROUP:
        raise ValueError(f"{inputs} inputs are not whole groups of {GROUP}, as MXFP4 wants them")
    grid = (*experts, outputs, inputs // GROUP)
    return {BLOCKS: (*grid, GROUP // 2), SCALES: grid}


def read(blocks: np.ndarray, scales: np.ndarray, picks: tuple[np.ndarray, ...]) -> np.ndarray:
    """The picked experts, inputs and outputs of X: f32[experts, inputs, outputs]. Expands one expert at a time."""
    experts, inputs, outputs = picks
    groups, place = np.unique(inputs // GROUP, return_inverse=True)
    place = place * GROUP + inputs % GROUP
    found = np.empty((len(experts), len(inputs), len(outputs)), np.float32)
    for i, expert in enumerate(experts):
        grid = np.ix_(outputs, groups)
        packed = blocks[expert][grid]
        codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:2], GROUP)
        scale = scales[expert][grid].view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
        expanded = (VALUES[codes] * scale[..., None]).reshape(len(outputs), -1)
        found[i] = expanded[:, place].T
    return found
