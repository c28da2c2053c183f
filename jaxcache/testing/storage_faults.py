"""What may go wrong with a storage, dealt by `mix`: the same seed, rank, key and step always meet the same fault.

of a page       lost      `exists` said yes, `get` says no
                corrupt   other bytes come than were put; the checksum sees it
                torn      a put died half-way; seen at the next read
of a transfer   short     only its leading pages come
                slow      every page takes many steps
                stalled   a page hangs: its transfer runs into the deadline, and much later the page is overwritten
                refused   storage raises; when that repeats, the breaker opens
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from jaxcache.testing.chance import mix, number_of
from jaxcache.types import Transfer

PAGE_FAULTS = ("lost", "corrupt", "torn")
TRANSFER_FAULTS = ("short", "slow", "stalled", "refused")
FAULTS = (*PAGE_FAULTS, *TRANSFER_FAULTS)
CARDS = 4096
PAGE_CARDS = 240  # of CARDS, each kind of fault of pages
TRANSFER_CARDS = 80
ALL_RANKS, LOTS = 64, 256  # so many of so many faults strike every rank
OUTAGE_STEPS, OUTAGES = 16, 64  # storage refuses everything for so many steps, once in so many times as long


class StorageFaults:
    """counts: how often each kind struck, once for every rank that it struck. rate: times the usual frequency."""

    def __init__(self, seed: int = 0, num_ranks: int = 1, kinds: Collection[str] = (), rate: float = 1.0):
        self.seed = seed
        self.num_ranks = num_ranks
        self.counts: Counter[str] = Counter()
        self._has_outages = "refused" in kinds
        self._page_cards = self._cards(PAGE_FAULTS, kinds, int(PAGE_CARDS * rate))
        self._transfer_cards = self._cards(TRANSFER_FAULTS, kinds, int(TRANSFER_CARDS * rate))

    @staticmethod
    def _cards(known: tuple[str, ...], kinds: Collection[str], number: int) -> list[str]:
        """The faults that can be drawn; all other cards are empty."""
        return [kind for kind in known if kind in kinds for _ in range(number)]

    def of_page(self, rank: int, step: int, key: bytes) -> str:
        """What strikes this page of a transfer that was planned in `step`; "" is nothing."""
        return self._draw(self._page_cards, rank, step, key) if self._page_cards else ""

    def of_transfer(self, rank: int, transfer: Transfer) -> str:
        if not self._transfer_cards:
            return ""
        if self._has_outages and not mix(self.seed, transfer.step // OUTAGE_STEPS) % OUTAGES:
            return "refused"
        key = next((move.page_keys[-1] for move in transfer.moves if move.page_keys), b"")
        return self._draw(self._transfer_cards, rank, transfer.step, key)

    def _draw(self, cards: list[str], rank: int, step: int, key: bytes) -> str:
        number = mix(self.seed, step, number_of(key))
        card = number % CARDS
        if card >= len(cards):
            return ""
        lot = number // CARDS % LOTS
        return cards[card] if lot < ALL_RANKS or lot % self.num_ranks == rank else ""

    def struck(self, kind: str) -> None:
        self.counts[kind] += 1


def fault_kinds(text: str) -> tuple[str, ...]:
    """`all`, `none` or a comma list. ValueError for a kind that does not exist."""
    if text in ("all", "none"):
        return FAULTS if text == "all" else ()
    kinds = tuple(text.split(","))
    for kind in kinds:
        if kind not in FAULTS:
            raise ValueError(f"{kind!r} is no fault: use all, none, or some of {', '.join(FAULTS)}")
    return kinds
