"""One rank of the simulation: the core, the engine and the loop of the product, on a virtual plane.

step      what was agreed in the step before -> the controller's step -> what this rank says now
exchange  what all ranks say -> what each of them gets in the next step
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxcache.agreement import reduction
from jaxcache.agreement.agreement import Agreement
from jaxcache.agreement.lanes import AgreedReport, Lanes
from jaxcache.agreement.peers import Peers, ProcessReport
from jaxcache.agreement.reduction import Reduction, never
from jaxcache.core.prefetch import Prefetch
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.engine.rates import Rates
from jaxcache.engine.transfer_engine import TransferEngine
from jaxcache.runtime.controller import Controller
from jaxcache.testing.chance import mix
from jaxcache.testing.virtual_plane import VirtualPlane
from jaxcache.types import Outcome, RanksDiverged, RankUnresponsive, ServingEnded, Transfer, TransferFault, TransferKind

STORE_SHARES = (1.0, 1.0, 0.3, 0.05)
WRITERS = (TransferKind.BACKUP, TransferKind.FETCH)  # of host pages


class VirtualRank:
    """num_processes: of the fleet, each with one rank."""

    def __init__(
        self, core: PrefixCache, plane: VirtualPlane, lanes: Lanes, num_processes: int, store_share: float = 1.0
    ):
        self.core, self.plane, self.lanes = core, plane, lanes
        delays = plane.delays
        self.engine = TransferEngine(
            plane,
            plane.parts(),
            None,
            delays.deadline_us / 1e6,
            delays.num_threads,
            core.config.page_tokens,
            store_share,
            delays.rest_us / 1e6,
            delays.piece_pages,
        )
        if delays.declines:
            self.engine.rates = DrawnRates(plane)
        self._reduction = Exchanged()
        self.agreement = WatchedAgreement(lanes, self._reduction, self.engine)
        self.controller = Controller(core, self.engine, self.agreement, SilentPeers(num_processes))
        self._found: dict[Prefetch, dict[str, set[bytes]]] = {}  # what QUERYs have found, until the FETCH

    # ---- the loop

    def step(self, reduced: np.ndarray | None) -> bytes | None:
        """reduced: the row of the step before, or None; returns this rank's row, or None without an exchange."""
        self.plane.storage.step = self.core.step_number
        self._check_stored()
        self._reduction.said, self._reduction.reduced = None, None if reduced is None else reduced.tobytes()
        self.controller.step()
        self._note_answers()
        return self._reduction.said

    def apply(self) -> None:
        """Raises what a check of the plane has raised, rather than that the plan was not carried out."""
        if self.core.outbox.transfers:
            self._check_planned()
        try:
            self.plane.pools = self.controller.apply(self.plane.pools)
        except TransferFault as fault:
            if isinstance(fault.__cause__, AssertionError):
                raise fault.__cause__ from None
            raise

    def attach(self) -> None:
        self.core.attachment.attach()
        self.engine.set_storage(self.plane.storage)

    def detach(self) -> None:
        self.core.attachment.detach()
        self.engine.set_storage(None)

    def forget_device(self) -> None:
        """The device and all that is on its way to it are lost."""
        self.core.forget_device()
        self.engine.forget_device()

    # ---- what must hold

    def check_failures(self) -> None:
        """L8: whatever a worker raises is a miss, so a mistake of the engine would look like one of storage."""
        failures, refused = self.engine.stats().get("storage_failures", 0), self.plane.storage.num_refused
        assert failures == refused, f"rank {self.plane.rank}: {failures} jobs of storage failed, {refused} calls did"

    def _check_stored(self) -> None:
        wrong = self.plane.storage.wrong
        assert not wrong, wrong[0]

    def _check_planned(self) -> None:
        """I5: nothing ever waits for storage to let go of a host page: it is used again when all ranks are quiet."""
        for transfer in self.core.outbox.transfers:
            if transfer.kind is TransferKind.FETCH:
                self._check_found(transfer)
            is_writer = transfer.kind in WRITERS
            for move in transfer.moves if transfer.kind is not TransferKind.QUERY else ():
                order = self.engine.orders[move.component]
                after = order.before_write(move.dst_page_ids) if is_writer else order.before_read(move.src_page_ids)
                for job in after:
                    assert self.engine.copies.is_open(job), (
                        f"I5: rank {self.plane.rank}: {transfer.kind.name} {transfer.id} uses host pages of "
                        f"{move.component} that a storage transfer may still touch"
                    )

    def _note_answers(self) -> None:
        """Of QUERYs that were answered, for the FETCH of the same prefetch."""
        live = self.core.prefetches.live
        for id, operation in self.engine.storage_io.live.items():
            if operation.transfer.kind is TransferKind.QUERY and operation.is_done and id in live:
                self._found = {other: found for other, found in self._found.items() if not other.is_over}
                exists = operation.status().exists or {}
                self._found[live[id]] = {
                    move.component: {
                        key for key, there in zip(move.page_keys, exists[move.component], strict=True) if there
                    }
                    for move in operation.transfer.moves
                }

    def _check_found(self, fetch: Transfer) -> None:
        """L3: the end that was agreed on needs nothing that this rank has not found."""
        prefetch = self.core.prefetches.live[fetch.id]
        found = self._found.pop(prefetch, {})
        for move in fetch.moves if not prefetch.is_over else ():
            lacking = [key for key in move.page_keys if key not in found.get(move.component, ())]
            assert not lacking, (
                f"L3: rank {self.plane.rank} is to read {move.component}, of which it lacks {len(lacking)}"
            )


