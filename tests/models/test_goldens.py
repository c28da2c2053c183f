"""Every family against the logits of the reference implementation, and what `extend` promises.

The goldens are tiny random models; tests/goldens/*/config.json says which. All have rows of 75 tokens, windows of 8.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import STATE, WINDOW, components, make_extend
from models.loading import load_model
from tests.models.steps import NUM_PAGES, TOLERANCE, Steps, addresses, make_batch, page_tokens

GOLDENS = Path(__file__).parent.parent / "goldens"
FAMILIES = (
    "qwen3",
    "qwen3_moe",
    "llama",
    "gemma3",
    "gpt_oss",
    "gpt_oss_mxfp4",
    "nemotron_h",
    "qwen3_next",
    "deepseek_v32",
    "deepseek_v4",
)
CASES = [(family, mesh) for family in FAMILIES for mesh in ((1, 1, 1), (2, 2, 2))]
CASES += [("llama_3_heads", (2, 1, 2))]  # three query heads and one kv head, untied embeddings


def marked(cases: list) -> list:
    """Eight devices say more than one, and compiling takes most of the time."""
    alone = [case for case in cases if case[1] == (1, 1, 1) and case[0] != "qwen3"]
    return [pytest.param(case, marks=pytest.mark.one_device if case in alone else ()) for case in cases]


FAR = 50  # times the tolerance is the least that a mutation must make
COMPRESSED = [case for case in CASES if case[0] == "deepseek_v4"]
WITH_STATES = [case for case in CASES if case[0] in ("nemotron_h", "qwen3_next")]
WITH_WINDOWS = [case for case in CASES if case[0] in ("gemma3", "gpt_oss", "gpt_oss_mxfp4", "deepseek_v4")]


def named(case: tuple) -> str:
    return f"{case[0]}-{case[1]}"


@pytest.fixture(scope="module", params=marked(CASES), ids=named)
def steps(request, make_mesh) -> Steps:
    family, shape = request.param
    mesh = make_mesh(*shape)
    cfg, params = load_model(GOLDENS / family, mesh, jnp.float32)
    reference = np.load(GOLDENS / family / "reference.npz")
    tokens = reference["tokens"].astype(np.int32)
    num_pages = 4 * NUM_PAGES if family == "deepseek_v4" else NUM_PAGES  # its smallest pool has a slot a page
    extend = make_extend(cfg, mesh, page_tokens(cfg))
    return Steps(cfg, mesh, params, extend, tokens, reference["logits"], num_pages)


def test_chunks_and_decode_match_the_golden(steps, rng):
    chunks = [(0, 16, 16), (16, 29, 16), (29, 45, 16), (45, 50, 16), (50, 64, 16)]
    decode = [(n, n + 1, 1) for n in range(64, 75)]
    logits = steps.run(steps.pools(), steps.tables(rng), chunks + decode)
    assert np.abs(logits - steps.logits).max() <= TOLERANCE


@pytest.mark.slow
def test_whole_prompt_matches_the_golden(steps, rng):
    logits = steps.run(steps.pools(), steps.tables(rng), [(0, 75, 80)])
    assert np.abs(logits - steps.logits).max() <= TOLERANCE


@pytest.mark.slow
def test_token_by_token_matches_the_golden(steps, rng):
    logits = steps.run(steps.pools(), steps.tables(rng), [(n, n + 1, 1) for n in range(75)])
    assert np.abs(logits - steps.logits).max() <= TOLERANCE


def test_pools_are_updated_in_place(steps, rng):
    pools, batch = steps.pools(), make_batch(steps.tokens, steps.tables(rng), 0, 16, 16)
    arrays = jax.tree.leaves(pools)
    shard_bytes = min(array.addressable_shards[0].data.nbytes for array in arrays)

    def temporary_bytes(factor: int) -> int:
        """Of the program for pools that are so many times as large."""
        sizes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((factor * len(x), *x.shape[1:]), x.dtype, sharding=x.sharding), pools
        )
        return steps.extend.lower(steps.params, sizes, batch).compile().memory_analysis().temp_size_in_bytes

    once = temporary_bytes(1)
    is_copied = once >= shard_bytes / 2 and temporary_bytes(2) - once >= shard_bytes / 2  # not even the smallest pool
    before = addresses(pools)
    _, after = steps.extend(steps.params, pools, batch)
    assert all(array.is_deleted() for array in arrays)
    assert addresses(after) == before
    assert not is_copied


def test_padding_writes_nothing(steps, rng):
    tables = steps.tables(rng)
    batch = make_batch(steps.tokens, tables, 0, 5, 16)._replace(num_new=np.array([5, 0], np.int32))
    _, pools = steps.extend(steps.params, steps.pools(), batch)
    for component in components(steps.cfg, page_tokens(steps.cfg), "float32"):
        if component.name == STATE:
            continue
        page = tables[component.name][0, 0]
        for field in component.fields:
            axis = 1 + field.axes.index("slots") if "slots" in field.axes else None
            pool = np.abs(np.asarray(pools[component.name][field.name]))
            written = np.argwhere(pool.sum(axis=tuple(i for i in range(1, pool.ndim) if i != axis)) > 0)
            slots = range(5 // field.tokens_per_slot)
            assert written.tolist() == ([[page, slot] for slot in slots] if axis else [[page]]), field.name


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", ["another page", "an earlier page", "position off by one"])
def test_wrong_pages_show(steps, rng, mutation):
    """What the comparison with the golden must notice."""
    tables = steps.tables(rng)
    pools, wrong = steps.pools(), {name: table.copy() for name, table in tables.items()}
    for start in (0, 16, 32):
        _, pools = steps.extend(steps.params, pools, make_batch(steps.tokens, tables, start, start + 16, 16))
    if mutation == "another page":
        wrong["full"][:, 2] = tables["full"][::-1, 2]
    if mutation == "an earlier page":
        wrong["full"][:, 2] = tables["full"][:, 1]
    batch = make_batch(steps.tokens, wrong, 48, 64, 16)
    if mutation == "position off by one":
        batch = batch._replace(starts=batch.starts + 1)
    logits, _ = steps.extend(steps.params, pools, batch)
    assert np.abs(np.asarray(logits) - steps.logits[:, 48:64]).max() > FAR * TOLERANCE


@pytest.mark.mutation
@pytest.mark.parametrize("steps", WITH_STATES, ids=named, indirect=True)
@pytest.mark.parametrize("mutation", ["another request's state", "an earlier state", "zeroed inputs", "zeroed memory"])
def test_a_wrong_state_shows(steps, rng, mutation):
    """The right one gives the golden's logits, bit for bit what the next chunk gives without stopping there."""
    tables, pools = steps.tables(rng), steps.pools()
    _, pools = steps.extend(steps.params, pools, make_batch(steps.tokens, tables, 0, 30, 32))
    _, pools = steps.extend(steps.params, pools, make_batch(steps.tokens, tables, 30, 48, 32))
    batch = make_batch(steps.tokens, tables, 48, 64, 32)
    slots = batch.states.read
    if mutation == "another request's state":
        batch = batch._replace(states=batch.states._replace(read=slots[::-1]))
    elif mutation == "an earlier state":
        batch = batch._replace(states=batch.states._replace(read=tables[STATE][:, 29]))
    else:
        memory = {"memory": pools[STATE]["memory"]}
        inputs = {name: pool for name, pool in pools[STATE].items() if name not in memory}
        zeroed = inputs if mutation == "zeroed inputs" else memory
        zeroed = {name: jax.device_put(np.zeros_like(pool), pool.sharding) for name, pool in zeroed.items()}
        pools = {**pools, STATE: {**pools[STATE], **zeroed}}
    logits, _ = steps.extend(steps.params, pools, batch)
    assert np.abs(np.asarray(logits)[:, :16] - steps.logits[:, 48:64]).max() > FAR * TOLERANCE


