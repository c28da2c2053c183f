"""Classes that are chosen by a name: each says its own in the line that defines it, and its folder is read."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable
from importlib import import_module


def register(table: dict[str, type], name: str, cls: type, what: str) -> None:
    """ValueError if another class has the name. One that is read again (a cell of a notebook) replaces itself."""
    other = table.get(name, cls)
    if (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(f"there is {what} {name!r} already: {other.__module__}.{other.__qualname__}")
    table[name] = cls


def read_folder(package: str, path: Iterable[str]) -> None:
    """Imports every file of a package. path: its `__path__`"""
    for module in pkgutil.iter_modules(path, f"{package}."):
        import_module(module.name)
