"""GGUF files made of the goldens: the same parameters as from safetensors, and a clear error for every defect."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from models.gguf_file import LAYER_NAMES, NORM_NAMES, TOP_NAMES
from models.loading import load_model

GOLDENS = Path(__file__).parent.parent / "goldens"
ARCHITECTURES = {"llama": "llama", "llama_3_heads": "llama", "gemma3": "gemma3"}  # by golden
Q8_0, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F32


def stored_name(architecture: str, name: str) -> str:
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    _, _, layer, rest = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{(LAYER_NAMES | NORM_NAMES[architecture])[rest]}.weight"


def stored(architecture: str, hf: dict, name: str, value: np.ndarray) -> np.ndarray:
    """As converters write it: Llama's heads with their halves taking turns, Gemma's norms with their 1."""
    if architecture == "gemma3" and "norm" in name:
        return value + np.float32(1)
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        half = hf["head_dim"] // 2
        return value.reshape(-1, 2, half, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
    return value


def quantised(values: np.ndarray) -> np.ndarray:
    """What a Q8_0 tensor of these values means; they need rows of a multiple of 32."""
    return gguf.quants.dequantize(gguf.quants.quantize(values, Q8_0), Q8_0)


def write_gguf(path: Path, golden: str, quantise: bool = False, **keys: object) -> dict[str, np.ndarray]:
    """Writes the golden; returns what its tensors mean, under their published names. keys: of the header, changed"""
    architecture, folder = ARCHITECTURES[golden], GOLDENS / golden
    hf, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    rope = hf["rope_parameters"]
    header = {
        "block_count": hf["num_hidden_layers"],
        "embedding_length": hf["hidden_size"],
        "feed_forward_length": hf["intermediate_size"],
        "attention.head_count": hf["num_attention_heads"],
        "attention.head_count_kv": hf["num_key_value_heads"],
        "attention.key_length": hf["head_dim"],
        "attention.layer_norm_rms_epsilon": float(hf["rms_norm_eps"]),
        "rope.freq_base": float(rope.get("full_attention", rope)["rope_theta"]),
        **({"attention.sliding_window": hf["sliding_window"]} if architecture == "gemma3" else {}),
        **keys,
    }
    writer = gguf.GGUFWriter(path, str(header.pop("architecture", architecture)))
    for key, value in header.items():
        if value is not None:
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
    meaning = {}
    for name, value in tensors.items():
        is_quantised = quantise and value.ndim == 2 and value.shape[1] % 32 == 0
        meaning[name] = quantised(value) if is_quantised else value
        values = stored(architecture, hf, name, value)
        data = gguf.quants.quantize(values, Q8_0) if is_quantised else values
        writer.add_tensor(stored_name(architecture, name), data, raw_dtype=Q8_0 if is_quantised else F32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return meaning


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 2)], ids=str)
@pytest.mark.parametrize("golden", ARCHITECTURES)
def test_the_parameters_are_those_of_the_safetensors(tmp_path, make_mesh, golden, shape):
    write_gguf(tmp_path / "model.gguf", golden)
    mesh = make_mesh(*shape)
    want_cfg, want = load_model(GOLDENS / golden, mesh, jnp.float32)
    cfg, params = load_model(tmp_path / "model.gguf", mesh, jnp.float32)
    differing = {"query_scale", "local_rope_theta", "rms_norm_eps"}  # what the file cannot say, and fp32 of it
    assert {k: v for k, v in vars(cfg).items() if k not in differing} == {
        k: v for k, v in vars(want_cfg).items() if k not in differing
    }
    assert cfg.rms_norm_eps == np.float32(want_cfg.rms_norm_eps)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), params, want)


def test_quantised_rows_are_read_as_what_they_mean(tmp_path, make_mesh):
    meaning = write_gguf(tmp_path / "model.gguf", "llama", quantise=True)
    _, params = load_model(tmp_path / "model.gguf", make_mesh(1, 2, 1), jnp.float32)
    attention = params["layers"]["full"]["attention"]
    np.testing.assert_array_equal(np.asarray(params["embed"]), meaning["model.embed_tokens.weight"])
    for name, projection in (("wq", "q_proj"), ("wk", "k_proj"), ("wv", "v_proj")):
        want = meaning[f"model.layers.1.self_attn.{projection}.weight"]
        np.testing.assert_array_equal(np.asarray(attention[name])[1].reshape(64, -1), want.T)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def cut_in_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def of_another_kind(path: Path) -> None:
    path.write_bytes(b"PK" + path.read_bytes()[2:])


def of_an_unknown_quantisation(path: Path) -> None:
    """One whose number library `gguf` does not know."""
    data = path.read_bytes()
    at = data.index(b"output_norm.weight") + len(b"output_norm.weight") + 4 + 8  # after dimensions and one extent
    path.write_bytes(data[:at] + (250).to_bytes(4, "little") + data[at + 4 :])


@pytest.mark.parametrize(
    "spoil", [truncated, cut_in_the_header, of_another_kind, of_an_unknown_quantisation], ids=lambda f: f.__name__
)
def test_a_damaged_file_is_named(tmp_path, make_mesh, spoil: Callable[[Path], None]):
    path = tmp_path / "model.gguf"
    write_gguf(path, "llama")
    spoil(path)
    with pytest.raises(ValueError, match=r"model\.gguf: no GGUF file, or truncated"):
        load_model(path, make_mesh(), jnp.float32)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "mamba"}, r"architecture 'mamba' is none of \['gemma3', 'llama'\]"),
        ({"block_count": None}, "says nothing of 'llama.block_count'"),
        ({"block_count": 3}, r"no tensor 'blk\.2\."),
        ({"feed_forward_length": 80}, r"has shape .* not "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_is_named(tmp_path, make_mesh, keys, message):
    write_gguf(tmp_path / "model.gguf", "llama", **keys)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(tmp_path / "model.gguf", make_mesh(), jnp.float32)
    assert "model.gguf" in str(raised.value)


def test_a_file_that_is_missing_is_named(tmp_path, make_mesh):
    with pytest.raises(ValueError, match=r"nothing\.gguf"):
        load_model(tmp_path / "nothing.gguf", make_mesh(), jnp.float32)