@pytest.mark.parametrize("steps", WITH_STATES, ids=named, indirect=True)
def test_a_kept_state_is_the_one_that_is_written(steps, rng):
    """In both slots, and in no other."""
    tables, pools = steps.tables(rng), steps.pools()
    batch = make_batch(steps.tokens, tables, 0, 16, 16)
    keep = tables[STATE][:, 40]
    _, pools = steps.extend(steps.params, pools, batch._replace(states=batch.states._replace(keep=keep)))
    for pool in map(np.asarray, pools[STATE].values()):
        assert np.array_equal(pool[keep], pool[batch.states.write])
        written = np.flatnonzero(np.abs(pool).sum(axis=tuple(range(1, pool.ndim))))
        assert sorted(written) == sorted([*keep, *batch.states.write])


@pytest.mark.parametrize("steps", marked(WITH_WINDOWS), ids=named, indirect=True)
def test_of_the_window_the_right_pages_are_read(steps, rng):
    """Ids behind it are num_pages by then, and the bits of the logits are the same; a stale page in it shows."""
    tables, logits, pools = steps.tables(rng), [], steps.pools()
    for start in (0, 16, 32):
        _, pools = steps.extend(steps.params, pools, make_batch(steps.tokens, tables, start, start + 16, 16))
    newest = 47 // page_tokens(steps.cfg)  # holds tokens 41 to 47, which the first tokens of the chunk read
    gone = np.where(np.arange(tables[WINDOW].shape[1]) < newest, steps.num_pages, tables[WINDOW])
    stale = tables[WINDOW].copy()
    stale[:, newest] = tables[WINDOW][:, newest - 1]
    for window in (tables[WINDOW], gone, stale):
        shown = {**tables, WINDOW: window}
        out, pools = steps.extend(steps.params, pools, make_batch(steps.tokens, shown, 48, 64, 16))
        logits.append(np.asarray(out))
    assert np.array_equal(logits[0], logits[1])
    assert np.abs(logits[2] - logits[0]).max() > FAR * TOLERANCE


