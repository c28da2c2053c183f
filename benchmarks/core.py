"""Times the core's operations as ratios to floors measured in the same run: python -m benchmarks.core.

A floor is what the operation cannot beat in Python: one `startswith` over the prompt, or the same requests served by
the stripped tree of reference_tree.py. Medians; the noise is the distance between the quartiles.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from benchmarks.reference_tree import ReferenceTree
from jaxcache.components import FullAttention
from jaxcache.config import CacheConfig
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.testing.traces import TRACE_BLOCK_TOKENS, read_trace
from jaxcache.types import Wait

TRACE = Path(__file__).parent / "traces" / "conversation.jsonl.gz"
PAGE_TOKENS = 16
PROMPT_TOKENS = 128 * 1024
REPLAY_REQUESTS = 3000  # of the trace: at their real lengths they take 150 MB
REPLAY_CAPACITY_TOKENS = 2_000_000
REPLAY_ROUNDS = 5
REPLAY_TURN = 100


def elapsed_us(function: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    function()
    return (time.perf_counter_ns() - start) / 1000


def median_and_noise(values: list[float]) -> tuple[float, float]:
    """(median, distance between the quartiles)."""
    quartiles = statistics.quantiles(values, n=4)
    return quartiles[1], quartiles[2] - quartiles[0]


def microseconds(function: Callable[[], object], repeats: int) -> tuple[float, float]:
    return median_and_noise([elapsed_us(function) for _ in range(repeats)])


def new_core(page_tokens: int, num_pages: int) -> PrefixCache:
    return PrefixCache((FullAttention("full", ()),), CacheConfig(page_tokens=page_tokens, device_pages=num_pages))


def serve(core: PrefixCache, namespace, tokens: np.ndarray) -> int:
    """One request, prompt only: match, admit, insert, release. Returns the cached tokens."""
    sequence = core.sequence(tokens, namespace)
    cached = core.match(sequence).num_tokens
    lease = core.admit(sequence, len(tokens) - cached)
    assert not isinstance(lease, Wait)
    core.insert(lease, len(tokens))
    core.release(lease)
    return lease.num_cached_tokens


def match_long_prompt() -> dict:
    """Matching a cached prompt of 128k tokens, against one comparison of the same bytes; both are freshly made."""
    core = new_core(PAGE_TOKENS, PROMPT_TOKENS // PAGE_TOKENS + 8)
    namespace = core.new_namespace(model="bench")
    tokens = np.random.default_rng(0).integers(0, 2**31 - 1, PROMPT_TOKENS + 1).astype(np.int32)
    serve(core, namespace, tokens)
    edge = tokens.tobytes()[: PROMPT_TOKENS * 4]
    sequence, matches, floors = core.sequence(tokens, namespace), [], []
    for _ in range(200):
        sequence = core.sequence(tokens, namespace)
        matches.append(elapsed_us(lambda: core.match(sequence)))  # noqa: B023
        data = bytearray(tokens)
        floors.append(elapsed_us(lambda: data.startswith(edge)))  # noqa: B023
    match, noise = median_and_noise(matches)
    floor, floor_noise = median_and_noise(floors)
    rematch, rematch_noise = microseconds(lambda: core.match(sequence), 200)
    return {
        "match_128k_us": match,
        "match_128k_noise_us": noise,
        "startswith_128k_us": floor,
        "startswith_noise_us": floor_noise,
        "match_128k_ratio": match / floor,
        "rematch_us": rematch,
        "rematch_noise_us": rematch_noise,
    }


def evict_one() -> dict:
    """Admitting a page into a full cache of 100,000 nodes: what the eviction adds to a fresh cache's admit."""
    num_nodes = 100_000
    core = new_core(PAGE_TOKENS, num_nodes)
    namespace = core.new_namespace(model="bench")
    page = np.arange(PAGE_TOKENS, dtype=np.int32)
    for i in range(num_nodes):
        page[0] = i
        serve(core, namespace, page)
    device = core.tiers.device[0]
    assert core.tiers.tree.num_nodes == num_nodes and not device.allocator.num_free
    wanted = iter(range(1, 2001))
    evict, noise = microseconds(lambda: core.backups.make_room_on_device(0, next(wanted)), 2000)
    return {"evict_one_us": evict, "evict_one_noise_us": noise, "evict_one_nodes": num_nodes}


def replay() -> dict:
    """The start of the bundled trace at its real prompt lengths, through the core and through the stripped tree."""
    prompts = [request.prompt(TRACE_BLOCK_TOKENS, 50_000) for request in read_trace(TRACE, REPLAY_REQUESTS)]
    figures: dict = {"replay_requests": len(prompts)}
    for page_tokens in (16, 64):
        rounds = [replay_round(prompts, page_tokens) for _ in range(REPLAY_ROUNDS)]
        core, reference, core_found, reference_found = (
            statistics.median(column) for column in zip(*rounds, strict=True)
        )
        ratio, noise = median_and_noise([floor / seconds for seconds, floor, _, _ in rounds])
        figures |= {
            f"replay_page{page_tokens}_ratio": ratio,
            f"replay_page{page_tokens}_ratio_noise": noise,
            f"replay_page{page_tokens}_requests_per_cpu_s": len(prompts) / core,
            f"reference_page{page_tokens}_requests_per_cpu_s": len(prompts) / reference,
            f"replay_page{page_tokens}_hit_rate": core_found / sum(map(len, prompts)),
            f"reference_page{page_tokens}_hit_rate": reference_found / sum(map(len, prompts)),
        }
    return figures


def replay_round(prompts: list[np.ndarray], page_tokens: int) -> tuple[float, float, int, int]:
    """CPU seconds of the core and of the stripped tree, which take turns on the same requests, and what each found."""
    num_pages = REPLAY_CAPACITY_TOKENS // page_tokens
    core = new_core(page_tokens, num_pages)
    namespace = core.new_namespace(model="bench")
    tree = ReferenceTree(page_tokens, num_pages)
    seconds, found = [0.0, 0.0], [0, 0]
    servers = (
        lambda tokens: serve(core, namespace, tokens),
        lambda tokens: tree.serve(tokens.tobytes()) // 4,
    )
    gc.collect()
    for turn, first in enumerate(range(0, len(prompts), REPLAY_TURN)):
        for who in (0, 1) if turn % 2 else (1, 0):  # whoever goes first reads the prompts from memory, not from cache
            start = time.thread_time()
            found[who] += sum(map(servers[who], prompts[first : first + REPLAY_TURN]))
            seconds[who] += time.thread_time() - start
    return (*seconds, *found)


def run() -> dict:
    return {**match_long_prompt(), **replay(), **evict_one()}


if __name__ == "__main__":
    print(json.dumps(run(), indent=2))
