"""Qwen3 and Qwen3-MoE against the goldens of the reference implementation, and what `extend` promises."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding

from models import decoder, qwen3
from models.loading import load_model
from models.paged_attention import ExtendBatch

GOLDENS = Path(__file__).parent.parent / "goldens"
FAMILIES = ("qwen3", "qwen3_moe")
MESHES = ((1, 1, 1), (2, 2, 2))
PAGE_TOKENS = 8
NUM_PAGES = 1024
WIDTH = 12  # pages of a row's table
TOLERANCE = 1e-4
SMALL = qwen3.Qwen3Config(
    vocab_size=32, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=4, mlp_size=8, rope_theta=1e4
)


@dataclass(frozen=True)
class Server:
    """A model on a mesh with its compiled step, and the golden that it must reproduce."""

    cfg: qwen3.Qwen3Config
    mesh: Mesh
    params: decoder.Params
    extend: Callable
    tokens: np.ndarray
    logits: np.ndarray

    def pools(self) -> decoder.Pools:
        return zero_pools(self.cfg, self.mesh)

    def run(self, pools: decoder.Pools, table: np.ndarray, chunks: Iterable[tuple[int, int, int]]) -> np.ndarray:
        """Computes chunks (start, stop, columns) of both rows; returns the logits of all their tokens, in order."""
        logits = []
        for start, stop, columns in chunks:
            step_logits, pools = self.extend(self.params, pools, make_batch(self.tokens, table, start, stop, columns))
            logits.append(np.asarray(step_logits)[:, : stop - start])
        return np.concatenate(logits, axis=1)


def zero_pools(cfg: qwen3.Qwen3Config, mesh: Mesh) -> decoder.Pools:
    pp, tp = mesh.shape["pp"], mesh.shape["tp"]
    shape = (NUM_PAGES, -(-cfg.num_layers // pp) * pp, 2, PAGE_TOKENS, max(cfg.num_kv_heads, tp), cfg.head_dim)
    return {
        "full": {"kv": jnp.zeros(shape, jnp.float32, device=NamedSharding(mesh, decoder.pool_specs(cfg)["full"]["kv"]))}
    }


def make_batch(tokens: np.ndarray, table: np.ndarray, start: int, stop: int, columns: int) -> ExtendBatch:
    """Every row from start to stop, padded with columns that are wrong tokens."""
    rows = len(tokens)
    padded = np.full((rows, columns), 7, np.int32)
    padded[:, : stop - start] = tokens[:, start:stop]
    at = np.broadcast_to(np.arange(columns, dtype=np.int32), (rows, columns)).copy()
    starts, num_new = np.full(rows, start, np.int32), np.full(rows, stop - start, np.int32)
    return ExtendBatch(padded, starts, num_new, {"full": table}, at)


def shuffled_table(rng: np.random.Generator, rows: int) -> np.ndarray:
    return rng.permutation(NUM_PAGES)[: rows * WIDTH].reshape(rows, WIDTH).astype(np.int32)


def addresses(pools: decoder.Pools) -> list[int]:
    return [shard.data.unsafe_buffer_pointer() for shard in pools["full"]["kv"].addressable_shards]


@pytest.fixture(scope="module", params=[(f, m) for f in FAMILIES for m in MESHES], ids=lambda p: f"{p[0]}-{p[1]}")
def server(request, make_mesh) -> Server:
    family, shape = request.param
    mesh = make_mesh(*shape)
    cfg, params = load_model(GOLDENS / family, mesh, jnp.float32)
    reference = np.load(GOLDENS / family / "reference.npz")
    tokens = reference["tokens"].astype(np.int32)
    return Server(cfg, mesh, params, decoder.make_extend(cfg, mesh, PAGE_TOKENS), tokens, reference["logits"])


def test_whole_prompt_matches_the_golden(server, rng):
    logits = server.run(server.pools(), shuffled_table(rng, 2), [(0, 75, 80)])
    assert np.abs(logits - server.logits).max() <= TOLERANCE


def test_chunks_and_decode_match_the_golden(server, rng):
    chunks = [(0, 16, 16), (16, 29, 16), (29, 45, 16), (45, 50, 16), (50, 64, 16)]
    decode = [(n, n + 1, 1) for n in range(64, 75)]
    logits = server.run(server.pools(), shuffled_table(rng, 2), chunks + decode)
    assert np.abs(logits - server.logits).max() <= TOLERANCE


@pytest.mark.slow
def test_token_by_token_matches_the_golden(server, rng):
    logits = server.run(server.pools(), shuffled_table(rng, 2), [(n, n + 1, 1) for n in range(75)])
    assert np.abs(logits - server.logits).max() <= TOLERANCE


def test_pools_are_updated_in_place(server, rng):
    pools, batch = server.pools(), make_batch(server.tokens, shuffled_table(rng, 2), 0, 16, 16)
    shard_bytes = pools["full"]["kv"].addressable_shards[0].data.nbytes
    analysis = server.extend.lower(server.params, pools, batch).compile().memory_analysis()
    before = addresses(pools)
    _, after = server.extend(server.params, pools, batch)
    assert pools["full"]["kv"].is_deleted()
    assert addresses(after) == before
    assert analysis.temp_size_in_bytes < shard_bytes / 2


def test_padding_writes_nothing(server, rng):
    table = shuffled_table(rng, 2)
    batch = make_batch(server.tokens, table, 0, 5, 16)
    batch = batch._replace(num_new=np.array([5, 0], np.int32))
    _, pools = server.extend(server.params, server.pools(), batch)
    written = np.argwhere(np.abs(np.asarray(pools["full"]["kv"])).sum(axis=(1, 2, 4, 5)) > 0)
    assert written.tolist() == [[table[0, 0], slot] for slot in range(5)]


@pytest.mark.parametrize("mutation", ["another page", "an earlier page", "position off by one"])
def test_wrong_pages_show(server, rng, mutation):
    """What the comparison with the golden must notice."""
    table = shuffled_table(rng, 2)
    pools, wrong = server.pools(), table.copy()
    for start in (0, 16, 32):
        _, pools = server.extend(server.params, pools, make_batch(server.tokens, table, start, start + 16, 16))
    if mutation == "another page":
        wrong[:, 2] = table[::-1, 2]
    if mutation == "an earlier page":
        wrong[:, 2] = table[:, 1]
    batch = make_batch(server.tokens, wrong, 48, 64, 16)
    if mutation == "position off by one":
        batch = batch._replace(starts=batch.starts + 1)
    logits, _ = server.extend(server.params, pools, batch)
    assert np.abs(np.asarray(logits) - server.logits[:, 48:64]).max() > 100 * TOLERANCE


def test_result_depends_on_nothing_but_the_prefix(server, rng):
    """Bit for bit, within one compiled shape: not on the pages, the row, or where chunks begin."""
    table, chunks = shuffled_table(rng, 2), [(0, 16, 16), (16, 32, 16)]
    want = server.run(server.pools(), table, chunks)
    assert np.array_equal(server.run(server.pools(), shuffled_table(rng, 2), chunks), want)
    shifted = [(0, 5, 16), (5, 20, 16), (20, 32, 16)]
    assert np.array_equal(server.run(server.pools(), table, shifted), want)
    mirrored = replace(server, tokens=server.tokens[::-1])
    assert np.array_equal(mirrored.run(server.pools(), table, chunks)[::-1], want)


def test_result_does_not_depend_on_the_tables_width(make_mesh, rng):
    params, extend = decoder.init_params(SMALL, make_mesh(), 0, jnp.float32), decoder.make_extend(SMALL, make_mesh(), 8)
    table, tokens = shuffled_table(rng, 2), rng.integers(0, SMALL.vocab_size, (2, 12)).astype(np.int32)
    logits = []
    for width in (WIDTH, 70):
        wide = np.full((2, width), NUM_PAGES, np.int32)
        wide[:, :WIDTH] = table
        logits.append(extend(params, zero_pools(SMALL, make_mesh()), make_batch(tokens, wide, 0, 12, 12))[0])
    assert np.array_equal(*map(np.asarray, logits))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_repeated_heads_and_padded_layers(make_mesh, rng, axis_type):
    """Two kv heads on tp 4, three layers on pp 2: the same numbers as on one device."""
    tokens, table = rng.integers(0, SMALL.vocab_size, (2, 12)).astype(np.int32), shuffled_table(rng, 2)
    logits = []
    for mesh in (make_mesh(), make_mesh(1, 4, 2, axis_type=axis_type)):
        extend, pools = decoder.make_extend(SMALL, mesh, PAGE_TOKENS), zero_pools(SMALL, mesh)
        params = decoder.init_params(SMALL, mesh, 3, jnp.float32)
        for start in (0, 6):
            out, pools = extend(params, pools, make_batch(tokens, table, start, start + 6, 6))
        logits.append(np.asarray(out))
        assert extend._cache_size() == 1
    assert np.abs(logits[0] - logits[1]).max() <= TOLERANCE
    assert np.abs(logits[0]).max() > 0.1


def test_tied_embeddings_and_bfloat16(make_mesh, rng):
    cfg = replace(SMALL, tie_embeddings=True)
    params = decoder.init_params(cfg, make_mesh(), 0, jnp.bfloat16)
    assert "head" not in params
    tokens, pools = rng.integers(0, cfg.vocab_size, (2, 6)).astype(np.int32), zero_pools(cfg, make_mesh())
    batch = make_batch(tokens, shuffled_table(rng, 2), 0, 6, 6)
    logits, _ = decoder.make_extend(cfg, make_mesh(), PAGE_TOKENS)(params, pools, batch)
    assert logits.dtype == jnp.float32
    assert np.isfinite(np.asarray(logits)).all()


def test_components_describe_the_pool():
    (full,) = decoder.components(SMALL, 16, "bfloat16")
    (kv,) = full.fields
    assert (full.name, kv.name, kv.dtype) == ("full", "kv", "bfloat16")
    assert kv.shape == (3, 2, 16, 2, 4)
    assert kv.axes == ("layers", None, "slots", "heads", None)


PUBLISHED = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "tie_word_embeddings": False,
}


def test_config_of_a_published_model():
    cfg = qwen3.Qwen3Config.from_hf(PUBLISHED)
    assert (cfg.num_layers, cfg.num_kv_heads, cfg.mlp_size) == (48, 4, 768)
    assert (cfg.num_experts, cfg.experts_per_token, cfg.rope_theta) == (128, 8, 1e6)
    nested = {**PUBLISHED, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}, "num_local_experts": 128}
    del nested["rope_theta"], nested["num_experts"]
    assert qwen3.Qwen3Config.from_hf(nested) == cfg


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"use_sliding_window": True},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
    ],
    ids=lambda change: next(iter(change)),
)
def test_config_refuses_what_is_not_computed(change):
    with pytest.raises(ValueError, match="does not support"):
        qwen3.Qwen3Config.from_hf({**PUBLISHED, **change})


@pytest.mark.parametrize(
    ("change", "shape", "page_tokens", "message"),
    [
        ({}, (2, 1, 1), 7, "page_tokens=7 must be a multiple of cp=2"),
        (
            {"num_heads": 6, "num_kv_heads": 3},
            (1, 2, 1),
            8,
            r"tp=2 does not divide 6 heads, 3 kv heads.*may be one of \[1\]",
        ),
        ({"vocab_size": 33}, (1, 2, 1), 8, r"33 tokens.*may be one of \[1\]"),
        ({"mlp_size": 12}, (1, 8, 1), 8, r"12 mlp entries.*may be one of \[1, 2, 4\]"),
    ],
)
def test_meshes_that_do_not_fit(make_mesh, change, shape, page_tokens, message):
    cfg = replace(SMALL, **change)
    with pytest.raises(ValueError, match=message):
        decoder.make_extend(cfg, make_mesh(*shape), page_tokens)


@pytest.mark.parametrize("change", [{"num_kv_heads": 3}, {"head_dim": 5}, {"experts_per_token": 2}])
def test_configs_that_make_no_sense(change):
    with pytest.raises(ValueError, match="must"):
        replace(SMALL, **change)
