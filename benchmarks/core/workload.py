"""How large everything is that the suite of the core measures. Tests make it small; the figures count as it is here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRACE = Path(__file__).parents[1] / "traces" / "conversation.jsonl.gz"


@dataclass(frozen=True)
class Workload:
    """Sizes in tokens, pages, nodes and requests.

    trace:                requests in the Mooncake schema, for what is replayed
    page_tokens:          the first is the one for everything that is measured with one
    path_nodes:           nodes that a long prompt is spread over
    num_turns:            samples of what takes microseconds
    victims:              nodes of `victim_pages` pages in the cache that evicts one at a time
    namespaces:           of one tenant, with as many nodes, in the cache in which another tenant evicts one at a time
    conversations:        of `conversation_turns` turns of `turn_pages` pages each, in the cache that evicts a share
    capacities:           device tokens of the replays; host memory, where there is any, has `host_factor` times as many
    rounds:               passes through the trace
    turn_requests:        requests that a replay serves before the next one takes its turn
    memory_requests:      of the trace, after which memory is counted
    running, arriving:    requests that decode, and that arrive and finish, in every step
    """

    trace: Path = TRACE
    page_tokens: tuple[int, ...] = (16, 64)
    prompt_tokens: int = 128 * 1024
    short_prompt_tokens: tuple[int, ...] = (1024, 8 * 1024, 32 * 1024)
    path_nodes: int = 64
    insert_tokens: int = 8 * 1024
    insert_after_tokens: int = 1024
    num_turns: int = 600
    victims: int = 100_000
    victim_pages: int = 10
    num_evictions: int = 2000
    namespaces: int = 4000
    conversations: int = 2500
    conversation_turns: int = 4
    turn_pages: int = 100
    evicted_share: float = 0.1
    share_evictions: int = 9
    capacities: tuple[int, ...] = (2_000_000, 8_000_000)
    host_factor: int = 4
    rounds: int = 3
    replay_requests: int | None = None
    turn_requests: int = 100
    memory_requests: int = 3000
    memory_tokens: int = 2_000_000
    running: int = 256
    arriving: int = 4
    context_tokens: tuple[int, int] = (1000, 6000)
    step_capacity: int = 2_000_000
    warmup_steps: int = 200
    num_steps: int = 800


def short(count: int) -> str:
    """131072 -> 128k, 2000000 -> 2M, 48 -> 48."""
    for unit, factor in (("M", 1_000_000), ("k", 1024)):
        if count and not count % factor:
            return f"{count // factor}{unit}"
    return str(count)
