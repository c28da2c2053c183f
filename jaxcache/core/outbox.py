"""The transfers that the core has planned and the runtime must now do. Ids are consecutive, and equal on every rank."""

from __future__ import annotations

from jaxcache.core.decisions import Decisions
from jaxcache.types import Move, Plan, Transfer, TransferKind

NOTHING_TO_DO = Plan(())


class Outbox:
    """transfers: since the last `take`."""

    def __init__(self, decisions: Decisions):
        self.transfers: list[Transfer] = []
        self._decisions = decisions
        self._last_id = 0

    def add(self, kind: TransferKind, moves: tuple[Move, ...]) -> int:
        self._last_id += 1
        self.transfers.append(Transfer(self._last_id, kind, self._decisions.step, moves))
        self._decisions.note(kind.name, self._last_id, sum(len(m.src_page_ids) for m in moves), len(moves))
        return self._last_id

    def take(self) -> Plan:
        if not self.transfers:
            return NOTHING_TO_DO
        plan = Plan(tuple(self.transfers))
        self.transfers.clear()
        return plan
