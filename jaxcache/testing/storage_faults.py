"""What may go wrong with a storage, dealt by `mix`: the same seed, rank, step, call and key always meet the same fault.

of a page       lost      `exists` said yes, `get` says no
                corrupt   other bytes come than were put; the checksum sees it
                torn      a put died half-way; seen at the next read
of any call     short     it does half: `exists` knows half of the keys, `get` fills half of the buffer, `put` does not
                slow      it takes many steps
                stalled   it hangs: its transfer runs into the deadline, and much later the page is overwritten
                refused   it raises; when that repeats, the breaker opens
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from jaxcache.testing.chance import mix, number_of

PAGE_FAULTS = ("lost", "corrupt", "torn")
CALL_FAULTS = ("short", "slow", "stalled", "refused")
FAULTS = (*PAGE_FAULTS, *CALL_FAULTS)
PAGE_FAULTS_OF = {"exists": (), "get": ("lost", "corrupt"), "put": ("torn",)}
NUM_DRAWS = 4096
DRAWS_PER_PAGE_FAULT = 240  # of NUM_DRAWS, each kind of fault of pages
DRAWS_PER_CALL_FAULT = 40
ALL_RANKS, LOTS = 64, 256  # so many of so many faults strike every rank
OUTAGE_STEPS, OUTAGES = 16, 64  # storage refuses everything for so many steps, once in so many times as long


class StorageFaults:
    """counts: how often each kind struck, once for every rank that it struck. rate: times the usual frequency."""

    def __init__(self, seed: int = 0, num_ranks: int = 1, kinds: Collection[str] = (), rate: float = 1.0):
        self.seed = seed
        self.num_ranks = num_ranks
        self.counts: Counter[str] = Counter()
        self._has_outages = "refused" in kinds
        of_calls = self._draws(CALL_FAULTS, kinds, int(DRAWS_PER_CALL_FAULT * rate))
        self._draws_of = {
            call: self._draws(own, kinds, int(DRAWS_PER_PAGE_FAULT * rate)) + of_calls
            for call, own in PAGE_FAULTS_OF.items()
        }

    @staticmethod
    def _draws(known: tuple[str, ...], kinds: Collection[str], number: int) -> list[str]:
        """The faults that can be drawn; all other draws are empty."""
        return [kind for kind in known if kind in kinds for _ in range(number)]

    def of_call(self, rank: int, step: int, call: str, page_key: bytes) -> str:
        """What strikes a call that is made in `step`; "" is nothing."""
        draws = self._draws_of[call]
        if not draws:
            return ""
        if self._has_outages and not mix(self.seed, step // OUTAGE_STEPS) % OUTAGES:
            return "refused"
        number = mix(self.seed, step, number_of(page_key), len(call))
        draw = number % NUM_DRAWS
        if draw >= len(draws):
            return ""
        lot = number // NUM_DRAWS % LOTS
        return draws[draw] if lot < ALL_RANKS or lot % self.num_ranks == rank else ""

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
