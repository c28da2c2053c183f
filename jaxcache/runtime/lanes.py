"""What ranks tell each other in one step, packed into one small vector of which every lane is reduced as a minimum.

    | digest: d, ~d (low and high half) | ok | slot 0 | slot 1 | ... | clock |
    |<------------- unanimous: minimum over all ranks ------------->| leader: stage 0's minimum |
    slot = | id, ~id | done | quiet | smallest end, ~largest end | good pages, by component ... |
                                                       one per live storage transfer, in the order of their ids

A maximum is ~min(~x), and all ranks hold the same x if min(x) == ~min(~x). An absent slot is neutral in every lane, and
its id differs from every id; what a rank does not know of a live transfer is a zero. Pure numpy; knows no mesh.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from jaxcache.types import CLOCK_MODULUS, Outcome, RanksDiverged, TransferFault

Row = np.ndarray  # int32[num_lanes]

NEUTRAL = np.iinfo(np.int32).max
ID_MODULUS = NEUTRAL  # so that no id is NEUTRAL
DIGEST_LANES = 4
OK_LANE = DIGEST_LANES
FIRST_SLOT = OK_LANE + 1
ID, NOT_ID, DONE, QUIET, SMALLEST_END, NOT_LARGEST_END, PAGES = range(7)  # within a slot
NUM_LEADER_LANES = 1


@dataclass(frozen=True)
class Lanes:
    """Where everything is; equal on every rank.

    components: names, in the order of their lanes
    max_live:   slots
    """

    components: tuple[str, ...]
    max_live: int

    @cached_property
    def slot_lanes(self) -> int:
        return PAGES + len(self.components)

    @cached_property
    def num_unanimous(self) -> int:
        return FIRST_SLOT + self.max_live * self.slot_lanes

    @property
    def num_lanes(self) -> int:
        return self.num_unanimous + NUM_LEADER_LANES

    def pack(self, digest: int, outcomes: Mapping[int, Outcome], clock_ms: int, ok: bool) -> Row:
        """One rank's row.

        digest:   of 64 bits
        outcomes: of the live transfers, by id
        """
        assert len(outcomes) <= self.max_live, f"{len(outcomes)=} live transfers for {self.max_live=} slots"
        lanes = [*digest_lanes(digest), int(ok)]
        for transfer_id in sorted(outcomes):
            lanes += self._slot(transfer_id, outcomes[transfer_id])
        row = array("i", lanes)
        row += self._absent_slots[: self.num_unanimous - len(row)]
        row.append(clock_ms % CLOCK_MODULUS)
        return np.frombuffer(row, np.int32)

    def unpack(self, row: Row, step: int, digest: int, outcomes: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """What all ranks agreed on, given what this one said.

        RanksDiverged: the digests or the live transfers differ; TransferFault: some rank's copy failed
        """
        live_ids, size = sorted(outcomes), self.slot_lanes
        end = FIRST_SLOT + len(live_ids) * size
        lanes = row[:end].tolist()
        _check_digest(lanes, step, digest)
        if not lanes[OK_LANE]:
            raise TransferFault(f"{step=}: a copy between device and host failed on some rank")
        slots = [lanes[at : at + size] for at in range(FIRST_SLOT, end, size)]
        is_absent = self._absent_slots.tobytes().startswith(row[end : self.num_unanimous].tobytes())
        if not is_absent or any(slot[ID] != ~slot[NOT_ID] for slot in slots):
            raise self._differing_ids(row, step, live_ids)
        return {id: self._outcome(slot) for id, slot in zip(live_ids, slots, strict=True)}

    def clock_ms(self, row: Row) -> int:
        """The leader's clock, modulo CLOCK_MODULUS."""
        return int(row[self.num_unanimous])

    @cached_property
    def _absent_slots(self) -> array:
        slot = [NEUTRAL] * self.slot_lanes
        slot[NOT_ID] = ~NEUTRAL
        return array("i", slot * self.max_live)

    def _differing_ids(self, row: Row, step: int, live_ids: Sequence[int]) -> RanksDiverged:
        slots = row[FIRST_SLOT : self.num_unanimous].reshape(self.max_live, self.slot_lanes)
        smallest, largest = slots[:, ID], ~slots[:, NOT_ID]
        bad = int(np.argmax(smallest != largest))
        return RanksDiverged(
            f"{step=}: this rank's live transfers are {list(live_ids)}, "
            f"slot {bad} holds ids from {smallest[bad]} to {largest[bad]} ({NEUTRAL}: none)"
        )

    def _slot(self, transfer_id: int, outcome: Outcome) -> list[int]:
        low = transfer_id % ID_MODULUS
        pages = [outcome.pages.get(name, 0) for name in self.components]
        return [low, ~low, outcome.done, outcome.quiet, outcome.smallest_end, ~outcome.largest_end, *pages]

    def _outcome(self, slot: list[int]) -> Outcome:
        _, _, done, quiet, smallest_end, not_largest_end, *pages = slot
        by_component = dict(zip(self.components, pages, strict=True))
        return Outcome(bool(done), bool(quiet), by_component, smallest_end, ~not_largest_end)


def digest_lanes(digest: int) -> list[int]:
    """A 64-bit digest as four int32: low and high half, then their complements."""
    low, high = struct.unpack("<ii", struct.pack("<Q", digest & (2**64 - 1)))
    return [low, high, ~low, ~high]


def are_equal(lanes: Sequence[int] | Row) -> bool:
    """Whether the digests, which are the first lanes of a reduced row, were the same on all ranks."""
    return bool(lanes[0] == ~lanes[2] and lanes[1] == ~lanes[3])


def _check_digest(lanes: list[int], step: int, digest: int) -> None:
    if not are_equal(lanes):
        low, high = _hex(lanes[0], lanes[1]), _hex(~lanes[2], ~lanes[3])
        raise RanksDiverged(f"{step=}: this rank's digest is {digest:#018x}, all ranks' halves lie in [{low}, {high}]")


def _hex(low: int, high: int) -> str:
    return f"{int.from_bytes(struct.pack('<ii', low, high), 'little'):#018x}"
