"""What the commands of this folder share: the model that they open, and how errors are shown."""

from __future__ import annotations

from pathlib import Path

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
