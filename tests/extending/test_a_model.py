"""A new family of models is one file: the two classes here, were they in the folder models/families.

Qwen2 is Llama with biases on queries, keys and values.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array
from safetensors.numpy import save_file

import jaxcache
from models import decoder
from models.decoder import DecoderConfig, published_sizes, refuse_unsupported
from models.layers import GatedMlp, HeldFields, PreNormLayer, Projections, Step, drawn, project, rotate
from models.loading import load_model
from models.paged_attention import attend, write
from models.stored import Stored, stored_decoder, stored_mlp
from tests.models.serving import PAGE_TOKENS, Driver, Rig, check_equal, random_tokens, reference, rig_on


@dataclass(frozen=True)
class Qwen2Config(DecoderConfig, model_types=("my_qwen2",)):
    def layer(self, kind: str) -> PreNormLayer:
        mlp = GatedMlp(self.hidden_size, self.mlp_size, jax.nn.silu)
        return PreNormLayer(Attention(self, kind), mlp, self.hidden_size, self.rms_norm_eps)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> Qwen2Config:
        supported = {"hidden_act": hf["hidden_act"] == "silu", "use_sliding_window": not hf.get("use_sliding_window")}
        refuse_unsupported("Qwen2", hf, supported)
        sizes = {"mlp_size": hf["intermediate_size"], "rope_theta": hf["rope_theta"]}
        return cls(**published_sizes(hf), **sizes, tie_embeddings=hf.get("tie_word_embeddings", False))

    def checkpoint(self) -> dict[str, Stored]:
        name = "model.layers.{l}.self_attn.%s_proj.bias"
        heads = {"q": "hc", "k": "kc", "v": "kc"}
        biases = {f"layers.attention.b{x}": Stored(name % x, axes, "l" + axes) for x, axes in heads.items()}
        return stored_decoder(self.tie_embeddings) | stored_mlp() | biases


class Attention(Projections):
    """Grouped-query attention over pages; heads over tp, token slots of each page over cp."""

    def __init__(self, cfg: Qwen2Config, component: str):
        super().__init__(cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim)
        self.component = component
        self.bq = drawn((cfg.num_heads, cfg.head_dim), ("tp", None), 0.0, 0.1)
        self.bk, self.bv = (drawn((cfg.num_kv_heads, cfg.head_dim), ("tp", None), 0.0, 0.1) for _ in range(2))

    def __call__(self, h: Array, held: HeldFields, step: Step) -> tuple[Array, HeldFields]:
        view = step.views[self.component]
        q, k, v = (x + bias[None, None] for x, bias in zip(self.qkv(h), (self.bq, self.bk, self.bv), strict=True))
        kv = write(held["kv"], view.pages, jnp.stack([rotate(k, view), v], axis=2))
        out = attend(rotate(q, view), kv, view.pages).astype(h.dtype)
        return project("bthc,hcd->btd", out, self.wo), {"kv": kv}


HF: dict[str, Any] = {
    "model_type": "my_qwen2",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
}
HEAD = HF["hidden_size"] // HF["num_attention_heads"]
Tensors = dict[str, np.ndarray]


def published() -> Tensors:
    """What a publisher's file holds, drawn at random."""
    rng, d, f, kv = np.random.default_rng(5), HF["hidden_size"], HF["intermediate_size"], 2 * HEAD
    shapes = {"model.embed_tokens.weight": (64, d), "model.norm.weight": (d,), "lm_head.weight": (64, d)}
    for layer in (f"model.layers.{i}." for i in range(3)):
        rows = {"q": d, "k": kv, "v": kv}
        shapes |= {f"{layer}self_attn.{x}_proj.weight": (n, d) for x, n in rows.items()}
        shapes |= {f"{layer}self_attn.{x}_proj.bias": (n,) for x, n in rows.items()}
        shapes |= {f"{layer}self_attn.o_proj.weight": (d, d), f"{layer}mlp.down_proj.weight": (d, f)}
        shapes |= {f"{layer}mlp.{x}_proj.weight": (f, d) for x in ("gate", "up")}
        shapes |= {f"{layer}{x}_layernorm.weight": (d,) for x in ("input", "post_attention")}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def logits_of(tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """f32[tokens, V]: the model as its publisher describes it, in numpy and without a cache."""

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + HF["rms_norm_eps"]) * tensors[name]

    def heads(x: np.ndarray, name: str) -> np.ndarray:
        return (x @ tensors[name + ".weight"].T + tensors[name + ".bias"]).reshape(len(x), -1, HEAD)

    def rotated(x: np.ndarray) -> np.ndarray:
        angles = np.arange(len(x))[:, None] * HF["rope_theta"] ** (-np.arange(0, HEAD, 2) / HEAD)
        cos, sin = (np.tile(turn(angles), 2)[:, None] for turn in (np.cos, np.sin))
        return x * cos + np.concatenate([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1) * sin

    h = tensors["model.embed_tokens.weight"][tokens]
    hidden = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    for layer in (f"model.layers.{i}." for i in range(HF["num_hidden_layers"])):
        x = norm(h, layer + "input_layernorm.weight")
        q, k, v = (heads(x, f"{layer}self_attn.{name}_proj") for name in "qkv")
        k, v = (np.repeat(y, q.shape[1] // k.shape[1], 1) for y in (rotated(k), v))
        scores = np.einsum("qhc,khc->hqk", rotated(q), k) * HEAD**-0.5 + hidden
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hqk,khc->qhc", shares / shares.sum(-1, keepdims=True), v)
        h = h + out.reshape(len(x), -1) @ tensors[layer + "self_attn.o_proj.weight"].T
        x = norm(h, layer + "post_attention_layernorm.weight")
        gate, up = (x @ tensors[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        h = h + (gate / (1 + np.exp(-gate)) * up) @ tensors[layer + "mlp.down_proj.weight"].T
    return norm(h, "model.norm.weight") @ tensors["lm_head.weight"].T


@pytest.fixture
def folder(tmp_path) -> Path:
    save_file(published(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(HF))
    return tmp_path


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_its_logits_are_the_publishers(make_mesh, folder, shape):
    """Of a prompt, in chunks of 16 tokens over pages of 4, and of what it is continued with."""
    mesh = make_mesh(*shape)
    cfg, params = load_model(folder, mesh, jnp.float32)
    rig = Rig(mesh, params, decoder.make_extend(cfg, mesh, PAGE_TOKENS), cfg)
    tokens = random_tokens(3, 45)
    with rig.cache() as cache:
        answer = Driver(rig, cache).ask(tokens)
    said = logits_of(published(), np.concatenate([tokens, answer.tokens]).astype(np.int64))
    np.testing.assert_allclose(answer.logits, said[44 : 44 + len(answer.logits)], atol=2e-4)


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_a_hit_equals_a_miss(make_mesh, shape):
    """From the device, from host memory and from storage."""
    rig, tokens = rig_on(make_mesh(*shape), Qwen2Config.from_hf(HF)), random_tokens(1, 45)
    storage = jaxcache.MemoryStorage()
    want = reference(rig.mesh, tuple(tokens.tolist()), rig.model)
    with rig.cache(storage) as cache:
        driver = Driver(rig, cache)
        driver.ask(tokens)
        on_device = driver.ask(tokens)
        driver.drain()
        driver.fill_device()
        in_host = driver.ask(tokens)
    with rig.cache(storage) as cache:
        stored = Driver(rig, cache).ask_storage(tokens)
    assert [answer.hits for answer in (on_device, in_host, stored)] == [(44, 0, 0), (0, 44, 0), (0, 0, 44)]
    for answer in (on_device, in_host, stored):
        check_equal(answer, want)
