"""What ranks tell each other in one step, packed into one small vector of which every lane is reduced as a minimum.

    | digest: d, ~d (low and high half) | ok | slot 0 | slot 1 | ... | clock |
    |<------------- unanimous: minimum over all ranks ------------->| leader: stage 0's minimum |
    slot = | id, ~id | done | quiet | units ... |      one per live storage transfer, in the order of their ids
    units = FETCH, STORE: good pages by component      QUERY: smallest end, ~largest end

A maximum is ~min(~x), and all ranks hold the same x if min(x) == ~min(~x). An absent slot is neutral in every lane, and
its id differs from every id. Pure numpy; knows no mesh.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxcache.types import CLOCK_MODULUS, Outcome, RanksDiverged, TransferFault

Row = np.ndarray  # int32[num_lanes]

NEUTRAL = np.iinfo(np.int32).max
ID_MODULUS = NEUTRAL  # so that no id is NEUTRAL
DIGEST_LANES = 4
OK_LANE = DIGEST_LANES
FIRST_SLOT = OK_LANE + 1
ID, NOT_ID, DONE, QUIET, UNITS = range(5)  # within a slot
NUM_LEADER_LANES = 1


@dataclass(frozen=True)
class Lanes:
    """Where everything is; equal on every rank.

    components: names, in the order of their lanes
    max_live:   slots
    """

    components: tuple[str, ...]
    max_live: int

    @property
    def num_units(self) -> int:
        return max(2, len(self.components))

    @property
    def slot_lanes(self) -> int:
        return UNITS + self.num_units

    @property
    def num_unanimous(self) -> int:
        return FIRST_SLOT + self.max_live * self.slot_lanes

    @property
    def num_lanes(self) -> int:
        return self.num_unanimous + NUM_LEADER_LANES

    def pack(self, digest: int, outcomes: Mapping[int, Outcome], clock_ms: int, ok: bool) -> Row:
        """One rank's row.

        digest:   of 64 bits
        outcomes: of the live transfers, by id; an outcome without pages is a QUERY's
        """
        assert len(outcomes) <= self.max_live, f"{len(outcomes)=} live transfers for {self.max_live=} slots"
        row = np.full(self.num_lanes, NEUTRAL, np.int32)
        row[:DIGEST_LANES] = digest_lanes(digest)
        row[OK_LANE] = int(ok)
        slots = self._slots(row)
        slots[:, NOT_ID] = ~NEUTRAL
        for slot, transfer_id in zip(slots, sorted(outcomes), strict=False):
            self._pack_slot(slot, transfer_id, outcomes[transfer_id])
        row[self.num_unanimous] = clock_ms % CLOCK_MODULUS
        return row

    def unpack(self, row: Row, step: int, digest: int, outcomes: Mapping[int, Outcome]) -> dict[int, Outcome]:
        """What all ranks agreed on, given what this one said.

        RanksDiverged: the digests or the live transfers differ; TransferFault: some rank's copy failed
        """
        self._check_digest(row, step, digest)
        if not row[OK_LANE]:
            raise TransferFault(f"{step=}: a copy between device and host failed on some rank")
        slots = self._slots(row)
        _check_ids(slots, step, sorted(outcomes))
        return {
            transfer_id: self._unpack_slot(slot, outcomes[transfer_id])
            for slot, transfer_id in zip(slots, sorted(outcomes), strict=False)
        }

    def clock_ms(self, row: Row) -> int:
        """The leader's clock, modulo CLOCK_MODULUS."""
        return int(row[self.num_unanimous])

    def _slots(self, row: Row) -> np.ndarray:
        """A view [max_live, slot_lanes]."""
        return row[FIRST_SLOT : self.num_unanimous].reshape(self.max_live, self.slot_lanes)

    def _pack_slot(self, slot: Row, transfer_id: int, outcome: Outcome) -> None:
        low = transfer_id % ID_MODULUS
        slot[[ID, NOT_ID]] = low, ~low
        slot[[DONE, QUIET]] = outcome.done, outcome.quiet
        units = slot[UNITS:]
        if outcome.pages:
            units[: len(self.components)] = [outcome.pages.get(name, 0) for name in self.components]
        else:
            units[:2] = outcome.smallest_end, ~outcome.largest_end

    def _unpack_slot(self, slot: Row, own: Outcome) -> Outcome:
        done, quiet, units = bool(slot[DONE]), bool(slot[QUIET]), slot[UNITS:].tolist()
        if own.pages:
            agreed = dict(zip(self.components, units, strict=False))
            return Outcome(done, quiet, {name: agreed[name] for name in own.pages})
        return Outcome(done, quiet, {}, units[0], ~units[1])

    def _check_digest(self, row: Row, step: int, digest: int) -> None:
        smallest, largest = row[: DIGEST_LANES // 2], ~row[DIGEST_LANES // 2 : DIGEST_LANES]
        if np.array_equal(smallest, largest):
            return
        low, high = (_hex(part) for part in (smallest, largest))
        raise RanksDiverged(f"{step=}: this rank's digest is {digest:#018x}, all ranks' halves lie in [{low}, {high}]")


def digest_lanes(digest: int) -> np.ndarray:
    """A 64-bit digest as int32[4]: low and high half, then their complements."""
    halves = np.array([digest & (2**64 - 1)], np.uint64).view(np.int32)
    return np.concatenate([halves, ~halves])


def _check_ids(slots: np.ndarray, step: int, live_ids: Sequence[int]) -> None:
    smallest, largest = slots[:, ID], ~slots[:, NOT_ID]
    if not np.array_equal(smallest, largest):
        bad = int(np.argmax(smallest != largest))
        raise RanksDiverged(
            f"{step=}: this rank's live transfers are {list(live_ids)}, "
            f"slot {bad} holds ids from {smallest[bad]} to {largest[bad]} ({NEUTRAL}: none)"
        )


def _hex(halves: np.ndarray) -> str:
    return f"{int(np.ascontiguousarray(halves).view(np.uint64)[0]):#018x}"
