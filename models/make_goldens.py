"""Writes a tiny random checkpoint and the reference logits of Hugging Face transformers for it. Never imports jax.

    config.json         the published form of the family's configuration
    model.safetensors   fp32 weights under the published names
    reference.npz       tokens int64[2, 75], logits fp32[2, 75, vocab]

Runs in an environment of its own (Python 3.11, torch 2.13.0, transformers 5); the tests read only what it wrote:

    python models/make_goldens.py --model qwen3 --seed 0 --out tests/goldens/qwen3
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

BATCH, NUM_TOKENS = 2, 75
PREFILL_TOKENS = 40
OWN_TOLERANCE = 2e-5  # between the reference with its own cache and without
MAX_FILE_BYTES = 1_000_000
COMMON = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPARSE = "compressed_sparse"  # a kind of attention of deepseek_v4
EPSILON = {"rms_norm_eps": 1e-4}  # of no family, and large enough to show


def qwen3() -> transformers.PretrainedConfig:
    return transformers.Qwen3Config(**COMMON)


def qwen3_moe() -> transformers.PretrainedConfig:
    experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return transformers.Qwen3MoeConfig(**COMMON, **experts)


def llama() -> transformers.PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 100_000.0}
    return transformers.LlamaConfig(**{**COMMON, **EPSILON, "rope_parameters": rope, "tie_word_embeddings": True})


def llama_3_heads() -> transformers.PretrainedConfig:
    """Heads that divide neither by 2 nor by 4. The reference wants a hidden size that they divide: 96, not 64."""
    heads = {"num_attention_heads": 3, "num_key_value_heads": 1, "hidden_size": 96, "intermediate_size": 160}
    return transformers.LlamaConfig(**{**COMMON, **EPSILON, **heads})


def gemma3() -> transformers.PretrainedConfig:
    """Five layers with a window, then one without; the scale of the scores is not head_dim ** -0.5."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
    }
    own = {"num_hidden_layers": 6, "sliding_window": 8, "query_pre_attn_scalar": 24, "rope_parameters": rope}
    return transformers.Gemma3TextConfig(**{**COMMON, **EPSILON, **own})


