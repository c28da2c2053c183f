"""The command line. Every file beside this one is a command, but those whose names begin with an underscore.

To add a command, add a file with what `Command` lists.

Modules import quickly: what is slow to import (jax) is imported inside `run`.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Protocol, cast


class Command(Protocol):
    """What the module of a command defines."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the options."""
        ...

    def run(self, args: argparse.Namespace) -> int:
        """Does it and returns the exit code."""
        ...


def commands() -> dict[str, Command]:
    """Name -> module, in order of name."""
    names = sorted(info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith("_"))
    return {name: cast(Command, importlib.import_module(f"{__name__}.{name}")) for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code; `argv` is what follows the program's name."""
    parser = argparse.ArgumentParser(prog="python -m jaxcache", description="A hierarchical prefix cache for JAX.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    found = commands()
    for name, command in found.items():
        command.add_arguments(subparsers.add_parser(name, help=command.HELP, description=command.HELP))
    args = parser.parse_args(argv)
    return found[args.command].run(args)
