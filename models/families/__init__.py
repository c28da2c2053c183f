"""The families of models. Every file of this folder is read, and a configuration that names its `model_types`, there or
in a program that uses this package, is found by them: a new family is one file."""

from __future__ import annotations

import pkgutil
from importlib import import_module

from models.decoder import FAMILIES
from models.tiny import TINY

for _module in pkgutil.iter_modules(__path__, f"{__name__}."):
    import_module(_module.name)

__all__ = ["FAMILIES", "TINY"]
