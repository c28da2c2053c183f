"""A conversation of several turns that branches inside its prompt and inside generated text, and what must be cached.

    opening   |--- prompt 26 ---|--- 9 generated ---|
    second    |-------------- 35 -------------------|-- 7 --|-- 5 generated --|
    branches  |-- 14 --|...   |----- 31 ----|...        |----------- 45 -----------|...

Whole pages of PAGE_TOKENS = 4 that an earlier turn has published are found: of its prompt and of what it generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.models.serving import PAGE_TOKENS, Answer, Driver, Rig, check_equal, random_tokens

assert PAGE_TOKENS == 4
PROMPT = random_tokens(1, 26)
TIERS = ("device", "host", "storage")


@dataclass(frozen=True)
class Turn:
    """Says what turn `of` has said so far, up to token `cut`, and then `own` new tokens.

    num_cached: tokens that must be found, exactly
    """

    name: str
    of: str | None
    cut: int
    own: int
    num_decode: int
    num_cached: int


TURNS = (
    Turn("opening", None, 0, 0, 9, 0),
    Turn("second", "opening", 35, 7, 5, 32),
    Turn("inside the prompt", "opening", 14, 12, 4, 12),
    Turn("inside what the opening generated", "opening", 31, 6, 6, 28),
    Turn("inside what the second generated", "second", 45, 3, 4, 44),
    Turn("at the end of the second", "second", 47, 4, 4, 44),
    Turn("inside a branch's output", "inside what the opening generated", 42, 5, 4, 40),
    Turn("the second again", "opening", 35, 7, 5, 40),
)


def serve_turns(driver: Driver, tier: str | None) -> list[Answer]:
    """Every turn, one after the other; what is found is in `tier` by then, and nowhere nearer. None: no cache."""
    answers: list[Answer] = []
    spoken: dict[str, np.ndarray] = {}
    for seed, turn in enumerate(TURNS):
        before = PROMPT if turn.of is None else spoken[turn.of][: turn.cut]
        own = random_tokens(50 if turn.name == "the second again" else 49 + seed, turn.own)
        tokens = np.concatenate([before, own])
        answer = _ask(driver, tier, tokens, turn)
        answers.append(answer)
        spoken[turn.name] = np.concatenate([tokens, np.array(answer.tokens, np.int32)])
    return answers


def _ask(driver: Driver, tier: str | None, tokens: np.ndarray, turn: Turn) -> Answer:
    if tier == "host":
        driver.fill_device()
    if tier == "storage" and turn.num_cached:
        driver.drain()
        driver.cache.reset()
        driver.drain()
        return driver.ask_storage(tokens, num_decode=turn.num_decode)
    return driver.ask(tokens, num_decode=turn.num_decode)


def uncached_turns(rig: Rig) -> list[Answer]:
    """What every turn is answered without a cache."""
    with rig.cache(caching=False, host_pages=0) as cache:
        return serve_turns(Driver(rig, cache), None)


def check_turns(driver: Driver, tier: str, want: list[Answer]) -> None:
    """Hit equals miss in every turn, with exactly the cached tokens of TURNS, all from `tier`."""
    for turn, hit, miss in zip(TURNS, serve_turns(driver, tier), want, strict=True):
        found = tuple(turn.num_cached if name == tier else 0 for name in TIERS)
        assert hit.hits == found, f"{tier}: {turn.name}: {hit.hits=} {found=}"
        check_equal(hit, miss)
