"""Writes a tiny random checkpoint and the reference logits of Hugging Face transformers for it. Never imports jax.

    config.json         the published form of the family's configuration
    model.safetensors   fp32 weights under the published names
    reference.npz       tokens int64[2, 75], logits fp32[2, 75, vocab]

Runs in an environment of its own (Python 3.11, torch 2.13.0, transformers 5); the tests read only what it wrote:

    python models/make_goldens.py --model qwen3 --seed 0 --out tests/goldens/qwen3
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

BATCH, NUM_TOKENS = 2, 75
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


def qwen3() -> transformers.PretrainedConfig:
    return transformers.Qwen3Config(**COMMON)


def qwen3_moe() -> transformers.PretrainedConfig:
    experts = {"moe_intermediate_size": 32, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}
    return transformers.Qwen3MoeConfig(**COMMON, **experts)


CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {"qwen3": qwen3, "qwen3_moe": qwen3_moe}


def random_weight(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """A weight under which nothing is trivial: norms 1 + 0.1 n, embeddings n, others n / sqrt(fan_in)."""
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1 + 0.1 * noise
    if "embed" in name:
        return noise
    return noise * shape[-1] ** -0.5


def build_model(config: transformers.PretrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """The reference model, every weight drawn from `seed`, in fp32."""
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_weight(name, parameter.shape, generator))
    return model


def write_golden(model: transformers.PreTrainedModel, seed: int, folder: Path) -> None:
    """Checkpoint and reference logits, computed from the first token on without a cache."""
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.randint(3, model.config.vocab_size, (BATCH, NUM_TOKENS), generator=generator)
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
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
    write_golden(build_model(CONFIGS[args.model](), args.seed), args.seed, args.out)


if __name__ == "__main__":
    main()
