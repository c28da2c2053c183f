"""Trains the tiny models of the recall task: 60 to 110 s of processor time each.

    python -m models.train_recall --model full|window|mamba --out FILE [--steps N] [--seed N]

Batches of random tables with ten questions each; the loss is of the answers only. It computes every layer over whole
rows, a Mamba2 layer in its quadratic form. Serving computes the same over pages, and token by token.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax import Array
from jax.typing import ArrayLike
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import jaxcache
from models import decoder, recall
from models.command import show_error
from models.decoder import DecoderConfig, Params
from models.families.nemotron_h import MLP, NemotronHConfig
from models.layer_plan import FULL, STATE, WINDOW, LayerPlan

TABLES, QUESTIONS, WARMUP_STEPS = 32, 10, 50
ENOUGH = 0.998  # of the answers' tokens, over the last steps: training ends
EXAM_TABLES, EXAM_SEED = 256, 999


class Setting(NamedTuple):
    """rate, adam_rate: at their peaks, muon's for matrices and adam's for the rest. steps: of the schedule"""

    rate: float
    adam_rate: float
    steps: int


SETTINGS = {"full": Setting(0.02, 0.02, 500), "window": Setting(0.02, 0.02, 500), "mamba": Setting(0.015, 0.01, 600)}


# ---- the models, over whole rows


def logits(cfg: DecoderConfig, params: Params, tokens: Array, at: ArrayLike) -> Array:
    """What a decoder computes, over whole rows.

    params:  see `decoder.abstract_params`
    tokens:  i32[B, T]
    at:      i32[K], the columns whose logits are wanted
    returns: f32[B, K, V]
    """
    plan, h = LayerPlan(cfg), params["embed"][tokens]
    for number, kind in enumerate(cfg.layer_kinds):
        place = plan.layers_of(kind).index(number)
        own = jax.tree.map(lambda x, place=place: x[place], params["layers"][kind])
        if isinstance(cfg, NemotronHConfig):
            h = _layer_alone(cfg, kind, own, h)
        else:
            h = _attention_and_mlp(cfg, kind, own, h)
    return jnp.einsum("bkd,vd->bkv", _norm(h[:, at], params["norm"]), params["head"])


def _norm(x: Array, weight: Array, num_axes: int = 1, eps: float = 1e-6) -> Array:
    """Root mean square norm over the last axis. weight: of the last `num_axes` axes"""
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    return x * jnp.expand_dims(weight, tuple(range(x.ndim - num_axes)))


def _attention_and_mlp(cfg: DecoderConfig, kind: str, own: Params, h: Array) -> Array:
    h = h + _attention(cfg, kind, own["attention"], _norm(h, own["attention_norm"]))
    x, mlp = _norm(h, own["mlp_norm"]), own["mlp"]
    return h + (jax.nn.silu(x @ mlp["gate"]) * (x @ mlp["up"])) @ mlp["down"]


def _attention(cfg: DecoderConfig, kind: str, own: Params, h: Array) -> Array:
    q, k, v = (jnp.einsum("btd,dhc->bthc", h, own[name]) for name in ("wq", "wk", "wv"))
    q, k = (_rotate(cfg, kind, _norm(x, own[name])) for x, name in ((q, "q_norm"), (k, "k_norm")))
    k, v = (jnp.repeat(x, cfg.num_heads // cfg.num_kv_heads, axis=2) for x in (k, v))
    distance = _distances(h)
    is_seen = (distance >= 0) & (distance < (cfg.window_tokens if kind == WINDOW else h.shape[1]))
    scores = jnp.einsum("bthc,bshc->bhts", q, k) * cfg.head_dim**-0.5
    weights = jax.nn.softmax(jnp.where(is_seen[None, None], scores, -1e30), axis=-1)
    return jnp.einsum("bhts,bshc,hcd->btd", weights, v, own["wo"])


def _rotate(cfg: DecoderConfig, kind: str, x: Array) -> Array:
    """x: [B, T, heads, head_dim], token t at position t"""
    angles = np.arange(x.shape[1])[:, None] * cfg.rope(kind).frequencies[None]
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None, :, None] for f in (np.cos, np.sin))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _distances(h: Array) -> Array:
    """i32[T, T]: from each token back to each other."""
    positions = jnp.arange(h.shape[1])
    return positions[:, None] - positions[None]


def _layer_alone(cfg: NemotronHConfig, kind: str, own: Params, h: Array) -> Array:
    x, mixer = _norm(h, own["norm"]), own["mixer"]
    if kind == FULL:
        return h  # its weights are zero: see `recall.filled`
    if kind == MLP:
        return h + jnp.square(jax.nn.relu(x @ mixer["up"])) @ mixer["down"]
    assert kind == STATE
    return h + _mamba(cfg, mixer, x)


def _mamba(cfg: NemotronHConfig, own: Params, h: Array) -> Array:
    """Quadratic: token t reads s <= t with weight (c_t b_s) step_s, times what all tokens after s up to t have kept."""
    x = _convolved(jnp.einsum("btd,dmp->btmp", h, own["wx"]), own["x_kernel"], own["x_bias"])
    bc = _convolved(jnp.einsum("btd,duqn->btuqn", h, own["wbc"]), own["bc_kernel"], own["bc_bias"])
    b, c = (jnp.repeat(bc[:, :, i], cfg.heads // cfg.groups, axis=2) for i in range(2))
    steps = jax.nn.softplus(jnp.einsum("btd,dm->btm", h, own["wdt"]) + own["step_bias"][None, None])
    steps = jnp.maximum(steps, cfg.min_step)
    kept = jnp.cumsum(-jnp.exp(own["log_decay"])[None, None] * steps, axis=1).transpose(0, 2, 1)  # logarithms
    kept = jnp.where((_distances(h) >= 0)[None, None], kept[..., :, None] - kept[..., None, :], -1e30)
    read = jnp.einsum("btmn,bsmn->bmts", c, b) * jnp.exp(kept)
    out = jnp.einsum("bmts,bsmp->btmp", read, x * steps[..., None]) + own["skip"][None, None, :, None] * x
    out = out * jax.nn.silu(jnp.einsum("btd,dmp->btmp", h, own["wz"]))
    rows = out.shape[:2]
    ones = jnp.ones(out.size // (rows[0] * rows[1] * cfg.groups))
    out = _norm(out.reshape(*rows, cfg.groups, -1), ones).reshape(out.shape) * own["out_norm"][None, None]
    return jnp.einsum("btmp,mpd->btd", out, own["wo"])


def _convolved(x: Array, kernel: Array, bias: Array) -> Array:
    """Each channel by itself over the last tokens. x: [B, T, ...]; kernel: [..., W]; bias: [...]"""
    width, columns = kernel.shape[-1], x.shape[1]
    padded = jnp.pad(x, [(0, 0), (width - 1, 0)] + [(0, 0)] * (x.ndim - 2))
    taps = (padded[:, i : i + columns] * kernel[None, None, ..., i] for i in range(width))
    return jax.nn.silu(functools.reduce(jnp.add, taps) + bias[None, None])


# ---- training


def initial(cfg: DecoderConfig, seed: int) -> Params:
    """What is trained, before: see `recall.stored_shapes`."""
    drawn = decoder.init_params(cfg, jaxcache.one_device_mesh(), seed, jnp.float32)
    stored = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), recall.stored_shapes(cfg))
    stored = stored | {"layers": {kind: drawn["layers"][kind] for kind in stored["layers"]}}
    stored |= {name: drawn[name][: len(stored[name])] for name in ("embed", "head")}
    stored |= {
        "pair_key": 0.7 * drawn["embed"][: recall.NUM_KEYS],
        "pair_next": 0.7 * drawn["embed"][-recall.NUM_KEYS :],
    }
    return jax.tree_util.tree_map_with_path(_tamed, stored)


def _tamed(path: tuple[Any, ...], values: Array) -> Array:
    """Norms begin as ones, what is added to the residual and the head small, and states forget slowly."""
    name = path[-1].key
    if name.endswith("norm"):
        return jnp.ones(values.shape)
    if name.endswith("bias") and name != "step_bias":
        return jnp.zeros(values.shape)
    if name.endswith("kernel"):
        return 0.6 * values + jnp.zeros(values.shape).at[..., -1].set(1.0)
    if name == "wbc":  # what is asked for begins as what is remembered
        return jnp.repeat(values[:, :, :1], 2, axis=2)
    if name == "log_decay":
        return jnp.full(values.shape, -3.0)
    return values * {"wo": 0.5, "down": 0.5, "head": 0.3}.get(name, 1.0)


def _matrix(path: tuple[Any, ...], values: Array) -> Any:
    """Which axes muon takes for the rows and columns of a matrix; None: adam trains it."""
    name, axes = path[-1].key, tuple(range(values.ndim))
    if name in ("embed", "head", "pair_key", "pair_next"):
        return optax.contrib.MuonDimensionNumbers(0, 1)
    if name == "wo":
        return optax.contrib.MuonDimensionNumbers(axes[1:-1], axes[-1:])
    if name in ("gate", "up", "down", "wq", "wk", "wv", "wx", "wz", "wbc", "wdt"):
        return optax.contrib.MuonDimensionNumbers(axes[1:2], axes[2:])
    return None


def optimizer(setting: Setting) -> optax.GradientTransformation:
    matrices: Any = functools.partial(jax.tree_util.tree_map_with_path, _matrix)
    rate, adam_rate = (
        optax.warmup_cosine_decay_schedule(0.0, peak, WARMUP_STEPS, setting.steps, peak / 20)
        for peak in (setting.rate, setting.adam_rate)
    )
    muon = optax.contrib.muon(rate, adam_b2=0.98, adam_learning_rate=adam_rate, muon_weight_dimension_numbers=matrices)
    return optax.chain(optax.clip_by_global_norm(1.0), muon)


def answer_columns(num_questions: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns of the answers' tokens, [questions, ANSWER_TOKENS], and which of them follow from what is before them."""
    starts = recall.TABLE_TOKENS + np.arange(num_questions) * recall.QUESTION_TOKENS
    columns = starts[:, None] + 2 + np.arange(recall.ANSWER_TOKENS)[None]
    return columns, columns - recall.LAG >= recall.TABLE_TOKENS * (np.arange(recall.ANSWER_TOKENS) == recall.HOPS)


