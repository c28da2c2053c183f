"""SmolLM2's published weights against the reference implementation's logits, tokens and text.

Fetches a package of 93 MB, so it is not among the quick tests. tests/goldens/smollm2 was made from the same file.
"""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models import fetch
from models.decoder import make_extend
from models.loading import load_model
from models.text import Text, load_text
from tests.models.steps import PAGE_TOKENS, WIDTH, Steps, make_batch, zero_pools

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent.parent / "goldens" / "smollm2"
REFERENCE = np.load(GOLDEN / "reference.npz")
CASES = json.loads((GOLDEN / "tokenizer_cases.json").read_text())
TOLERANCE = 1e-3
CHUNK, DECODED = 64, 64
MESHES = [(1, 1, 1), (2, 3, 1)]  # tp must divide nine query heads and three kv heads


@pytest.fixture(scope="module")
def path() -> Path:
    return fetch.fetch(fetch.SMOLLM2)


@pytest.fixture(scope="module")
def text(path) -> Text:
    return load_text(path)


@pytest.fixture(scope="module", params=MESHES, ids=str)
def steps(request, path, make_mesh) -> Steps:
    mesh = make_mesh(*request.param)
    cfg, params = load_model(path, mesh, jnp.float32)
    return Steps(cfg, mesh, params, make_extend(cfg, mesh, PAGE_TOKENS), np.zeros((1, 0), np.int32), np.zeros((1, 0)))


@pytest.mark.parametrize("prompt", ["short", "long"])
def test_logits_and_greedy_tokens(steps, prompt):
    tokens, positions = REFERENCE[f"{prompt}_tokens"][None], REFERENCE[f"{prompt}_positions"].tolist()
    num_pages = -(-(tokens.shape[1] + DECODED) // PAGE_TOKENS)
    tables = {"full": np.arange(num_pages + WIDTH, dtype=np.int32)[None]}
    pools, rows = zero_pools(steps.cfg, steps.mesh), {}
    for start in range(0, tokens.shape[1], CHUNK):
        stop = min(start + CHUNK, tokens.shape[1])
        out, pools = steps.extend(steps.params, pools, make_batch(tokens, tables, start, stop, CHUNK))
        rows |= {at: np.asarray(out)[0, at - start] for at in positions if start <= at < stop}
    for i, at in enumerate(positions):
        want, ids = REFERENCE[f"{prompt}_logits"][i], REFERENCE[f"{prompt}_ids"][i]
        assert np.abs(rows[at][ids] - want).max() <= TOLERANCE
        wide = rows[at].astype(np.float64)
        sums = (wide.max(), wide.mean(), wide.max() + np.log(np.exp(wide - wide.max()).sum()))
        wanted = [REFERENCE[f"{prompt}_{name}"][i] for name in ("max", "mean", "logsumexp")]
        assert np.abs(np.array(sums) - wanted).max() <= TOLERANCE
    greedy = [int(rows[positions[-1]].argmax())]
    grown = tokens
    while len(greedy) < DECODED:
        grown = np.append(grown, [[greedy[-1]]], axis=1).astype(np.int32)
        end = grown.shape[1]
        out, pools = steps.extend(steps.params, pools, make_batch(grown, tables, end - 1, end, 1))
        greedy.append(int(np.asarray(out)[0, 0].argmax()))
    assert greedy == REFERENCE[f"{prompt}_greedy"].tolist()


@pytest.mark.parametrize("case", CASES["texts"], ids=lambda case: repr(case["text"][:12]))
def test_token_ids(text, case):
    assert text.encode(case["text"]).tolist() == case["ids"]


@pytest.mark.parametrize("case", CASES["chats"], ids=["one turn", "several turns"])
def test_chat_template(text, case):
    assert text.chat(case["messages"], case["add_generation_prompt"]) == case["text"]


def test_text_comes_back(text):
    said = "Ångström, 日本語, 🦙 and 2024."
    assert text.decode(text.encode(said)) == said


def test_meshes_that_work_are_named(path, make_mesh):
    with pytest.raises(ValueError, match=r"tp=2 does not divide 9 heads.*may be one of \[1, 3\]"):
        load_model(path, make_mesh(1, 2, 1), jnp.float32)
