"""A file like SmolLM2's, of random weights: 256 tokens for bytes, the markers of its chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from tokenizers import pre_tokenizers

HIDDEN, MLP, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 2, 4, 2, 16
MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NO_CHANGES: Mapping[str, Any] = MappingProxyType({})
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_gguf(path: Path, seed: int = 0, changes: Mapping[str, Any] = NO_CHANGES) -> Path:
    """changes: of the header's values, by key; None: the key is left out"""
    tokens = [*MARKERS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"]
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([control if token in MARKERS else normal for token in tokens])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    header = writer.kv_data[0]
    for key, value in changes.items():
        if value is None:
            del header[key]
        else:
            header[key].value = value
    rng = np.random.default_rng(seed)

    def add(name: str, *shape: int) -> None:
        values = (
            1 + 0.1 * rng.standard_normal(shape) if len(shape) == 1 else rng.standard_normal(shape) * shape[1] ** -0.5
        )
        writer.add_tensor(name, values.astype(np.float32))

    add("token_embd.weight", len(tokens), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for layer in (f"blk.{i}." for i in range(LAYERS)):
        add(layer + "attn_norm.weight", HIDDEN)
        add(layer + "attn_q.weight", HEADS * HEAD_DIM, HIDDEN)
        add(layer + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(layer + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
        add(layer + "attn_output.weight", HIDDEN, HEADS * HEAD_DIM)
        add(layer + "ffn_norm.weight", HIDDEN)
        add(layer + "ffn_gate.weight", MLP, HIDDEN)
        add(layer + "ffn_up.weight", MLP, HIDDEN)
        add(layer + "ffn_down.weight", HIDDEN, MLP)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
