"""DeepSeek-V3.2's configuration, what its pages hold, how keys are chosen, and how entries are packed."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from models import decoder, entries
from models.families.deepseek_v32 import DeepseekV32Config
from models.loading import load_model
from models.packing import GROUP, Packing
from models.paged_attention import BLOCK_TOKENS, ExtendBatch, Held, plan_pages
from tests.models.families import LATENTS
from tests.models.steps import PAGE_TOKENS, TOLERANCE, make_batch, shuffled_tables, zero_pools
from tests.models.test_published_sizes import DEEPSEEK_V32

GOLDEN = Path(__file__).parent.parent / "goldens" / "deepseek_v32"


def test_published_config():
    cfg = DeepseekV32Config.from_hf(DEEPSEEK_V32)
    assert cfg.layer_kinds == ("dense",) * 3 + ("sparse",) * 58
    assert (cfg.head_dim, cfg.shared_size, cfg.index_top_k) == (192, 2048, 2048)
    grown = 0.1 * np.log(40) + 1
    assert np.isclose(cfg.score_scale, 192**-0.5 * grown**2)
    rope = cfg.rope("full")
    assert rope.scale == 1 and len(rope.frequencies) == 32
    num_params = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(published_shapes(cfg)))
    assert 670e9 < num_params < 674e9


def published_shapes(cfg: DeepseekV32Config) -> decoder.Params:
    """Of one layer of each kind times their number: in a stack each kind has room for every layer."""
    shapes = decoder.abstract_params(cfg)
    plan = decoder.LayerPlan(cfg)
    for kind, layers in shapes["layers"].items():
        n = sum(layer >= 0 for layer in plan.layers_of(kind))
        shapes["layers"][kind] = jax.tree.map(
            lambda leaf, n=n: jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype), layers
        )
    return shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type="),
        ({"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ({"topk_method": "greedy"}, "topk_method='greedy'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ({"q_lora_rank": None}, "q_lora_rank=None"),
        ({"mlp_layer_types": ["sparse"] * 61}, "mlp_layer_types="),
        ({"layer_types": ["full_attention"] * 61}, "layer_types="),
        ({"index_topk": 0}, "self.index_top_k=0 must be at least 1"),
        ({"index_head_dim": 32}, "self.rotated_size=64 must be .* at most self.index_size=32"),
        ({"n_group": 7}, "7 groups"),
        ({"num_experts_per_tok": 129}, "129 of 128 experts"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_what_is_not_computed_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        DeepseekV32Config.from_hf({**DEEPSEEK_V32, **change})


def test_a_mesh_that_does_not_divide_is_refused(make_mesh):
    cfg = replace(LATENTS["deepseek_v32"], index_heads=15)
    with pytest.raises(ValueError, match=r"tp=2 does not divide 4 heads, .*15 index heads"):
        decoder.make_extend(cfg, make_mesh(1, 2, 1), PAGE_TOKENS)


def test_fp8_weights_mean_weight_times_scale(make_mesh, tmp_path):
    """Whatever is a matrix there, in blocks that cut no shape evenly; equal parameters on one device and eight."""
    tensors, block = load_file(GOLDEN / "model.safetensors"), (20, 28)
    stored, meaning = dict(tensors), dict(tensors)
    for name in [name for name, value in tensors.items() if value.ndim == 2 and ".layers." in name]:
        rows, columns = (np.arange(n) // size for n, size in zip(tensors[name].shape, block, strict=True))
        scales = np.linspace(0.01, 0.02, (rows[-1] + 1) * (columns[-1] + 1), dtype=np.float32)
        scales = scales.reshape(rows[-1] + 1, columns[-1] + 1)
        each = scales[rows[:, None], columns[None]]
        stored[name] = (tensors[name] / each).astype(ml_dtypes.float8_e4m3fn)
        stored[name + "_scale_inv"], meaning[name] = scales, stored[name].astype(np.float32) * each
    folders = []
    for label, content in (("stored", stored), ("meaning", meaning)):
        folders.append(tmp_path / label)
        folders[-1].mkdir()
        save_file(content, folders[-1] / "model.safetensors")
        quantised = {"quantization_config": {"quant_method": "fp8", "weight_block_size": block}}
        config = json.loads((GOLDEN / "config.json").read_text()) | (quantised if label == "stored" else {})
        (folders[-1] / "config.json").write_text(json.dumps(config))
    _, want = load_model(folders[1], make_mesh(), jnp.float32)
    for shape in ((1, 1, 1), (2, 2, 2)):
        _, params = load_model(folders[0], make_mesh(*shape), jnp.float32)
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, want)


@pytest.mark.slow
@pytest.mark.mutation
def test_every_parameter_counts(make_mesh, rng):
    """Its last axis reversed, the logits are not the golden's any more."""
    mesh, reference = make_mesh(), np.load(GOLDEN / "reference.npz")
    cfg, params = load_model(GOLDEN, mesh, jnp.float32)
    extend, tables = decoder.make_extend(cfg, mesh, PAGE_TOKENS), shuffled_tables(cfg, rng, 2)
    batch = make_batch(reference["tokens"].astype(np.int32), tables, 0, 16, 16)

    def error(params: decoder.Params) -> float:
        return float(np.abs(extend(params, zero_pools(cfg, mesh), batch)[0] - reference["logits"][:, :16]).max())

    assert error(params) <= TOLERANCE
    leaves, treedef = jax.tree.flatten(params)
    for i, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(params)):
        turned = jax.tree.unflatten(treedef, [*leaves[:i], leaf[..., ::-1], *leaves[i + 1 :]])
        assert error(turned) > 10 * TOLERANCE, jax.tree_util.keystr(path)