def gpt_oss() -> transformers.PretrainedConfig:
    """Layers with a window of 8 and without, by turns. Of yarn and the limit only rope_theta has a usual value."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 8.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "truncate": False,
        "original_max_position_embeddings": 512,
    }
    own = {"num_hidden_layers": 4, "sliding_window": 8, "rope_parameters": rope}
    experts = {"intermediate_size": 40, "num_local_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 5.0}
    return transformers.GptOssConfig(**{**COMMON, **EPSILON, **own, **experts})


def gpt_oss_mxfp4() -> transformers.PretrainedConfig:
    """Experts as they are published: in groups of 32 inputs, so their size must be a multiple of that."""
    config = gpt_oss()
    config.intermediate_size = 96
    return config


HYBRID = {**{name: n for name, n in COMMON.items() if name not in ("num_hidden_layers", "rope_parameters")}, **EPSILON}


def nemotron_h() -> transformers.PretrainedConfig:
    """Every kind of layer; two groups of heads."""
    kinds = ["linear_attention", "moe", "linear_attention", "full_attention", "mlp"]
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16, "chunk_size": 8}
    experts = {
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "n_group": 4,
        "topk_group": 2,
    }
    own = {"moe_shared_expert_intermediate_size": 48, "routed_scaling_factor": 1.5, "layer_norm_epsilon": 1e-4}
    sizes = {name: n for name, n in HYBRID.items() if name != "rms_norm_eps"}
    return transformers.NemotronHConfig(**sizes, layers_block_type=kinds, **mamba, **experts, **own)


def qwen3_next() -> transformers.PretrainedConfig:
    """Three delta nets with two value heads to a key head, then attention of which half is rotated."""
    net = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 8,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    rope = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
    own = {"num_hidden_layers": 4, "shared_expert_intermediate_size": 48, "rope_parameters": rope}
    return transformers.Qwen3NextConfig(**HYBRID, **net, **experts, **own)


def deepseek_v32() -> transformers.PretrainedConfig:
    """A dense layer, then one with experts; sizes that differ wherever they may, and an index that leaves most out."""
    rope = {
        "rope_type": "yarn",
        "rope_theta": 20_000.0,
        "factor": 8.0,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
        "mscale": 0.8,
        "mscale_all_dim": 1.3,
        "original_max_position_embeddings": 512,
    }
    heads = {"num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32}
    heads |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12}
    index = {"index_topk": 8, "index_n_heads": 16, "index_head_dim": 24}
    experts = {"moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 2}
    experts |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7, "first_k_dense_replace": 1}
    own = {"rope_parameters": rope, **heads, **index, **experts}
    return transformers.DeepseekV32Config(**{**COMMON, **EPSILON, **own})


def deepseek_v4() -> transformers.PretrainedConfig:
    """Windows alone, then with an entry every 4, 16 and 4 tokens. 16 index heads: with few, zeros make equal scores."""
    sizes = {name: COMMON[name] for name in ("vocab_size", "hidden_size", "num_attention_heads", "head_dim")}
    special = {name: COMMON[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    yarn = {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 64.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
    }
    attention = {
        "layer_types": [f"{kind}_attention" for kind in ("sliding", SPARSE, "heavily_compressed", SPARSE)],
        "compress_rates": {f"{SPARSE}_attention": 4, "heavily_compressed_attention": 16},
        "sliding_window": 8,
        "q_lora_rank": 32,
        "o_groups": 2,
        "o_lora_rank": 16,
        "index_n_heads": 16,
        "index_head_dim": 8,
        "index_topk": 4,
        "partial_rotary_factor": 0.5,
        "compress_rope_theta": 20_000.0,
        "rope_theta": 5000.0,
        "rope_parameters": yarn,
        "max_position_embeddings": 16384,
    }
    experts = {
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "swiglu_limit": 1.5,
    }
    streams = {"hc_mult": 2, "hc_sinkhorn_iters": 5, "hc_eps": 1e-3}
    own = {"num_hidden_layers": 4, "num_key_value_heads": 1}
    return transformers.DeepseekV4Config(**sizes, **special, **EPSILON, **own, **attention, **experts, **streams)


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
    "llama": llama,
    "llama_3_heads": llama_3_heads,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
    "gpt_oss_mxfp4": gpt_oss_mxfp4,
    "nemotron_h": nemotron_h,
    "qwen3_next": qwen3_next,
    "deepseek_v32": deepseek_v32,
    "deepseek_v4": deepseek_v4,
}
PACKED = "gpt_oss_mxfp4"


def random_weight(
    name: str, shape: torch.Size, config: transformers.PretrainedConfig, generator: torch.Generator
) -> torch.Tensor:
    """A weight under which nothing is trivial.

    norms 1 + 0.1 n, or 0.1 n where the model multiplies by 1 + weight (gemma3, qwen3_next but for its delta nets);
    sinks and skips 1 + n; biases n / 2, of time steps less 1; logarithms of decays uniform in [0, 1);
    embeddings n, or n / sqrt(hidden) where they are the head too, so that a token does not just predict itself;
    scales 1 + 0.1 n; bases n / 2; others n / sqrt(fan_in), but the experts of gpt_oss, stored [expert, in, out], 3 and
    1/4 times that: the limit of their activations is reached, and what they add does not drown the rest.
    """
    noise = torch.randn(shape, generator=generator)
    if "norm" in name and not name.endswith("bias"):
        is_less_one = config.model_type in ("gemma3_text", "qwen3_next") and "linear_attn.norm" not in name
        return (0 if is_less_one else 1) + 0.1 * noise
    if name.endswith("A_log"):
        return torch.rand(shape, generator=generator)
    if name.endswith("dt_bias"):
        return noise / 2 - 1
    if name.endswith("mixer.D"):
        return 1 + noise
    if "embed" in name:
        return noise * (config.hidden_size**-0.5 if config.tie_word_embeddings else 1)
    if name.endswith("sinks"):
        return 1 + noise
    if name.endswith(("bias", "base")):
        return noise / 2
    if name.endswith("scale"):
        return 1 + 0.1 * noise
    if config.model_type == "gpt_oss" and "experts" in name:
        return noise * shape[-2] ** -0.5 * (3 if "gate_up" in name else 0.25)
    return noise * shape[-1] ** -0.5


def build_model(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """The reference model, every weight drawn from `seed`, in fp32."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape, config, generator))
        for name, buffer in model.named_buffers():
            if name.endswith("correction_bias"):
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
            if name.endswith("tid2eid"):  # experts of a token, which differ
                order = torch.rand(len(buffer), config.n_routed_experts, generator=generator).argsort(dim=-1)
                buffer.copy_(order[:, : buffer.shape[1]])
    return model


