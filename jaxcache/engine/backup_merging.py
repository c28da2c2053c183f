"""Turns the BACKUPs of one step into few, without changing what anyone can see.

BACKUP a, BACKUP b, LOAD_BACK c, BACKUP d  ->  BACKUP a+b, LOAD_BACK c, BACKUP d
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxcache.types import Move, Transfer, TransferKind


def merged(transfers: Sequence[Transfer]) -> list[Transfer]:
    """The same transfers, with neighbouring BACKUPs joined while no host page is written twice.

    A source is a device page and a destination a host page, so no source can be an earlier destination; and nothing
    is moved across another kind.
    """
    result: list[Transfer] = []
    for transfer in transfers:
        if result and _may_join(result[-1], transfer):
            result[-1] = _joined(result[-1], transfer)
        else:
            result.append(transfer)
    return result


def _may_join(first: Transfer, second: Transfer) -> bool:
    if first.kind is not TransferKind.BACKUP or second.kind is not TransferKind.BACKUP:
        return False
    written = {(move.component, page_id) for move in first.moves for page_id in move.dst_page_ids.tolist()}
    return not any(
        (move.component, page_id) in written for move in second.moves for page_id in move.dst_page_ids.tolist()
    )


def _joined(first: Transfer, second: Transfer) -> Transfer:
    moves: dict[str, list[Move]] = {}
    for move in (*first.moves, *second.moves):
        moves.setdefault(move.component, []).append(move)
    return Transfer(first.id, first.kind, first.step, tuple(_joined_move(name, parts) for name, parts in moves.items()))


def _joined_move(component: str, parts: list[Move]) -> Move:
    src = np.concatenate([part.src_page_ids for part in parts])
    dst = np.concatenate([part.dst_page_ids for part in parts])
    return Move(component, src, dst)
