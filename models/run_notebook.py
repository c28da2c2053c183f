"""Runs a notebook from its text, and writes the pair that shows the outputs.

    python -m models.run_notebook [models/notebooks/NAME.py] [--output FILE.ipynb]

NAME.py (jupytext's percent format) is what people edit; NAME.ipynb beside it has the same cells with their outputs.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from models import fetch

NOTEBOOK = Path(__file__).parent / "notebooks" / "chat_with_a_prefix_cache.py"
CELL_TIMEOUT_S = 600


def run(source: Path) -> Any:
    """The notebook with its outputs. Raises CellExecutionError, which shows the cell and its traceback."""
    notebook: Any = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # instead of a random one, so that a new run changes nothing but outputs
    start = time.perf_counter()

    def note(cell: Any, cell_index: int, **_: Any) -> None:
        told = f"cell {cell_index + 1} of {len(notebook.cells)}, {time.perf_counter() - start:.0f} s"
        print(told, file=sys.stderr, flush=True)

    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(source.parent)}},
    )
    client.on_cell_executed = note
    return client.execute()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m models.run_notebook", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("source", type=Path, nargs="?", default=NOTEBOOK, help="(default: the one there is)")
    parser.add_argument("--output", type=Path, help="(default: beside the source)")
    args = parser.parse_args(argv)
    try:
        if not args.source.is_file():
            raise FileNotFoundError(f"{args.source}: no such file")
        if "SMOLLM2" in args.source.read_text():
            fetch.fetch(fetch.SMOLLM2)  # here, so that what pip says is no output of the notebook
        notebook = run(args.source)
    except CellExecutionError as error:
        print(error, file=sys.stderr)
        return 1
    except (OSError, ValueError, CellTimeoutError, DeadKernelError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    nbformat.write(notebook, args.output or args.source.with_suffix(".ipynb"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
