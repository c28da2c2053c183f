"""Gathers and scatters of pages beside a copy of as many contiguous bytes, on one device, in one run.

by page size and form (pallas: GPUs only):  GB/s copied, and the share of the copy's rate
pools that are lists of layers:             the same, for one launch and for XLA's program
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.timing import donating_s, in_a_row_s
from kernels_pallas.gather_pages import gather_pages, gather_pages_reference
from kernels_pallas.layer_pages import (
    gather_layers,
    gather_layers_reference,
    scatter_layers,
    scatter_layers_reference,
)
from kernels_pallas.scatter_pages import scatter_pages, scatter_pages_reference

PAGE_KIB = (16, 64, 256, 1024, 2048)
LAYERS, PART_SHAPE, PART_PAGES = 64, (16, 8, 128), (32, 256)  # parts of 32 KiB in bfloat16
Figures = dict[str, float]


def run(is_gpu: bool) -> Iterator[tuple[str, Figures]]:
    """(name, figures) of one setting after the other."""
    total = 256 << 20 if is_gpu else 4 << 20
    flat = jnp.zeros(total // 4, jnp.int32)
    copy_s = in_a_row_s(lambda: jnp.copy(flat))
    yield "device_copy", {"mib": total >> 20, "gb_per_s": total / copy_s / 1e9}
    for page_kib in PAGE_KIB:
        yield f"pages_{page_kib}_kib", pages(page_kib << 10, total, is_gpu)
    for num_ids in PART_PAGES if is_gpu else PART_PAGES[:1]:
        yield f"layers_{LAYERS}_pages_{num_ids}", layers(num_ids if is_gpu else 4, is_gpu)


def pages(page_bytes: int, total: int, is_gpu: bool) -> Figures:
    """Half of a pool, in random order."""
    num_ids = total // page_bytes
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.permutation(2 * num_ids)[:num_ids], jnp.int32)
    pool = jnp.asarray(rng.integers(0, 1 << 30, (2 * num_ids, page_bytes // 4)), jnp.int32)
    staged = pool[:num_ids] + 1
    forms: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "xla": (gather_pages_reference, scatter_pages_reference)
    }
    if is_gpu:
        forms["pallas"] = (gather_pages, scatter_pages)
    figures: Figures = {"num_pages": num_ids}
    for form, (gather, scatter) in forms.items():
        copy_s = in_a_row_s(lambda: jnp.copy(staged))
        gather, scatter = jax.jit(gather), jax.jit(scatter, donate_argnums=0)
        gather_s = in_a_row_s(lambda gather=gather, pool=pool: gather(pool, ids))
        scatter_s, pool = donating_s(lambda pool, scatter=scatter: scatter(pool, ids, staged), pool)
        figures |= {
            f"gather_{form}_gb_per_s": total / gather_s / 1e9,
            f"gather_{form}_of_copy": copy_s / gather_s,
            f"scatter_{form}_gb_per_s": total / scatter_s / 1e9,
            f"scatter_{form}_of_copy": copy_s / scatter_s,
        }
    return figures


def layers(num_ids: int, is_gpu: bool) -> Figures:
    """LAYERS arrays of parts against one array of as many bytes a page."""
    rng = np.random.default_rng(0)
    num_pages = 2 * num_ids
    ids = jnp.asarray(rng.permutation(num_pages)[:num_ids], jnp.int32)
    parts = [jnp.asarray(rng.integers(0, 99, (num_pages, *PART_SHAPE)), jnp.bfloat16) for _ in range(LAYERS)]
    stacked = jnp.stack(parts, axis=1)
    staged = stacked[:num_ids] + 1
    gather, scatter = jax.jit(gather_pages_reference), jax.jit(scatter_pages_reference, donate_argnums=0)
    stacked_gather_s = in_a_row_s(lambda: gather(stacked, ids))
    stacked_scatter_s, _ = donating_s(lambda pool: scatter(pool, ids, staged), stacked)
    figures: Figures = {"mib": staged.nbytes >> 20, "stacked_gather_us": stacked_gather_s * 1e6}
    figures["stacked_scatter_us"] = stacked_scatter_s * 1e6
    forms: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "xla": (gather_layers_reference, scatter_layers_reference)
    }
    if is_gpu:
        forms["pallas"] = (gather_layers, scatter_layers)
    for form, (gather_all, scatter_all) in forms.items():
        gather, scatter = jax.jit(gather_all), jax.jit(scatter_all, donate_argnums=0)
        gather_s = in_a_row_s(lambda gather=gather, parts=parts: gather(parts, ids))
        scatter_s, parts = donating_s(lambda parts, scatter=scatter: scatter(parts, ids, staged), parts)
        figures |= {
            f"gather_{form}_us": gather_s * 1e6,
            f"gather_{form}_to_stacked": gather_s / stacked_gather_s,
            f"scatter_{form}_us": scatter_s * 1e6,
            f"scatter_{form}_to_stacked": scatter_s / stacked_scatter_s,
        }
    return figures
