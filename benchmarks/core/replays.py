"""The whole trace through the core and through the stripped tree, in turns of some requests each; and memory per token.

Prompts are made turn by turn (all of them at once would not fit), outside of the timed part. Whoever goes first reads
them from memory, so that all take the first place equally often.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from benchmarks.core.loaded_core import EVERY_KIND
from benchmarks.core.reference_tree import ReferenceTree
from benchmarks.core.workload import Workload, short
from benchmarks.figure import Figure, Goal, figure
from benchmarks.measure import undisturbed
from jaxcache.replay.replay import VOCAB_SIZE, Replay, Setting, bytes_per_cached_token
from jaxcache.replay.traces import TraceRequest, read_trace

BYTES_GOAL = Goal("value", "<=", 9)
TOKEN_BYTES = PAGE_ID_BYTES = 4


def everything(setting: Setting) -> Setting:
    """All features on: the line to add one to."""
    return replace(setting, components=EVERY_KIND, num_namespaces=4, events=True)


def with_host(setting: Setting, factor: int) -> Setting:
    return replace(setting, host_tokens=factor * setting.device_tokens)


def replay_groups(workload: Workload) -> dict[str, Callable[[Workload], list[Figure]]]:
    return {
        f"replay_page{page}_{short(capacity)}": partial(replays, page_tokens=page, capacity=capacity)
        for page in workload.page_tokens
        for capacity in workload.capacities
    }


def replays(workload: Workload, page_tokens: int, capacity: int) -> list[Figure]:
    full = Setting(page_tokens, capacity)
    tested = {
        "full": (full, 0.7, "full attention"),
        "all": (everything(full), 0.3, "3 components, 4 namespaces, events"),
        "all_host": (with_host(everything(full), workload.host_factor), 0.2, "the same and host backups"),
    }
    requests = read_trace(workload.trace, workload.replay_requests)
    settings = [setting for setting, _, _ in tested.values()]
    rounds = [undisturbed(partial(one_round, workload, settings, requests)) for _ in range(workload.rounds)]
    seconds = np.array([[server.cpu_s for server in servers] for servers in rounds])
    rates = (len(requests) / seconds).T.tolist()
    where = f"page {page_tokens}, {short(capacity)} tokens"
    figures = []
    for place, (name, (_, bound, meaning)) in enumerate(tested.items(), 1):
        figures.append(
            figure(
                f"replay_{name}_page{page_tokens}_{short(capacity)}",
                f"replay, {where}: {meaning} / stripped tree",
                rates[place],
                rates[0],
                unit="requests/CPU s",
                goal=Goal("ratio", ">=", bound),
                details={"hit_rate": rounds[0][place].hit_rate(), "floor_hit_rate": rounds[0][0].hit_rate()},
            )
        )
    return figures


class TimedServer:
    """Serves prompts and counts the CPU time. after_turn: what another thread would do, not counted."""

    def __init__(self, server: StrippedReplay | Replay):
        self.serve: Callable[[np.ndarray], object] = server.serve
        self.hit_rate = server.hit_rate
        self.after_turn = server.take_events
        self.cpu_s = 0.0

    def take_turn(self, prompts: list[np.ndarray]) -> None:
        serve = self.serve
        start = time.thread_time()
        for tokens in prompts:
            serve(tokens)
        self.cpu_s += time.thread_time() - start
        self.after_turn()


class StrippedReplay:
    """The floor: a request larger than the tree is left out, as in `Replay`."""

    def __init__(self, setting: Setting):
        self.num_pages = setting.device_tokens // setting.page_tokens
        self.tree = ReferenceTree(setting.page_tokens, self.num_pages)
        self.page_tokens = setting.page_tokens
        self.num_found = self.num_tokens = 0

    def serve(self, tokens: np.ndarray) -> None:
        self.num_tokens += len(tokens)
        if len(tokens) // self.page_tokens <= self.num_pages:
            self.num_found += self.tree.serve(tokens.tobytes()) // TOKEN_BYTES

    def hit_rate(self) -> float:
        return self.num_found / self.num_tokens

    def take_events(self) -> None:
        """It has none."""


def one_round(workload: Workload, settings: list[Setting], requests: list[TraceRequest]) -> list[TimedServer]:
    """The stripped tree first, then one core for each setting."""
    servers = [TimedServer(StrippedReplay(settings[0])), *(TimedServer(Replay(setting)) for setting in settings)]
    for turn, prompts in enumerate(turns_of_prompts(requests, workload.turn_requests)):
        first = turn % len(servers)
        for server in servers[first:] + servers[:first]:
            server.take_turn(prompts)
    return servers


def turns_of_prompts(requests: list[TraceRequest], turn_requests: int) -> Iterator[list[np.ndarray]]:
    for first in range(0, len(requests), turn_requests):
        some = requests[first : first + turn_requests]
        yield [request.prompt(request.block_tokens, VOCAB_SIZE) for request in some]


def memory(workload: Workload) -> list[Figure]:
    page = workload.page_tokens[0]
    full = Setting(page, workload.memory_tokens)
    requests = read_trace(workload.trace, workload.memory_requests)
    floor = TOKEN_BYTES + PAGE_ID_BYTES / page
    figures = []
    for name, setting, meaning in (
        ("bytes_per_token", full, "full attention"),
        ("bytes_per_token_all_host", with_host(everything(full), workload.host_factor), "everything, with host"),
    ):
        replay = Replay(setting)
        for request in requests:
            replay.request(request)
        per_token = bytes_per_cached_token(replay.core)
        what = f"bytes per cached token, page {page}, {meaning} / token and page id"
        figures.append(figure(name, what, [per_token], [floor], unit="bytes", goal=BYTES_GOAL))
    return figures