def loss_and_share(cfg: DecoderConfig, stored: Params, tokens: Array) -> tuple[Array, Array]:
    """Cross entropy of the answers' tokens among those that are no pairs, and how many are right."""
    columns, is_asked = (x.reshape(-1) for x in answer_columns(QUESTIONS))
    columns = columns[is_asked]
    found = logits(cfg, recall.filled(cfg, stored) | {"head": stored["head"]}, tokens, columns - 1)
    wanted = tokens[:, columns]
    loss = optax.softmax_cross_entropy_with_integer_labels(found, wanted).mean()
    return loss, (found.argmax(axis=-1) == wanted).mean()


def train(
    cfg: DecoderConfig, setting: Setting, seed: int, steps: int, show: Callable[[int, float, float], None]
) -> Params:
    """Trains until enough is right, for `steps` of the setting's schedule at most.

    show: is told steps done, loss, and the share of right tokens
    """
    stored, rng = jax.device_get(initial(cfg, seed)), np.random.default_rng(seed)
    optimise = optimizer(setting)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(stored: Any, state: Any, tokens: Array) -> tuple[Any, Any, Array, Array]:
        loss = functools.partial(loss_and_share, cfg)
        (value, share), slopes = jax.value_and_grad(loss, has_aux=True)(stored, tokens)
        updates, state = optimise.update(slopes, state, stored)
        return optax.apply_updates(stored, updates), state, value, share

    state, recent = optimise.init(stored), 0.0
    for number in range(steps):
        stored, state, value, share = step(stored, state, recall.draw(rng, TABLES, QUESTIONS).tokens)
        recent = 0.95 * recent + 0.05 * float(share)
        show(number + 1, float(value), recent)
        if recent > ENOUGH:
            break
    return stored


