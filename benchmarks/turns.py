"""What states and windows cost where turns end: tokens that full attention alone would find, and are computed again.

    python -m benchmarks turns [--json FILE]

Conversations take turns on the real core, without a data plane: every prompt is all that was said before and new tokens
of the user; prefill chunks end at `Lease.next_stop`, decoding goes token by token, states are reported where they are
checkpointed. Full attention has room for everything, so that only windows and states are missing; of these there can be
few.

lost: of the tokens that the same turns find with full attention alone, how many are not found, in percent
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from jaxcache.command_options import STDOUT, prepare_json, write_json
from jaxcache.components import FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.config import CacheConfig
from jaxcache.core.lease import Lease
from jaxcache.core.prefix_cache import PrefixCache

TURNS = {"short": (20, 80), "middle": (250, 350), "long": (1700, 2300)}  # tokens of the user and of the answer together
PAGES = (16, 64, 256)
GRIDS = (1, 64, 128, 256, 512)  # RecurrentState.chunk_tokens
WINDOW_TOKENS = 512
ROOM = 1 << 15  # pages where nothing is to be missing
CHUNK_TOKENS = 512  # of a prompt, at most
SLOTS_OF_RUNNING = 3  # one that it writes, and two checkpoints
FEW = (2.0, 1.0, 0.5)
SYSTEM_TOKENS = 500


@dataclass(frozen=True)
class Workload:
    """Conversations of equal number of turns, `num_running` of them at a time. turn: a key of TURNS.

    system_tokens: that all conversations begin with
    slots_each:    state slots for every conversation, beside three for each that runs; None: more than can be used
    windows_each:  the same of windows, beside two and a chunk
    inserts_often: the loop publishes whenever `next_stop` is reached, also while decoding, as models/serve.py does;
                   else when a prompt is computed, and at the end
    """

    turn: str = "middle"
    num_conversations: int = 16
    num_turns: int = 8
    num_running: int = 3
    system_tokens: int = 0
    slots_each: float | None = None
    windows_each: float | None = None
    inserts_often: bool = True
    seed: int = 0


@dataclass
class Turn:
    """One that runs. num_computed: of its tokens; num_left: to be generated; states: positions where steps ended."""

    conversation: int
    lease: Lease
    num_computed: int
    num_left: int
    ends: list[int]


class Loop:
    """A serving loop of the workload on one core."""

    def __init__(self, workload: Workload, components: tuple[Component, ...], config: CacheConfig):
        self.workload = workload
        self.core = PrefixCache(components, config)
        self.namespace = self.core.new_namespace(model="none")
        self.rng = np.random.default_rng(workload.seed)
        system = self._tokens(workload.system_tokens)
        self.texts = [list(system) for _ in range(workload.num_conversations)]
        self.turns_left = [workload.num_turns] * workload.num_conversations
        self.running: list[Turn] = []

    def _tokens(self, num_tokens: int) -> list[int]:
        return self.rng.integers(0, 1 << 30, num_tokens).tolist()

    def run(self) -> int:
        """How many prompt tokens were found in all turns."""
        while self.running or any(self.turns_left):
            self.core.take_plan()
            self.core.commit({})
            while len(self.running) < self.workload.num_running and (idle := self._idle()):
                self._begin(int(self.rng.choice(idle)))
            for turn in list(self.running):
                self._decode(turn)
        return self.core.counters["device_hit_tokens"]

    def _idle(self) -> list[int]:
        busy = {turn.conversation for turn in self.running}
        return [i for i, left in enumerate(self.turns_left) if left and i not in busy]

    def _begin(self, conversation: int) -> None:
        """A third of a turn is the user's. The prompt is computed in chunks."""
        self.turns_left[conversation] -= 1
        num_tokens = int(self.rng.integers(*TURNS[self.workload.turn], endpoint=True))
        text = self.texts[conversation]
        text += self._tokens(num_tokens // 3)
        sequence = self.core.sequence(text, self.namespace)
        lease = self.core.admit(sequence, min(CHUNK_TOKENS, len(text) - self.core.match(sequence).num_tokens))
        assert isinstance(lease, Lease), lease
        turn = Turn(conversation, lease, lease.num_cached_tokens, num_tokens - num_tokens // 3, [])
        while turn.num_computed < len(text):
            self._step(turn, min(turn.num_computed + CHUNK_TOKENS, len(text)))
        self._insert(turn)
        self.running.append(turn)

    def _step(self, turn: Turn, end: int) -> None:
        """One model step for a turn, up to `end` at most."""
        assert self.core.grow(turn.lease, turn.num_computed, 1)
        stop = turn.lease.next_stop
        end = end if stop is None else min(end, stop)
        assert self.core.grow(turn.lease, turn.num_computed, end - turn.num_computed)
        turn.num_computed = end
        turn.ends.append(end)
        if end == stop and self.workload.inserts_often:
            self._insert(turn)

    def _insert(self, turn: Turn) -> None:
        states = [end for end in turn.ends if end in turn.lease.checkpoints]
        turn.ends.clear()
        self.core.insert(turn.lease, turn.num_computed, states=states)

    def _decode(self, turn: Turn) -> None:
        """One token. The last one is said, and not computed."""
        token = int(self.rng.integers(0, 1 << 30))
        self.texts[turn.conversation].append(token)
        turn.num_left -= 1
        if turn.num_left:
            turn.lease.sequence.extend([token])
            self._step(turn, turn.num_computed + 1)
        else:
            self._insert(turn)
            self.core.release(turn.lease)
            self.running.remove(turn)


def make(mixture: str, grid: int) -> tuple[Component, ...]:
    """mixture: names of components, with " + " between them. grid: chunk_tokens of the state."""
    made: dict[str, Component] = {
        "full": FullAttention("full", ()),
        "window": SlidingWindow("window", (), window_tokens=WINDOW_TOKENS),
        "state": RecurrentState("state", (), chunk_tokens=grid),
    }
    return tuple(made[kind] for kind in mixture.split(" + "))


def device_pages(workload: Workload, page_tokens: int) -> dict[str, int]:
    """By component."""
    pages = {"full": ROOM, "window": ROOM, "state": ROOM}
    running, conversations = workload.num_running, workload.num_conversations
    if workload.slots_each is not None:
        pages["state"] = SLOTS_OF_RUNNING * running + round(workload.slots_each * conversations)
    if workload.windows_each is not None:
        window = WINDOW_TOKENS // page_tokens + 1
        of_running = 2 * window + CHUNK_TOKENS // page_tokens
        pages["window"] = of_running * running + round(workload.windows_each * conversations * window)
    return pages


def found_tokens(workload: Workload, mixture: str, page_tokens: int, grid: int = 1) -> int:
    """Prompt tokens that the workload finds."""
    components = make(mixture, grid)
    pages = device_pages(workload, page_tokens)
    config = CacheConfig(page_tokens=page_tokens, device_pages={c.name: pages[c.name] for c in components})
    return Loop(workload, components, config).run()


@dataclass(frozen=True)
class Row:
    """lost: in percent, by mixture and grid ("full + state, 64"). found_by_full: tokens."""

    workload: Workload
    page_tokens: int
    found_by_full: int
    lost: dict[str, float]


def measure(workload: Workload, page_tokens: int, grids: tuple[int, ...] = GRIDS) -> Row:
    found_by_full = found_tokens(workload, "full", page_tokens)
    settings = [("full + window", None)]
    settings += [(mixture, grid) for mixture in ("full + state", "full + window + state") for grid in grids]
    lost = {}
    for mixture, grid in settings:
        found = found_tokens(workload, mixture, page_tokens, grid or 1)
        name = mixture if grid is None else f"{mixture}, {grid}"
        lost[name] = round(100 * (1 - found / found_by_full), 1)
    return Row(workload, page_tokens, found_by_full, lost)


def workloads() -> list[Workload]:
    """Of every length of turns: room for all; a beginning that all share; fewer and fewer windows and slots."""
    found = []
    for turn in TURNS:
        usual = Workload(turn) if turn != "long" else Workload(turn, num_conversations=8, num_turns=5)
        found += [usual, replace(usual, system_tokens=SYSTEM_TOKENS)]
        found += [replace(usual, slots_each=each, windows_each=each) for each in FEW]
    return found


def name_of(workload: Workload) -> str:
    system = f", {workload.system_tokens} shared" if workload.system_tokens else ""
    each = "" if workload.slots_each is None else f", {workload.slots_each:g} each"
    return f"{workload.turn}{system}{each}"


def show(rows: list[Row], console: Console) -> None:
    """One table: a window, a state by its grid, and both."""
    names = ["full + window", *(f"full + state, {grid}" for grid in GRIDS), "full + window + state, 1"]
    table = Table("turns", "page", "found by full", title="Lost, in %: full + window, full + state by grid")
    for heading in ("window", *map(str, GRIDS), "window + state, 1"):
        table.add_column(heading, justify="right")
    for row in rows:
        lost = [f"{row.lost[name]:.1f}" for name in names]
        table.add_row(name_of(row.workload), str(row.page_tokens), f"{row.found_by_full:,}", *lost)
    console.print(table)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks turns", description=__doc__)
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    args = parser.parse_args(argv)
    try:
        prepare_json(args.json)
    except ValueError as error:
        parser.error(str(error))
    console = Console(file=sys.stderr if args.json == STDOUT else sys.stdout, width=120)
    settings = [(workload, page_tokens) for workload in workloads() for page_tokens in PAGES]
    rows = [measure(*setting) for setting in track(settings, "Turns", console=console)]
    show(rows, console)
    report: list[dict[str, Any]] = [asdict(row) for row in rows]
    write_json(args.json, {"window_tokens": WINDOW_TOKENS, "turns": TURNS, "rows": report})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
