"""The files of a snapshot: Orbax checkpoints in one folder, of which the last makes it one.

    folder/part-0000   pages     {chunk: {field: words}}
           part-0001   ...
           tree        {"npz": uint8[...]} and, in its metadata, the manifest: it comes when all parts are there

Orbax makes each checkpoint appear at once or not at all, so a folder without `tree` is no snapshot. Orbax is imported
where it is needed: the package does without it.
"""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jaxcache.core.serving import RefusedValue
from jaxcache.runtime.snapshot_manifest import Manifest, sealed, unsealed

TREE = "tree"
PRIVATE = 0o700  # it has prompts in it
EXPLANATION = "a snapshot needs Orbax: pip install 'jaxcache[snapshot]'"

MAX_CAUSE = 300  # characters of what Orbax says

Pages = dict[str, dict[str, Any]]  # by chunk and field


def orbax() -> ModuleType:
    """orbax.checkpoint.v1. Raises ImportError that names the extra."""
    try:
        from orbax.checkpoint import v1
    except ImportError as error:
        raise ImportError(EXPLANATION) from error
    return v1


class SnapshotFiles:
    """One snapshot's folder. Every process of a replica makes the same calls in the same order."""

    def __init__(self, directory: str | PathLike[str]):
        self.ocp = orbax()
        self.folder = Path(directory).absolute()

    def make_folder(self) -> None:
        """Raises ValueError if there is anything; OSError if it cannot be made."""
        self.folder.mkdir(PRIVATE, parents=True, exist_ok=True)
        if any(self.folder.iterdir()):
            raise RefusedValue(f"{self.folder} is not empty: a snapshot needs a folder of its own")

    def write_pages(self, part: int, pages: Pages) -> None:
        self._write(_part(part), {"pages": pages}, None)

    def write_tree(self, manifest: Manifest, tree: bytes) -> None:
        """The last call: from here on there is a snapshot."""
        self._write(TREE, {"tree": {"npz": np.frombuffer(tree, np.uint8)}}, sealed(manifest))

    def _write(self, name: str, content: dict[str, Any], metadata: Any) -> None:
        """Raises OSError if it cannot be written."""
        try:
            self.ocp.save_checkpointables(self.folder / name, content, custom_metadata=metadata)
        except Exception as error:
            raise OSError(f"the snapshot in {self.folder} could not be written: {_first_cause(error)}") from error

    def check_there(self) -> None:
        """Raises ValueError where there is no whole snapshot. Asks the file system only: what follows waits for all
        processes."""
        if not (self.folder / TREE).is_dir():
            raise RefusedValue(f"there is no snapshot in {self.folder}, or it was never finished")

    def read_manifest(self) -> Manifest:
        """Raises ValueError if it cannot be read."""
        try:
            return unsealed(self.ocp.checkpointables_metadata(self.folder / TREE).custom_metadata)
        except Exception as error:
            raise self._damaged(error) from error

    def read_tree(self) -> bytes:
        """Raises ValueError if it cannot be read."""
        try:
            tree = self.ocp.load_checkpointables(self.folder / TREE, {"tree": None})["tree"]
            return np.asarray(tree["npz"]).tobytes()
        except Exception as error:
            raise self._damaged(error) from error

    def read_pages(self, part: int, abstract: dict[str, dict[str, jax.ShapeDtypeStruct]]) -> Pages:
        """abstract: all of the part's chunks. Raises ValueError if they cannot be read."""
        try:
            return self.ocp.load_checkpointables(self.folder / _part(part), {"pages": abstract})["pages"]
        except Exception as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return RefusedValue(f"the snapshot in {self.folder} is damaged: {_first_cause(error)}")


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error) or repr(error))[:MAX_CAUSE]


def _part(number: int) -> str:
    return f"part-{number:04}"
