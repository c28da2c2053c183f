"""Options that commands have in common: `--mesh cp,tp,pp`, and `--json FILE`, where a report goes.

Places are checked before the work begins, so that nothing measured is lost for want of one.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

STDOUT = "-"


def mesh_shape(text: str) -> tuple[int, int, int]:
    """ "2,2,1" as numbers; ValueError for anything else."""
    numbers = text.split(",")
    if len(numbers) != 3 or not all(n.strip().isdecimal() and int(n) for n in numbers):
        raise ValueError(f"must be three positive numbers cp,tp,pp, not {text!r}")
    cp, tp, pp = map(int, numbers)
    return cp, tp, pp


def prepare_file(option: str, path: Path) -> None:
    """Makes the folder, and leaves the file as it is. ValueError if it could not be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            reason = "it is a folder"
        elif not os.access(path if path.exists() else path.parent, os.W_OK):
            reason = "Permission denied"
        else:
            return
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}"
    raise ValueError(f"{option}: {path} cannot be written: {reason}")


def prepare_json(target: str | None) -> None:
    """Of the option --json: a file, `STDOUT`, or None if nobody asked. ValueError as above."""
    if target not in (None, STDOUT):
        prepare_file("--json", Path(target))


def write_json(target: str | None, report: Any) -> None:
    """Writes a report where it was asked for, if it was."""
    text = json.dumps(report, indent=2) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
    elif target is not None:
        Path(target).write_text(text)
