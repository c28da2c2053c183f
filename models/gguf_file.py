"""Reads a GGUF file: its configuration in Hugging Face's form, and its tensors, row by row, in fp32.

Library `gguf` knows the format and every quantisation; here is what differs from the published safetensors:

    names            model.layers.3.mlp.up_proj.weight  is  blk.3.ffn_up.weight
    Llama's q and k  the two halves of each head take turns, row by row
    Gemma's norms    hold the 1 that is to be added
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from models.loading import Param

# A program that opens no such file does without the library.
gguf: Any = importlib.import_module("gguf") if importlib.util.find_spec("gguf") else None

ROWS_AT_ONCE = 4096  # that are dequantised together

TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORM_NAMES = {  # by architecture
    "llama": {"post_attention_layernorm": "ffn_norm"},
    "gemma3": {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
}
_LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")


class GgufFile:
    """An opened file; nothing but the header has been read.

    hf:       what `config.json` would say
    metadata: every key of the header: the tokenizer and the chat template are there

    Raises ValueError that names the file for one that is none, is truncated, or holds another architecture than
    llama or gemma3, or a quantisation that library `gguf` cannot read.
    """

    adds = False  # norms are stored whole

    def __init__(self, path: Path):
        self.path = path
        if gguf is None:
            raise ImportError(f"{path}: GGUF files need library gguf: pip install 'jaxcache[models]'")
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: no GGUF file, or truncated, or of an unknown version or type: {error}"
            ) from error
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.architecture = str(self._value("general.architecture"))
        if self.architecture not in CONFIGS:
            raise ValueError(f"{path}: architecture {self.architecture!r} is none of {sorted(CONFIGS)}")
        self._check_quantisations()
        self.hf = CONFIGS[self.architecture](self)

    @property
    def metadata(self) -> Mapping[str, Any]:
        return {name: field.contents() for name, field in self._fields.items()}

    def _value(self, key: str, default: Any = None) -> Any:
        if key in self._fields:
            return self._fields[key].contents()
        if default is None:
            raise ValueError(f"{self.path}: the header says nothing of {key!r}")
        return default

    def number(self, key: str, default: Any = None) -> Any:
        """Of the architecture's own keys."""
        return self._value(f"{self.architecture}.{key}", default)

    @property
    def vocab_size(self) -> int:
        return int(self._tensor("model.embed_tokens.weight").shape[1])

    @property
    def has_head(self) -> bool:
        return TOP_NAMES["lm_head.weight"] in self._tensors

    def _check_quantisations(self) -> None:
        for kind, tensor in {tensor.tensor_type: tensor for tensor in self._tensors.values()}.items():
            try:
                gguf.quants.dequantize(_rows(tensor)[:1], kind)
            except NotImplementedError as error:
                raise ValueError(
                    f"{self.path}: tensor {tensor.name!r} is quantised as {kind.name}, which cannot be read: {error}"
                ) from error

    def _tensor(self, name: str) -> Any:
        """By its published name."""
        if match := _LAYER_TENSOR.fullmatch(name):
            there = f"blk.{match[1]}.{(LAYER_NAMES | NORM_NAMES[self.architecture]).get(match[2], match[2])}.weight"
        else:
            there = TOP_NAMES.get(name, name)
        if there not in self._tensors:
            raise ValueError(f"{self.path}: no tensor {there!r}")
        return self._tensors[there]

    def check(self, param: Param) -> None:
        """ValueError unless every tensor of a parameter is there, in its shape."""
        for name in param.names():
            shape = tuple(int(n) for n in reversed(self._tensor(name).shape))
            if shape != param.stored_shape:
                raise ValueError(f"{self.path}: tensor {name!r} has shape {shape}, not {param.stored_shape}")

    def read(self, name: str, picks: tuple[np.ndarray, ...]) -> np.ndarray:
        """The picked entries of each dimension, f32; never more than ROWS_AT_ONCE other entries' rows beside them."""
        tensor = self._tensor(name)
        rows = _rows(tensor)
        if len(picks) == 1:
            return gguf.quants.dequantize(rows, tensor.tensor_type).reshape(-1)[picks[0]]
        wanted, columns = self._row_numbers(name, picks[0]), picks[1]
        values = np.empty((len(wanted), len(columns)), np.float32)
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            values[part] = gguf.quants.dequantize(rows[wanted[part]], tensor.tensor_type)[:, columns]
        return values

    def _row_numbers(self, name: str, wanted: np.ndarray) -> np.ndarray:
        """Where published rows are here."""
        if self.architecture != "llama" or not name.endswith(("q_proj.weight", "k_proj.weight")):
            return wanted
        head_dim = self.hf["head_dim"]
        half, place = np.divmod(wanted % head_dim, head_dim // 2)
        return wanted - wanted % head_dim + 2 * place + half


def opened(source: Path | GgufFile) -> Path | GgufFile:
    """A GGUF file is opened, if it is not yet; a folder stays one. Reading a header takes seconds."""
    return GgufFile(source) if isinstance(source, Path) and source.suffix == ".gguf" else source


def _rows(tensor: Any) -> np.ndarray:
    """Of one dimension: one row."""
    return tensor.data.reshape(-1, tensor.data.shape[-1])


def _common(file: GgufFile) -> dict[str, Any]:
    heads, hidden = int(file.number("attention.head_count")), int(file.number("embedding_length"))
    return {
        "vocab_size": file.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": int(file.number("feed_forward_length")),
        "num_hidden_layers": int(file.number("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(file.number("attention.head_count_kv", heads)),
        "head_dim": int(file.number("attention.key_length", hidden // heads)),
        "rms_norm_eps": float(file.number("attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": not file.has_head,
    }


def _llama(file: GgufFile) -> dict[str, Any]:
    return _common(file) | {
        "model_type": "llama",
        "rope_theta": float(file.number("rope.freq_base", 10_000.0)),
        "rope_scaling": _scaling(file),
    }


def _gemma3(file: GgufFile) -> dict[str, Any]:
    """The local rotary base and the pattern of layers are the architecture's, and not in the file."""
    common = _common(file)
    return common | {
        "model_type": "gemma3_text",
        "rope_theta": float(file.number("rope.freq_base", 1e6)),
        "rope_scaling": _scaling(file),
        "sliding_window": int(file.number("attention.sliding_window")),
        "query_pre_attn_scalar": common["head_dim"],
    }


def _scaling(file: GgufFile) -> dict[str, Any] | None:
    kind = file.number("rope.scaling.type", "none")
    return None if kind == "none" else {"rope_type": kind, "factor": float(file.number("rope.scaling.factor", 1.0))}


CONFIGS: dict[str, Callable[[GgufFile], dict[str, Any]]] = {"llama": _llama, "gemma3": _gemma3}