# ---- which keys are chosen


def chosen_on(mesh: jax.sharding.Mesh, arrays: tuple[np.ndarray, ...], table: np.ndarray, top_k: int) -> np.ndarray:
    """`choose_entries` of 6 tokens from position 27 on, one row; index keys [64, C] lie in the pages of the table."""
    q, weights, keys = arrays
    num_pages = 1 + table.max()
    pool = np.full((num_pages, 1, PAGE_TOKENS, keys.shape[-1]), 99, np.float32)
    pool[table[0, : len(keys) // PAGE_TOKENS], 0] = keys.reshape(-1, PAGE_TOKENS, keys.shape[-1])
    numbers = (np.array([27], np.int32), np.array([6], np.int32))
    batch = ExtendBatch(np.zeros((1, 6), np.int32), *numbers, {"full": table}, np.zeros((1, 1), np.int32))
    specs = (P(None, None, "tp"), P(None, None, "tp"), P(None, None, "cp"), P())

    @partial(jax.shard_map, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    def choose(q, weights, pool, batch):
        pages = plan_pages(batch, "full", int(num_pages), PAGE_TOKENS, BLOCK_TOKENS)
        return entries.choose_entries(q, weights, Held(pool, (0,)), pages, top_k)

    return np.asarray(jax.jit(choose)(q, weights, pool, batch))[0]


def small_numbers(rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Whole ones, so that scores are exact and many tie; queries [1, 6, 4, 3], weights [1, 6, 4], keys [64, 3]."""
    return tuple(rng.integers(-1, 2, shape).astype(np.float32) for shape in ((1, 6, 4, 3), (1, 6, 4), (64, 3)))


def chosen_one_by_one(arrays: tuple[np.ndarray, ...], top_k: int) -> list[list[int]]:
    """The positions that each token reads: the best, and of equals the oldest."""
    q, weights, keys = arrays
    scores = (np.maximum(np.einsum("tic,mc->tim", q[0], keys), 0) * weights[0][..., None]).sum(axis=1)
    return [sorted(sorted(range(28 + t), key=lambda m, t=t: (-scores[t, m], m))[:top_k]) for t in range(6)]


@pytest.mark.parametrize(
    "shape", [(2, 2, 1), *(pytest.param(s, marks=pytest.mark.slow) for s in ((1, 1, 1), (4, 1, 1)))], ids=str
)
def test_the_best_keys_are_chosen_and_of_equals_the_oldest(make_mesh, rng, shape):
    """On ranks that hold other slots and other index heads, from tables of any width, of pages in any order."""
    arrays = small_numbers(rng)
    for width, top_k in ((8, 9), (70, 9), (8, 1000)):
        table = np.concatenate([rng.permutation(8), np.arange(8, width)]).astype(np.int32)[None]
        chosen = chosen_on(make_mesh(*shape), arrays, table, top_k)
        assert [np.flatnonzero(row).tolist() for row in chosen] == chosen_one_by_one(arrays, top_k)


@pytest.mark.mutation
def test_keys_in_the_order_of_ranks_show(make_mesh, rng, monkeypatch):
    """Scores put together rank by rank, not by position: ties and positions are wrong."""
    arrays, table = small_numbers(rng), np.arange(8, dtype=np.int32)[None]

    def by_rank(pages, i):
        num_local = pages.key_offsets.shape[0]
        return i * pages.block_tokens + jax.lax.axis_index("cp") * num_local + jnp.arange(num_local)

    monkeypatch.setattr(entries, "key_positions", by_rank)
    chosen = chosen_on(make_mesh(2, 1, 1), arrays, table, 9)
    assert [np.flatnonzero(row).tolist() for row in chosen] != chosen_one_by_one(arrays, 9)


def test_zeros_of_both_signs_tie():
    scores, visible = jnp.array([[[-0.0, 0.0, -0.0, 0.0, -1.0]]]), jnp.array([[[False, True, True, True, True]]])
    best = jax.jit(entries.best_visible, static_argnums=2)
    assert np.flatnonzero(best(scores, visible, 2)).tolist() == [1, 2]
    assert np.flatnonzero(best(scores, visible, 9)).tolist() == [1, 2, 3, 4]


# ---- packed entries


@pytest.mark.parametrize("packing", [Packing(512, 64), Packing(128), Packing(200, 6)], ids=str)
def test_packed_numbers_are_near(rng, packing):
    """fp8 within 1/16 of a number, or 1/1024 of a step below the largest of 128; bf16 within 1/256."""
    n = packing.scaled + packing.exact
    numbers = (rng.standard_normal((3, 5, n)) * 10.0 ** rng.integers(-9, 9, (3, 5, 1))).astype(np.float32)
    numbers[0, 0] = 0
    packed = jax.jit(packing.pack)(numbers)
    assert packed.shape == (3, 5, packing.num_bytes) and packed.dtype == jnp.uint8
    got = np.asarray(jax.jit(packing.unpack)(packed))
    error, scaled = np.abs(got - numbers), packing.scaled
    for start in range(0, scaled, GROUP):
        group = slice(start, min(start + GROUP, scaled))
        largest = np.abs(numbers[..., group]).max(axis=-1, keepdims=True)
        assert (error[..., group] <= np.maximum(np.abs(numbers[..., group]) / 16, largest / 448 / 1024)).all()
    assert (error[..., scaled:] <= np.abs(numbers[..., scaled:]) / 256).all()
    assert not got[0, 0].any()


@pytest.mark.slow
def test_packed_in_bfloat16(make_mesh, rng):
    """As it is served: parameters in bf16, pages of bytes; near what plain pages give, and not the same."""
    mesh, logits = make_mesh(), []
    tokens = rng.integers(0, 64, (2, 6)).astype(np.int32)
    for name in ("deepseek_v32", "deepseek_v32_packed"):
        cfg = replace(LATENTS[name], index_top_k=6)
        params, pools = decoder.init_params(cfg, mesh, 0, jnp.bfloat16), zero_pools(cfg, mesh)
        batch = make_batch(tokens, shuffled_tables(cfg, np.random.default_rng(0), 2), 0, 6, 6)
        out, pools = decoder.make_extend(cfg, mesh, PAGE_TOKENS)(params, pools, batch)
        logits.append(np.asarray(out))
    assert logits[0].dtype == np.float32 and {pool.dtype for pool in pools["full"].values()} == {jnp.dtype("uint8")}
    error = np.abs(logits[0] - logits[1]).mean() / logits[0].std()
    assert 0 < error < 0.05, error
