"""Loading published folders: every stored form gives the same parameters, every defect a clear error."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from models import decoder
from models.families import qwen3
from models.loading import load_model
from models.paged_attention import ExtendBatch

GOLDENS = Path(__file__).parent.parent / "goldens"
BLOCK = (16, 24)  # neither divides every weight
K_PROJ = "model.layers.0.self_attn.k_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of the golden that a test may spoil."""
    return Path(shutil.copytree(GOLDENS / "qwen3", tmp_path / "model"))


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    return load_file(GOLDENS / "qwen3" / "model.safetensors")


def write_tensors(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file(tensors, folder / "model.safetensors")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def edit_header(folder: Path, name: str, **changes: object) -> None:
    """Changes one entry of the header, and nothing of the data."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    stop = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:stop])
    header[name] = {**header[name], **changes}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[stop:])


def expand(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """One scale per block -> one per entry."""
    return np.repeat(np.repeat(scale, BLOCK[0], 0), BLOCK[1], 1)[: shape[0], : shape[1]]


def quantise(tensors: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The layers' matrices in block-fp8 with their scales; and what they mean, in fp32."""
    stored, meaning = {}, {}
    for name, value in tensors.items():
        stored[name] = meaning[name] = value
        if value.ndim != 2 or "proj" not in name:
            continue
        blocks = [-(-n // block) for n, block in zip(value.shape, BLOCK, strict=True)]
        scale = (0.01 + 0.001 * np.arange(np.prod(blocks), dtype=np.float32)).reshape(blocks)
        stored[name] = (value / expand(scale, value.shape)).astype(ml_dtypes.float8_e4m3fn)
        stored[name + "_scale_inv"] = scale
        meaning[name] = stored[name].astype(np.float32) * expand(scale, value.shape)
    return stored, meaning


def assert_same(a: decoder.Params, b: decoder.Params) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "nemotron_h"])
def test_shards_are_where_the_model_wants_them(make_mesh, family):
    _, whole = load_model(GOLDENS / family, make_mesh(), jnp.float32)
    mesh = make_mesh(2, 2, 2)
    cfg, params = load_model(GOLDENS / family, mesh, jnp.float32)
    assert_same(params, whole)
    targets = decoder.param_targets(cfg, mesh, jnp.float32)
    jax.tree.map(lambda param, target: param.sharding == target.sharding or pytest.fail(str(target)), params, targets)


def test_axes_are_those_of_the_published_names(make_mesh, tensors):
    _, params = load_model(GOLDENS / "qwen3", make_mesh(), jnp.float32)
    k_proj = tensors[K_PROJ].reshape(2, 16, 64)  # kv_heads, head_dim, hidden
    np.testing.assert_array_equal(np.asarray(params["layers"]["full"]["attention"]["wk"])[0], k_proj.transpose(2, 0, 1))
    np.testing.assert_array_equal(np.asarray(params["embed"]), tensors["model.embed_tokens.weight"])


def test_parts_of_one_tensor_and_blocks_that_differ(make_mesh):
    """Of Nemotron-H's five layers two blocks are made: mamba, moe, mamba; attention, mlp."""
    _, params = load_model(GOLDENS / "nemotron_h", make_mesh(), jnp.float32)
    tensors = load_file(GOLDENS / "nemotron_h" / "model.safetensors")
    state = {name: np.asarray(x) for name, x in params["layers"]["state"]["mixer"].items() if name != "out_norm"}
    rows = tensors["backbone.layers.2.mixer.in_proj.weight"]  # z 128, x 128, b and c 2 x 32, dt 8
    np.testing.assert_array_equal(state["wx"][1].reshape(64, 128), rows[128:256].T)
    np.testing.assert_array_equal(state["wbc"][1].reshape(64, 64), rows[256:320].T)
    np.testing.assert_array_equal(state["wdt"][1], rows[320:].T)
    kernel = tensors["backbone.layers.0.mixer.conv1d.weight"]
    np.testing.assert_array_equal(state["bc_kernel"][0].reshape(64, 4), kernel[128:, 0])
    assert len(state["wx"]) == 4 and not state["wx"][2:].any()
    full = np.asarray(params["layers"]["full"]["mixer"]["wo"])
    assert len(full) == 2 and not full[0].any() and full[1].any()


def test_repeated_heads_and_padded_layers(make_mesh):
    _, whole = load_model(GOLDENS / "qwen3", make_mesh(), jnp.float32)
    _, params = load_model(GOLDENS / "qwen3", make_mesh(1, 4, 1), jnp.float32)
    wk = np.asarray(whole["layers"]["full"]["attention"]["wk"])
    np.testing.assert_array_equal(np.asarray(params["layers"]["full"]["attention"]["wk"]), np.repeat(wk, 2, axis=2))
    _, params = load_model(GOLDENS / "qwen3", make_mesh(1, 1, 4), jnp.float32)
    padded = np.asarray(params["layers"]["full"]["attention"]["wk"])
    np.testing.assert_array_equal(padded[:2], wk)
    assert not padded[2:].any()


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bf16", "fp16"])
def test_half_precision(make_mesh, folder, tensors, dtype):
    write_tensors(folder, {name: value.astype(dtype) for name, value in tensors.items()})
    _, params = load_model(folder, make_mesh(2, 2, 2), jnp.float32)
    write_tensors(folder, {name: value.astype(dtype).astype(np.float32) for name, value in tensors.items()})
    assert_same(params, load_model(folder, make_mesh(), jnp.float32)[1])
    _, params = load_model(folder, make_mesh(), jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_block_fp8_means_weight_times_scale(make_mesh, folder, tensors):
    """Equal parameters, so equal logits; on a mesh whose shards cut through the blocks."""
    stored, meaning = quantise(tensors)
    write_tensors(folder, meaning)
    cfg, want = load_model(folder, make_mesh(), jnp.float32)
    write_tensors(folder, stored)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": BLOCK})
    _, params = load_model(folder, make_mesh(), jnp.float32)
    assert_same(params, want)
    assert_same(load_model(folder, make_mesh(2, 2, 2), jnp.float32)[1], want)
    assert np.abs(logits(cfg, make_mesh(), params) - logits(cfg, make_mesh(), want)).max() == 0


def logits(cfg: qwen3.Qwen3Config, mesh: jax.sharding.Mesh, params: decoder.Params) -> np.ndarray:
    """Of 8 tokens in one page."""
    pool = jnp.zeros((1, cfg.num_layers, 2, 8, cfg.num_kv_heads, cfg.head_dim), jnp.float32)
    at = np.arange(8, dtype=np.int32)[None]
    start, num_new = np.zeros(1, np.int32), np.full(1, 8, np.int32)
    batch = ExtendBatch(at + 3, start, num_new, {"full": np.zeros((1, 1), np.int32)}, at)
    return np.asarray(decoder.make_extend(cfg, mesh, 8)(params, {"full": {"kv": pool}}, batch)[0])


def test_index_names_the_files(make_mesh, folder, tensors):
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    save_file({"stray": np.zeros(1, np.float32)}, folder / "other.safetensors")
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _, want = load_model(GOLDENS / "qwen3", make_mesh(), jnp.float32)
    assert_same(load_model(folder, make_mesh(), jnp.float32)[1], want)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing files .*model-00002-of-00002"):
        load_model(folder, make_mesh(), jnp.float32)


def refuse(folder: Path, make_mesh, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(folder, make_mesh(), jnp.float32)


def test_missing_tensor(make_mesh, folder, tensors):
    del tensors[K_PROJ]
    write_tensors(folder, tensors)
    refuse(folder, make_mesh, f"no tensor '{K_PROJ}'")


def test_missing_scale(make_mesh, folder, tensors):
    stored, _ = quantise(tensors)
    del stored[K_PROJ + "_scale_inv"]
    write_tensors(folder, stored)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": BLOCK})
    refuse(folder, make_mesh, f"no tensor '{K_PROJ}_scale_inv'")


def test_wrong_shape(make_mesh, folder, tensors):
    write_tensors(folder, {**tensors, K_PROJ: tensors[K_PROJ].T.copy()})
    refuse(folder, make_mesh, r"k_proj.weight' has shape \(64, 32\), not \(32, 64\)")


def test_unknown_dtype(make_mesh, folder):
    edit_header(folder, K_PROJ, dtype="F4")
    refuse(folder, make_mesh, "has dtype F4, none of")


def test_bytes_that_do_not_fit_the_shape(make_mesh, folder):
    edit_header(folder, K_PROJ, dtype="F16")
    refuse(folder, make_mesh, "has 8192 bytes, not 4096")


def test_offsets_outside_the_file(make_mesh, folder):
    edit_header(folder, K_PROJ, data_offsets=[-8, 8184])
    refuse(folder, make_mesh, "truncated: tensor")


@pytest.mark.parametrize(
    ("num_bytes", "message"), [(4, "no safetensors file"), (100, "the header ends at"), (-1, "truncated: tensor")]
)
def test_truncated_file(make_mesh, folder, num_bytes, message):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:num_bytes])
    refuse(folder, make_mesh, message)


def test_header_that_is_no_json(make_mesh, folder):
    (folder / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"{{{{")
    refuse(folder, make_mesh, "the header is no JSON")


def test_no_files(make_mesh, folder):
    (folder / "model.safetensors").unlink()
    refuse(folder, make_mesh, "missing files")


def test_tensor_in_two_files(make_mesh, folder):
    shutil.copy(folder / "model.safetensors", folder / "copy.safetensors")
    refuse(folder, make_mesh, "is in another file too")


def test_unknown_family(make_mesh, folder):
    edit_config(folder, model_type="gpt2")
    refuse(folder, make_mesh, "model_type 'gpt2' is none of")


DOWN = "model.layers.0.mlp.experts.down_proj"


@pytest.fixture
def packed_folder(tmp_path) -> Path:
    """gpt-oss with experts in MXFP4, to be spoilt; test_goldens compares its logits with the reference's."""
    return Path(shutil.copytree(GOLDENS / "gpt_oss_mxfp4", tmp_path / "model"))


def test_mxfp4_is_cut_where_the_mesh_cuts(make_mesh, packed_folder):
    """96 inputs of `down` over tp=4: a shard begins inside a group of 32."""
    _, whole = load_model(packed_folder, make_mesh(), jnp.float32)
    _, params = load_model(packed_folder, make_mesh(1, 4, 2), jnp.float32)
    for kind in ("full", "window"):
        down = [np.asarray(loaded["layers"][kind]["mlp"]["down"]) for loaded in (params, whole)]
        np.testing.assert_array_equal(*down)
        assert len(np.unique(np.abs(down[1]))) > 8


def test_missing_scales(make_mesh, packed_folder):
    tensors = load_file(packed_folder / "model.safetensors")
    del tensors[DOWN + "_scales"]
    write_tensors(packed_folder, tensors)
    refuse(packed_folder, make_mesh, f"no tensor '{DOWN}_scales'")


def test_packed_tensors_of_a_wrong_shape(make_mesh, packed_folder):
    tensors = load_file(packed_folder / "model.safetensors")
    write_tensors(packed_folder, {**tensors, DOWN + "_blocks": tensors[DOWN + "_blocks"][:, :, :2].copy()})
    refuse(packed_folder, make_mesh, rf"{DOWN}_blocks' has shape \(4, 64, 2, 16\), not \(4, 64, 3, 16\)")


def test_inputs_that_make_no_whole_groups(make_mesh, packed_folder):
    edit_config(packed_folder, intermediate_size=40)
    refuse(packed_folder, make_mesh, r"mlp.experts.down_proj_blocks': 40 inputs are not whole groups of 32")


@pytest.mark.parametrize("change", [{"quant_method": "gptq"}, {"quant_method": "fp8", "weight_block_size": None}])
def test_unknown_quantisation(make_mesh, folder, change):
    edit_config(folder, quantization_config=change)
    refuse(folder, make_mesh, "must be fp8 with a weight_block_size, or mxfp4")