@pytest.mark.mutation
@pytest.mark.parametrize("steps", marked(COMPRESSED), ids=named, indirect=True)
@pytest.mark.parametrize("field", ["csa_state", "hca_state"])
@pytest.mark.parametrize("mutation", ["another request's state", "the state of the page before", "no state"])
def test_a_wrong_compress_state_shows(steps, rng, field, mutation):
    """Of groups of 4 and of 16 tokens that have 2 and 10 of them."""
    tables, pools = steps.tables(rng), steps.pools()
    for start, stop in ((0, 16), (16, 26)):
        _, pools = steps.extend(steps.params, pools, make_batch(steps.tokens, tables, start, stop, 16))
    page, before = tables[WINDOW][:, 1], tables[WINDOW][:, 0]
    states = np.array(pools[WINDOW][field])
    assert np.abs(states[page]).sum() > 0
    wrong = {"another request's state": states[page[::-1]], "the state of the page before": states[before]}
    states[page] = wrong.get(mutation, 0)
    pools = {**pools, WINDOW: {**pools[WINDOW], field: jax.device_put(states, pools[WINDOW][field].sharding)}}
    logits, _ = steps.extend(steps.params, pools, make_batch(steps.tokens, tables, 26, 42, 16))
    assert np.abs(np.asarray(logits) - steps.logits[:, 26:42]).max() > FAR * TOLERANCE


def test_result_depends_on_nothing_but_the_prefix(steps, rng):
    """Bit for bit, within one compiled shape: not on the pages, the row, or where chunks begin."""
    tables, chunks = steps.tables(rng), [(0, 16, 16), (16, 32, 16)]
    want = steps.run(steps.pools(), tables, chunks)
    assert np.array_equal(steps.run(steps.pools(), steps.tables(rng), chunks), want)
    shifted = [(0, 5, 16), (5, 20, 16), (20, 32, 16)]
    assert np.array_equal(steps.run(steps.pools(), tables, shifted), want)
    mirrored = replace(steps, tokens=steps.tokens[::-1])
    assert np.array_equal(mirrored.run(steps.pools(), tables, chunks)[::-1], want)
