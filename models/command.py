"""What the commands of this folder share: the model that they open, how errors are shown, where figures go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

import jaxcache
from models import fetch, fleet
from models.conversation import LocalModel
from models.serve import BatchShape

ERRORS = (ValueError, OSError, MemoryError)  # which say what to do


def open_model(path: Path | None, shape: BatchShape, console: Console) -> LocalModel:
    """On one device of this process. path: None: SmolLM2, which is fetched"""
    fleet.join(None, None, None, 1)
    with console.status("loading the model"):
        return LocalModel(path or fetch.fetch(fetch.SMOLLM2), jaxcache.one_device_mesh(), shape)


def show_error(error: BaseException) -> None:
    Console(stderr=True, highlight=False).print("[red]error:[/]", Text(str(error)), soft_wrap=True)


def check_json(target: str | None) -> None:
    """OSError now, not after minutes, if figures cannot be written there."""
    if target is not None and target != "-":
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).open("a").close()


def write_json(target: str | None, figures: dict[str, Any]) -> None:
    """target: a file, - for standard output, or None for nowhere"""
    text = json.dumps(figures, indent=2)
    if target == "-":
        sys.stdout.write(text + "\n")
    elif target is not None:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).write_text(text + "\n")
