"""How much of a conversation is found in its next turn, for every family, by the reference loop with its components.

The model is not computed: what is found depends on components, pages and turns only. Full attention alone would find
every whole page of what was computed in the turns before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

import jaxcache
from models.decoder import DecoderConfig, components
from models.layer_plan import STATE
from models.serve import BatchShape, Request, Server
from tests.models.families import FAMILIES

PAGE_TOKENS = 16
VOCAB = 64
SHAPE = BatchShape(prefill_rows=2, chunk_tokens=64, decode_rows=4, table_pages=160)
NUM_USERS, NUM_TURNS = 3, 4
SHARE = 0.95  # of what full attention alone would find, where turns have 300 tokens and more


def loop(cfg: DecoderConfig, mesh: jax.sharding.Mesh) -> tuple[jaxcache.Cache, Server]:
    parts = components(cfg, PAGE_TOKENS, "float32")
    slots = 3 * SHAPE.decode_rows + 4 * NUM_USERS  # of states: three a running request, and those that are kept
    pages = {part.name: slots if part.name == STATE else 600 for part in parts}
    cache = jaxcache.Cache(parts, mesh, jaxcache.CacheConfig(page_tokens=PAGE_TOKENS, device_pages=pages))
    same_pools = jax.jit(lambda pools: pools, donate_argnums=0)

    def extend(params: Any, pools: Any, batch: Any) -> tuple[jax.Array, Any]:
        """Another token for each position."""
        ends = batch.starts + batch.num_new
        return np.eye(VOCAB, dtype=np.float32)[ends * 7 % VOCAB][:, None], same_pools(pools)

    server = Server(cache, extend, None, cache.new_namespace(model="counts"), SHAPE)
    return cache, server


def conversations(server: Server, user_tokens: int, answer_tokens: int) -> Iterator[tuple[int, int]]:
    """(tokens found, tokens that full attention alone would find) of every turn but the first; users take turns."""
    rng = np.random.default_rng(0)
    said = [np.empty(0, np.int32) for _ in range(NUM_USERS)]
    for turn in range(NUM_TURNS):
        for user in range(NUM_USERS):
            num_new = user_tokens + int(rng.integers(0, PAGE_TOKENS))
            prompt = np.concatenate([said[user], rng.integers(0, VOCAB, num_new).astype(np.int32)])
            request = Request(prompt, answer_tokens + int(rng.integers(0, PAGE_TOKENS)))
            server.submit(request)
            assert list(server.run()) == [request]
            if turn:
                computed = len(said[user]) - 1  # the last token of an answer is not computed
                assert request.hit_tokens is not None
                yield sum(request.hit_tokens.values()), computed // PAGE_TOKENS * PAGE_TOKENS
            said[user] = np.concatenate([prompt, np.array(request.output, np.int32)])


def share(family: str, mesh: jax.sharding.Mesh, user_tokens: int, answer_tokens: int) -> float:
    cache, server = loop(FAMILIES[family], mesh)
    with cache:
        found, possible = np.sum(list(conversations(server, user_tokens, answer_tokens)), axis=0)
    return found / possible


@pytest.mark.parametrize("family", FAMILIES)
def test_the_next_turn_finds_what_full_attention_alone_would(make_mesh, family):
    """N4, N7: prompts and answers."""
    assert share(family, make_mesh(), 220, 80) >= SHARE


def test_what_short_turns_find(make_mesh, closing_lines):
    """Of 40 tokens; the figures are printed at the end of the run."""
    found = {family: share(family, make_mesh(), 20, 20) for family in FAMILIES}
    closing_lines.append(
        f"turns of 40 tokens find, of what full attention alone would: {min(found.values()):.1%} and more"
    )
    assert min(found.values()) >= SHARE


@pytest.mark.mutation
def test_states_that_nobody_reports_show(make_mesh, monkeypatch):
    """A loop that does not name what it has written."""
    insert = jaxcache.Cache.insert
    monkeypatch.setattr(jaxcache.Cache, "insert", lambda self, lease, end, states=(): insert(self, lease, end))
    assert share("nemotron_h_fine", make_mesh(), 220, 80) < 0.1
