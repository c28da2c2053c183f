"""Where parameters lie in published files: names of tensors, and how their dimensions are a parameter's axes."""

from __future__ import annotations

from typing import NamedTuple


class Stored(NamedTuple):
    """Where a parameter lies in published files.

    name:   of its tensors, with a field for each axis that is spread over several: {l} and {e}
    stored: its axes there, a comma between the stored dimensions
    axes:   the parameter's own
    add:    what is to be added to each entry
    part:   (start, size): the parameter is some rows of the first stored dimension, which has `size`

    Axes are letters in lower case: v, d, f as in models/layers.py, l layer, h query heads, k kv heads, c head_dim, e
    expert. A family may use others.
    """

    name: str
    stored: str
    axes: str
    add: float = 0.0
    part: tuple[int, int] | None = None


def stored_of(stored: dict[str, Stored], parameter: str) -> Stored:
    """Of a parameter, such as layers.window.attention.wq; a family says layers.attention.wq of the kinds that agree."""
    if parameter in stored:
        return stored[parameter]
    start, _, rest = parameter.split(".", 2)
    return stored[f"{start}.{rest}"]


def stored_decoder(tie_embeddings: bool) -> dict[str, Stored]:
    """What all families here publish alike, by parameter: embeddings, projections, and the norm before attention."""
    layer, attention = "model.layers.{l}.", "model.layers.{l}.self_attn."
    stored = {
        "embed": Stored("model.embed_tokens.weight", "v,d", "vd"),
        "norm": Stored("model.norm.weight", "d", "d"),
        "layers.attention.wq": Stored(attention + "q_proj.weight", "hc,d", "ldhc"),
        "layers.attention.wk": Stored(attention + "k_proj.weight", "kc,d", "ldkc"),
        "layers.attention.wv": Stored(attention + "v_proj.weight", "kc,d", "ldkc"),
        "layers.attention.wo": Stored(attention + "o_proj.weight", "d,hc", "lhcd"),
        "layers.attention_norm": Stored(layer + "input_layernorm.weight", "d", "ld"),
        "layers.mlp_norm": Stored(layer + "post_attention_layernorm.weight", "d", "ld"),
    }
    if not tie_embeddings:
        stored["head"] = Stored("lm_head.weight", "v,d", "vd")
    return stored


def stored_mlp() -> dict[str, Stored]:
    """A `GatedMlp`, as published."""
    mlp = "model.layers.{l}.mlp."
    return {f"layers.mlp.{name}": Stored(f"{mlp}{name}_proj.weight", "f,d", "ldf") for name in ("gate", "up")} | {
        "layers.mlp.down": Stored(mlp + "down_proj.weight", "d,f", "lfd")
    }
