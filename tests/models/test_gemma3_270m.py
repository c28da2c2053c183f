"""Gemma 3 270M's published weights against the reference implementation, beyond the window too: `make test-gemma`.

Opt-in: the weights come under the Gemma Terms of Use, as a third party's packages (240 MB). Only figures are kept here.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from models.decoder import make_extend
from models.loading import load_model
from tests.models.gemma_file import REFERENCE, join_gemma_file
from tests.models.steps import PAGE_TOKENS, Tables, make_batch, zero_pools

pytestmark = pytest.mark.gemma

TOLERANCE = 1e-3
CHUNK, DECODED = 50, 64


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return join_gemma_file(tmp_path_factory.mktemp("gemma"))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 2)], ids=str)
def test_logits_and_greedy_tokens(path, make_mesh, shape):
    mesh = make_mesh(*shape)
    cfg, params = load_model(path, mesh, jnp.float32)
    extend = make_extend(cfg, mesh, PAGE_TOKENS)
    tokens, positions = REFERENCE["random_tokens"][None], REFERENCE["random_positions"].tolist()
    width = -(-(tokens.shape[1] + DECODED) // PAGE_TOKENS)
    tables: Tables = {name: np.arange(width, dtype=np.int32)[None] for name in ("full", "window")}
    pools, rows = zero_pools(cfg, mesh), {}
    for start in range(0, tokens.shape[1], CHUNK):
        out, pools = extend(params, pools, make_batch(tokens, tables, start, start + CHUNK, CHUNK))
        rows |= {at: np.asarray(out)[0, at - start] for at in positions if start <= at < start + CHUNK}
    for i, at in enumerate(positions):
        assert np.abs(rows[at][REFERENCE["random_ids"][i]] - REFERENCE["random_logits"][i]).max() <= TOLERANCE
    grown = tokens
    greedy = [int(rows[positions[-1]].argmax())]
    while len(greedy) < DECODED:
        grown = np.append(grown, [[greedy[-1]]], axis=1).astype(np.int32)
        end = grown.shape[1]
        out, pools = extend(params, pools, make_batch(grown, tables, end - 1, end, 1))
        greedy.append(int(np.asarray(out)[0, 0].argmax()))
    assert greedy == REFERENCE["random_greedy"].tolist()
