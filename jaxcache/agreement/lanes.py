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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

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
LANE_BYTES = 4
DIGEST_BYTES = DIGEST_LANES * LANE_BYTES
DIGEST, CLOCK = struct.Struct("=QQ"), struct.Struct("=i")
DIGEST_MASK = 2**64 - 1
OK, NOT_OK = struct.pack("=i", 1), struct.pack("=i", 0)
_new = tuple.__new__  # what a NamedTuple's constructor, which is written in Python, comes to


class LocalReport(NamedTuple):
    """What this rank said in a step.

    outcomes: of the live transfers, by id, in the order of their slots
    packed:   the same, as the bytes of a row
    """

    step: int
    digest: int
    outcomes: Mapping[int, Outcome]
    packed: bytes

    @property
    def row(self) -> Row:
        return np.frombuffer(self.packed, np.int32)


class AgreedReport(NamedTuple):
    """What all ranks know since `step`: outcomes by transfer id, and stage 0's clock, which wraps after 31 bits."""

    step: int
    outcomes: Mapping[int, Outcome]
    clock_ms: int


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

    def pack(self, step: int, digest: int, outcomes: Mapping[int, Outcome], clock_ms: int, ok: bool) -> LocalReport:
        """What this rank says.

        digest:   of 64 bits
        outcomes: of the live transfers, by id
        """
        assert len(outcomes) <= self.max_live, f"{len(outcomes)=} live transfers for {self.max_live=} slots"
        outcomes = {id: outcomes[id] for id in sorted(outcomes)}
        parts = [digest_lanes(digest), OK if ok else NOT_OK]
        parts += [self._slot(id, outcome) for id, outcome in outcomes.items()]
        parts.append(self._absent_slots[: (self.max_live - len(outcomes)) * self._slot_struct.size])
        parts.append(CLOCK.pack(clock_ms % CLOCK_MODULUS))
        return LocalReport(step, digest, outcomes, b"".join(parts))

    def unpack(self, agreed: bytes, said: LocalReport) -> AgreedReport:
        """What all ranks agreed on, given what this one said; if that is the same, as it often is, nothing is unpacked.

        agreed: the reduced row, int32[num_lanes]
        Caches are cold here, a model step has just run: what costs is every piece of code that this touches.
        RanksDiverged: the digests or the live transfers differ; TransferFault: some rank's copy failed
        """
        own = said.packed
        if not agreed.startswith(own[:DIGEST_BYTES]):
            raise _differing_digests(agreed, said)
        if not agreed.startswith(OK, DIGEST_BYTES):
            raise TransferFault(f"step={said.step}: a copy between device and host failed on some rank")
        is_same = agreed.startswith(own[:-LANE_BYTES])  # but for the clock
        outcomes = said.outcomes if is_same else self._unpack_slots(agreed, said)
        return _new(AgreedReport, (said.step, outcomes, CLOCK.unpack_from(agreed, len(agreed) - LANE_BYTES)[0]))

    def _unpack_slots(self, agreed: bytes, said: LocalReport) -> dict[int, Outcome]:
        outcomes, at, own, slot = {}, FIRST_SLOT * LANE_BYTES, said.packed, self._slot_struct
        for id, outcome in said.outcomes.items():
            end = at + slot.size
            if agreed[at:end] != own[at:end]:
                lanes = slot.unpack_from(agreed, at)
                if lanes[ID] != ~lanes[NOT_ID]:
                    raise self._differing_ids(agreed, said)
                pages = dict(zip(self.components, lanes[PAGES:]))  # noqa: B905 -- being strict takes 7 us when cold
                by_all = (lanes[DONE] != 0, lanes[QUIET] != 0, pages, lanes[SMALLEST_END], ~lanes[NOT_LARGEST_END])
                outcome = _new(Outcome, by_all)
            outcomes[id] = outcome
            at = end
        if agreed[at:-LANE_BYTES] != own[at:-LANE_BYTES]:
            raise self._differing_ids(agreed, said)
        return outcomes

    @cached_property
    def _slot_struct(self) -> struct.Struct:
        return struct.Struct(f"={self.slot_lanes}i")

    @cached_property
    def _absent_slots(self) -> bytes:
        slot = [NEUTRAL] * self.slot_lanes
        slot[NOT_ID] = ~NEUTRAL
        return self._slot_struct.pack(*slot) * self.max_live

    def _differing_ids(self, agreed: bytes, said: LocalReport) -> RanksDiverged:
        slots = np.frombuffer(agreed, np.int32)[FIRST_SLOT : self.num_unanimous].reshape(self.max_live, self.slot_lanes)
        smallest, largest = slots[:, ID], ~slots[:, NOT_ID]
        bad = int(np.argmax(smallest != largest))
        return RanksDiverged(
            f"step={said.step}: this rank's live transfers are {list(said.outcomes)}, "
            f"slot {bad} holds ids from {smallest[bad]} to {largest[bad]} ({NEUTRAL}: none)"
        )

    def _slot(self, transfer_id: int, outcome: Outcome) -> bytes:
        low = transfer_id % ID_MODULUS
        done, quiet, pages, smallest_end, largest_end = outcome
        counts = [pages.get(name, 0) for name in self.components] if pages else self._no_pages
        return self._slot_struct.pack(low, ~low, done, quiet, smallest_end, ~largest_end, *counts)

    @cached_property
    def _no_pages(self) -> list[int]:
        return [0] * len(self.components)


def digest_lanes(digest: int) -> bytes:
    """Four lanes for 64 bits: low and high half, then their complements."""
    digest &= DIGEST_MASK
    return DIGEST.pack(digest, digest ^ DIGEST_MASK)


def are_equal(row: Row) -> bool:
    """Whether the digests, which are the first lanes of a reduced row, were the same on all ranks."""
    return bool(row[0] == ~row[2] and row[1] == ~row[3])


def _differing_digests(agreed: bytes, said: LocalReport) -> RanksDiverged:
    lanes = np.frombuffer(agreed, np.int32, DIGEST_LANES).tolist()
    low, high = _hex(lanes[0], lanes[1]), _hex(~lanes[2], ~lanes[3])
    return RanksDiverged(
        f"step={said.step}: this rank's digest is {said.digest:#018x}, all ranks' halves lie in [{low}, {high}]"
    )


def _hex(low: int, high: int) -> str:
    return f"{int.from_bytes(struct.pack('<ii', low, high), 'little'):#018x}"