def published_name(name: str) -> str:
    """What the published files of deepseek_v4 call a tensor: the reference saves most names in that form, not all."""
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.")
    return name.replace("hc_head.hc_", "hc_head_")


def pack_experts(model: transformers.PreTrainedModel, seed: int) -> dict[str, torch.Tensor]:
    """Draws the experts' matrices packed, gives the model what the reference makes of them, returns the packed ones.

    Any four bits; powers of two under which an entry is as large as one of `random_weight`.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    packed = {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, inputs, outputs = parameter.shape
            grid = (experts, outputs, inputs // 32)
            blocks = torch.randint(0, 256, (*grid, 16), generator=generator, dtype=torch.uint8)
            low, high = (122, 125) if "gate_up" in name else (118, 121)
            scales = torch.randint(low, high, grid, generator=generator, dtype=torch.uint8)
            with torch.no_grad():
                parameter.copy_(convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))
            packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return packed


def check_own_cache(model: transformers.PreTrainedModel, tokens: torch.Tensor, logits: torch.Tensor) -> None:
    """Raises ValueError unless the reference gives the same logits with its own cache: a prefill, then decode.

    tokens: int64[2, 75]
    logits: fp32[2, 75, vocab], computed without a cache
    """
    cache = transformers.DynamicCache(config=model.config)
    for part in (tokens[:, :PREFILL_TOKENS], *tokens[:, PREFILL_TOKENS:].split(1, dim=1)):
        start = cache.get_seq_length()
        cached = model(part, past_key_values=cache, use_cache=True).logits
        error = (cached - logits[:, start : start + part.shape[1]]).abs().max().item()
        if error > OWN_TOLERANCE:
            raise ValueError(f"the reference with its own cache is off by {error} from token {start} on")


def write_golden(model: transformers.PreTrainedModel, seed: int, folder: Path, packed: dict[str, torch.Tensor]) -> None:
    """Checkpoint and reference logits, computed from the first token on without a cache.

    packed: tensors in whose place matrices of the model are stored
    """
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(3, model.config.vocab_size, (BATCH, NUM_TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        check_own_cache(model, tokens, logits)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if packed:
        tensors = load_file(folder / "model.safetensors") | packed
        for name in packed:
            tensors.pop(name.removesuffix("_blocks").removesuffix("_scales"), None)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if model.config.model_type == "deepseek_v4":
        tensors = load_file(folder / "model.safetensors")
        tensors = {published_name(name): tensor for name, tensor in tensors.items()}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    np.savez(folder / "reference.npz", tokens=tokens.numpy(), logits=logits.numpy())
    for path in folder.iterdir():
        if path.stat().st_size >= MAX_FILE_BYTES:
            raise ValueError(f"{path.name} has {path.stat().st_size} bytes; a golden must stay below {MAX_FILE_BYTES=}")


def main() -> None:
    parser = argparse.ArgumentParser(description="write a tiny checkpoint and its reference logits")
    parser.add_argument("--model", choices=sorted(CONFIGS), required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = build_model(CONFIGS[args.model](), args.seed)
    packed = pack_experts(model, args.seed) if args.model == PACKED else {}
    write_golden(model, args.seed, args.out, packed)


if __name__ == "__main__":
    main()