def exact_match(cfg: DecoderConfig, params: Params) -> float:
    """Share of fresh questions whose whole answer is right, given what is before each of its tokens.

    params: see `decoder.abstract_params`
    """
    exam = recall.Exam.draw(EXAM_SEED, EXAM_TABLES, 1)
    tokens = np.concatenate([exam.prefixes, exam.asked[:, 0], exam.answers[:, 0]], axis=1)
    at = np.arange(recall.ANSWER_TOKENS) + tokens.shape[1] - recall.ANSWER_TOKENS - 1
    found = jax.jit(functools.partial(logits, cfg))(params, tokens, at)
    return float((found.argmax(axis=-1) == exam.answers[:, 0]).all(axis=-1).mean())


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.train_recall", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=recall.MODELS, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the parameters, *.npz")
    parser.add_argument("--steps", type=int, help="at most (default: all of the schedule)")
    parser.add_argument("--seed", type=int, default=0, help="of parameters and tables (default: %(default)s)")
    args = parser.parse_args(argv)
    cfg, setting, console = recall.MODELS[args.model], SETTINGS[args.model], Console()
    steps = setting.steps if args.steps is None else args.steps
    if not 0 < steps <= setting.steps:
        parser.error(f"--steps must be 1 to {setting.steps} for {args.model}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(args.model, total=steps)

        def show(step: int, loss: float, share: float) -> None:
            told = f"{args.model}: loss {loss:.3f}, {share:.1%} of the answers' tokens"
            progress.update(task, completed=step, description=told)

        stored = train(cfg, setting, args.seed, steps, show)
    try:
        recall.save(stored, args.out)
    except OSError as error:
        show_error(error)
        return 2
    _, params = recall.load(args.model, args.out, jaxcache.one_device_mesh())
    console.print(f"{args.out}: {args.out.stat().st_size:,} bytes, exact match {exact_match(cfg, params):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
