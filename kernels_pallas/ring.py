"""Copies boxes from place to place in device memory, through a ring of slots in the shared memory of each block.

    block b takes items b, b + blocks, b + 2 * blocks ...

    slot 0   | load 0 ....| store 0 ...|            | load 4 ....
    slot 1   | load 1 ....|    | store 1 ...|            | load 5
    slot 2   | load 2 ....|         | store 2 ...|
    slot 3   | load 3 ....|              | store 3 ...|

A slot is filled again once the store out of it has read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Ref = Any  # of Pallas
BLOCK_AXIS = "block"


class Boxes(NamedTuple):
    """What to copy: items 0 to num_items - 1, each a box.

    is_wanted:      whether an item is copied; the same answer whenever it is asked
    source, target: where an item's box is, and where it goes
    """

    num_items: int
    is_wanted: Callable[[jax.Array], jax.Array]
    source: Callable[[jax.Array], Ref]
    target: Callable[[jax.Array], Ref]


@dataclass(frozen=True)
class Ring:
    """blocks: at most so many run; slots: of each, for a box of at most `box_bytes` each.

    layers: of one launch, where a pool is a list of layers; compiling takes longer than in proportion to it
    """

    blocks: int = 132  # the multiprocessors of an H100 or H200
    slots: int = 4
    box_bytes: int = 32 * 1024
    layers: int = 16

    def kernel(
        self,
        boxes: Callable[..., Boxes],
        num_items: int,
        box_shape: tuple[int, int],
        dtype: Any,
        interpret: Any,
        out_type: Any = (),
    ) -> Callable[..., Any]:
        """A kernel that copies what `boxes` makes of its references: operands, then outputs.

        interpret: parameters of Pallas's interpreter; None compiles for the GPU
        """
        blocks = min(self.blocks, num_items)

        def body(*refs: Ref) -> None:
            *others, slots, barriers = refs
            self.copy(boxes(*others), blocks, slots, barriers)

        body.__name__ = boxes.__name__  # which a profile shows
        return plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=self.scratch(box_shape, dtype),
            grid=(blocks,),
            grid_names=(BLOCK_AXIS,),
            interpret=interpret,
        )

    def scratch(self, box_shape: tuple[int, int], dtype: Any) -> Sequence[Any]:
        """What `copy` takes as `slots` and `barriers`."""
        return [plgpu.SMEM((self.slots, *box_shape), dtype), plgpu.Barrier(num_barriers=self.slots)]

    def copy(self, boxes: Boxes, blocks: int, slots: Ref, barriers: Ref) -> None:
        """In a kernel on an axis of so many blocks: this block's share."""
        turns, lead = pl.cdiv(boxes.num_items, blocks), self.slots - 1
        block = lax.axis_index(BLOCK_AXIS)

        def in_turn(turn: jax.Array) -> tuple[jax.Array, jax.Array]:
            """The item, and whether there is one."""
            item = block + turn * blocks
            inside = lax.clamp(0, item, boxes.num_items - 1)
            return inside, (item >= 0) & (item < boxes.num_items) & boxes.is_wanted(inside)

        def take_turn(ahead: jax.Array, _: None) -> None:
            """Starts the load of one turn, and the store of the turn `lead` before it."""
            item, wanted = in_turn(ahead)
            slot = lax.rem(ahead, self.slots)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the last store was out of this slot

            @pl.when(wanted)
            def _():
                plgpu.copy_gmem_to_smem(boxes.source(item), slots.at[slot], barriers.at[slot])

            loaded, was_wanted = in_turn(ahead - lead)
            oldest = lax.rem(ahead + 1, self.slots)

            @pl.when(was_wanted)
            def _():
                plgpu.barrier_wait(barriers.at[oldest])
                plgpu.copy_smem_to_gmem(slots.at[oldest], boxes.target(loaded))

        lax.fori_loop(0, turns + lead, take_turn, None)
        plgpu.wait_smem_to_gmem(0)


DEFAULT_RING = Ring()  # as good as any on an H100: benchmarks/results
