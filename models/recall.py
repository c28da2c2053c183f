"""The recall task: what a model answers only if every part of a cached prefix is right; three tiny models that do.

A table of pairs "key -> next key" and some solved questions are a prefix, which all questions about the table share. A
question names a key. The answer is four hops from there, then the token LAG places back, which lies in the prefix:

    BOS 7>2 3>9 2>3 9>6 .. | ASK 5 .. .. .. .. .. | ... | ASK 8 7 2 3 9 1 || ASK 7  ->  2 3 9 6  9
    |-- NUM_PAIRS tokens --|-- SHOTS solved questions of QUESTION_TOKENS --|-- asked --|-- answer --|
                                                                  LAG places back: the last hop of the question before

So a wrong page of the table breaks the hops that read it, another request's state breaks all of them, and a wrong last
page of a window breaks the last token. `python -m models.train_recall` made the parameters in tests/goldens/recall.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from models import decoder
from models.decoder import DecoderConfig, Params
from models.families.nemotron_h import MLP, NemotronHConfig
from models.families.qwen3 import Qwen3Config
from models.layer_plan import FULL, STATE, WINDOW
from models.layers import Rope

NUM_KEYS, NUM_PAIRS, HOPS, SHOTS, LAG = 32, 23, 4, 3, 8
BOS, ASK = 2 * NUM_KEYS, 2 * NUM_KEYS + 1  # keys are the tokens below NUM_KEYS; those between are not used
FIRST_PAIR = ASK + 1  # the token of key -> next is FIRST_PAIR + key * NUM_KEYS + next
VOCAB_SIZE = FIRST_PAIR + NUM_KEYS**2
ANSWER_TOKENS = HOPS + 1
QUESTION_TOKENS = 2 + ANSWER_TOKENS
TABLE_TOKENS = 1 + NUM_PAIRS
PREFIX_TOKENS = TABLE_TOKENS + SHOTS * QUESTION_TOKENS


# ---- the task


class Texts(NamedTuple):
    """Tables, each with as many questions in a row.

    tokens: i32[tables, TABLE_TOKENS + questions * QUESTION_TOKENS]
    places: i32[tables, questions, HOPS], in the table, of the pairs that each question reads: position less one
    """

    tokens: np.ndarray
    places: np.ndarray


def draw(rng: np.random.Generator, num_tables: int, num_questions: int) -> Texts:
    """Random tables whose pairs form one cycle, so the hops of a question are different pairs.

    The answer of a row's first question ends with a token of the table: LAG reaches that far.

    Errors: ValueError if there are more questions than keys to begin at.
    """
    if num_questions > NUM_PAIRS:
        raise ValueError(f"{num_questions=} must not exceed {NUM_PAIRS=}: each begins at another key")
    keys = rng.permuted(np.tile(np.arange(NUM_KEYS), (num_tables, 1)), axis=1)[:, :NUM_PAIRS]  # in order of the cycle
    order = rng.permuted(np.tile(np.arange(NUM_PAIRS), (num_tables, 1)), axis=1)  # of the cycle's pairs in the table
    place_of = np.argsort(order, axis=1)
    pairs = FIRST_PAIR + keys * NUM_KEYS + np.roll(keys, -1, axis=1)
    starts = rng.permuted(np.tile(np.arange(NUM_PAIRS), (num_tables, 1)), axis=1)[:, :num_questions]
    hops = (starts[..., None] + np.arange(HOPS + 1)) % NUM_PAIRS
    tokens = np.zeros((num_tables, TABLE_TOKENS + num_questions * QUESTION_TOKENS), np.int32)
    tokens[:, 0] = BOS
    tokens[:, 1:TABLE_TOKENS] = np.take_along_axis(pairs, order, axis=1)
    for n in range(num_questions):
        at = TABLE_TOKENS + n * QUESTION_TOKENS
        tokens[:, at] = ASK
        tokens[:, at + 1 : at + 2 + HOPS] = np.take_along_axis(keys, hops[:, n], axis=1)
        tokens[:, at + 2 + HOPS] = tokens[:, at + 2 + HOPS - LAG]
    rows = np.arange(num_tables)[:, None, None]
    return Texts(tokens, place_of[rows, hops[..., :HOPS]])


@dataclass(frozen=True, eq=False)
class Exam:
    """Questions about tables that are asked one by one, each after the same solved questions of its table.

    prefixes: i32[tables, PREFIX_TOKENS]
    asked:    i32[tables, questions, 2]
    answers:  i32[tables, questions, ANSWER_TOKENS]
    places:   i32[tables, questions, HOPS], see `Texts`
    """

    prefixes: np.ndarray
    asked: np.ndarray
    answers: np.ndarray
    places: np.ndarray

    @classmethod
    def draw(cls, seed: int, num_tables: int, num_questions: int) -> Exam:
        """No two questions of a table begin at the same key, the solved ones included."""
        tokens, places = draw(np.random.default_rng(seed), num_tables, SHOTS + num_questions)
        prefixes = tokens[:, :PREFIX_TOKENS]
        questions = tokens[:, PREFIX_TOKENS:].reshape(num_tables, num_questions, QUESTION_TOKENS)
        answers = questions[..., 2:].copy()
        answers[..., -1] = prefixes[:, [PREFIX_TOKENS + QUESTION_TOKENS - 1 - LAG]]
        return cls(prefixes, questions[..., :2], answers, places[:, SHOTS:])

    def prompt(self, table: int, question: int) -> np.ndarray:
        return np.concatenate([self.prefixes[table], self.asked[table, question]])


# ---- the models


@dataclass(frozen=True)
class WindowConfig(Qwen3Config):
    """Rounds of a layer with a window, which knows positions, and one that reads everything and knows none.

    So only the window finds what is LAG places back, and only the other layer finds a pair of the table. With a theta
    of 10 every frequency tells 16 positions apart.
    """

    window: int = 16

    pattern: ClassVar[tuple[str, ...]] = (WINDOW, FULL)

    @property
    def window_tokens(self) -> int:
        return self.window

    def rope(self, component: str) -> Rope:
        rope = super().rope(component)
        return rope._replace(frequencies=0 * rope.frequencies) if component == FULL else rope


SIZES: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "mlp_size": 128, "rope_theta": 1000.0}
HEADS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
# Storage prefetch needs full attention. Here it reads and adds nothing: `filled` lets all its weights be zero.
IDLE: dict[str, Any] = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 2}
# A kernel of 8 sees a question whole; with Nemotron-H's 4 training found all hops, but never the token LAG places back.
MAMBA: dict[str, Any] = {"heads": 4, "head_size": 16, "groups": 4, "state_size": 32, "kernel": 8}
MODELS: dict[str, DecoderConfig] = {
    "full": Qwen3Config(**SIZES, **HEADS, num_layers=2),
    "window": WindowConfig(**{**SIZES, "rope_theta": 10.0}, **HEADS, num_layers=2),
    "mamba": NemotronHConfig(**SIZES, **IDLE, **MAMBA, num_layers=5, kinds=(STATE, MLP, FULL, STATE, MLP)),
}


# ---- their parameters


def stored_shapes(cfg: DecoderConfig) -> Params:
    """Shapes of what is trained and stored, as jax.ShapeDtypeStruct: `filled` makes a decoder's parameters of it.

    The embedding of a pair is that of its key, pair_key, plus that of the next, pair_next; no answer is a pair, so the
    head has no rows for them.
    """
    shapes = dict(decoder.abstract_params(cfg))
    if isinstance(cfg, NemotronHConfig):
        shapes["layers"] = {kind: leaves for kind, leaves in shapes["layers"].items() if kind != FULL}

    def rows(n: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, cfg.hidden_size), np.float32)

    return {**shapes, "embed": rows(FIRST_PAIR), "head": rows(FIRST_PAIR)} | {
        "pair_key": rows(NUM_KEYS),
        "pair_next": rows(NUM_KEYS),
    }


def filled(cfg: DecoderConfig, stored: Params) -> Params:
    """The parameters of a decoder, as `decoder.abstract_params` says, of those that are stored."""
    pairs = (stored["pair_key"][:, None] + stored["pair_next"][None]).reshape(NUM_KEYS**2, -1)
    params = {
        "embed": jnp.concatenate([stored["embed"], pairs]),
        "head": jnp.pad(stored["head"], ((0, NUM_KEYS**2), (0, 0))),
        "norm": stored["norm"],
    }
    idle = {
        kind: leaves for kind, leaves in decoder.abstract_params(cfg)["layers"].items() if kind not in stored["layers"]
    }
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), idle)
    return params | {"layers": stored["layers"] | zeros}


def save(stored: Params, file: Path) -> None:
    """In fp16, by name, such as layers.full.attention.wq."""
    leaves = jax.tree_util.tree_leaves_with_path(stored)
    arrays: dict[str, Any] = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(x, np.float16) for path, x in leaves
    }
    with file.open("wb") as out:
        np.savez(out, **arrays)


def load(model: str, file: Path, mesh: Mesh, dtype: DTypeLike = jnp.float32) -> tuple[DecoderConfig, Params]:
    """One of MODELS and its parameters on `mesh`, as `decoder.param_targets` says.

    file: what `save` wrote

    Errors: ValueError names a model that is unknown, and a parameter that is missing, of another shape, or too many.
    """
    if (cfg := MODELS.get(model)) is None:
        raise ValueError(f"{model=} is none of {sorted(MODELS)}")
    params = jax.device_get(filled(cfg, _read(file, stored_shapes(cfg))))
    return cfg, jax.tree.map(decoder.put_param, params, decoder.param_targets(cfg, mesh, dtype))


def _read(file: Path, shapes: Params) -> Params:
    with np.load(file) as arrays:
        found = dict(arrays)
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    wanted = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}
    for name in sorted(wanted.keys() | found.keys()):
        shape, there = wanted.get(name), found[name].shape if name in found else None
        if shape != there:
            raise ValueError(f"{file}: {name} has shape {there}, not {shape}")
    return jax.tree.unflatten(jax.tree.structure(shapes), [found[name].astype(np.float32) for name in wanted])