class WatchedAgreement(Agreement):
    """The agreement, and a check that nothing which is still under way here was taken for done or quiet."""

    def __init__(self, lanes: Lanes, reduction: Reduction, engine: TransferEngine[VirtualPlane]):
        super().__init__(lanes, reduction)
        self.engine = engine

    def read(self, timeout_s: float, is_reported: Callable[[], bool] = never) -> AgreedReport | None:
        agreed = super().read(timeout_s, is_reported)
        if agreed is not None and agreed.outcomes:
            self._check(agreed.outcomes)
        return agreed

    def _check(self, agreed: Mapping[int, Outcome]) -> None:
        rank, live = self.engine.effects.rank, self.engine.storage_io.live
        for id, outcome in agreed.items():
            if outcome.done or outcome.quiet:
                here = live[id].status()
                assert here.done or not outcome.done, f"R4: rank {rank}: {id} is not done, but taken for it"
                assert here.quiet or not outcome.quiet, f"L6: rank {rank}: {id} is not quiet"


class Exchanged(Reduction):
    """said: this rank's row. reduced: what `Exchange` has made of the rows of the step before."""

    num_ranks = 1

    def __init__(self):
        self.said: bytes | None = None
        self.reduced: bytes | None = None

    def start(self, rows: np.ndarray) -> None:
        self.said = rows[0].tobytes()

    def finish(self, timeout_s: float, is_reported: Callable[[], bool] = never) -> bytes:
        assert self.reduced is not None, "X7: this rank said something, and nothing came back"
        return self.reduced


class DrawnRates(Rates):
    """Now and then computing is faster, on each rank for itself."""

    def __init__(self, plane: VirtualPlane):
        super().__init__(plane.now)
        self.plane = plane

    def pays(self, query_id: int) -> bool:
        drawn = mix(self.plane.delays.seed, self.plane.rank, query_id) % 128 > 0
        return super().pays(query_id) and drawn


class SilentPeers(Peers):
    """Ranks of one simulation: it sees all that goes wrong itself."""

    def __init__(self, num_processes: int):
        self.processes, self.process = range(num_processes), 0

    @property
    def wait_s(self) -> float:
        return math.inf

    def is_reported(self) -> bool:
        return False

    def wait_for(self, arrays: Sequence[Any]) -> None:
        pass

    def watch(self, state: Callable[[], ProcessReport]) -> None:
        pass

    def fault(self, error: ServingEnded, state: ProcessReport, is_own: bool = True) -> ServingEnded:
        return error

    def unresponsive(self, what: str, error: RankUnresponsive, state: ProcessReport) -> RankUnresponsive:
        return error

    def diverged(self, error: RanksDiverged, state: ProcessReport) -> RanksDiverged:
        return error

    def give_up(self, error: Exception, state: ProcessReport) -> None:
        pass

    def failures(self, own: str) -> list[str]:
        return []

    def close(self) -> None:
        pass


class Exchange:
    """Between the ranks of a mesh: the reduction of the product, one row per rank.

    mesh_shape: {"cp": n, "tp": n, "pp": n}; ranks are counted in the order of the mesh
    """

    def __init__(self, mesh_shape: dict[str, int], num_unanimous: int):
        self.mesh_shape, self.num_unanimous = mesh_shape, num_unanimous

    def reduce(self, rows: Sequence[bytes | None]) -> np.ndarray | None:
        """What every rank gets for what each has said: int32[num_ranks, num_lanes]. None if none says anything.

        rows: the lanes of each rank, packed
        Some saying nothing is an AssertionError: the others would wait for ever.
        """
        silent = [rank for rank, row in enumerate(rows) if row is None]
        assert len(silent) in (0, len(rows)), f"X7: ranks {silent} take no part in the exchange, the others wait"
        if silent:
            return None
        stacked = np.frombuffer(b"".join(row for row in rows if row is not None), np.int32).reshape(len(rows), -1)
        return np.broadcast_to(reduction.reduce_rows(stacked, self.mesh_shape, self.num_unanimous), stacked.shape)
