"""Who may import whom, and the rules of the house, checked over every file by its syntax tree."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("jaxcache", "kernels_pallas", "models", "benchmarks")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 50


@dataclass(frozen=True)
class Layer:
    """Which modules of ours and which packages of others the files of one layer may import."""

    ours: tuple[str, ...]
    others: tuple[str, ...]


FOUNDATION = ("jaxcache.types", "jaxcache.components", "jaxcache.storage")
STORED = ("jaxcache.pools.cells", "jaxcache.pools.storage_units")  # of the pools, what knows no mesh
TRYING_OUT = ("jaxcache.command_options", "jaxcache.launch", "jaxcache.replay.traces")
PUBLISHED = ("safetensors", "gguf", "tokenizers", "jinja2")
NOTEBOOKS = ("jupytext", "nbclient", "nbformat")
MIDDLE = (
    *FOUNDATION,
    "jaxcache.__version__",
    "jaxcache.config",
    "jaxcache.core",
    "jaxcache.pools",
    "jaxcache.engine",
    "jaxcache.agreement",
    "jaxcache.fleet",
    "jaxcache.runtime",
    "kernels_pallas",
)

# The longest matching name counts. "jaxcache!" is the package and its public names, but none of its modules.
LAYERS = {
    "jaxcache.types": Layer((), ("numpy",)),
    "jaxcache.components": Layer(("jaxcache.types", "jaxcache.components"), ("numpy", "ml_dtypes")),
    "jaxcache.core": Layer(
        ("jaxcache.types", "jaxcache.config", "jaxcache.components.base", "jaxcache.core"), ("numpy", "xxhash")
    ),
    "jaxcache.storage": Layer(("jaxcache.types", "jaxcache.storage"), ("numpy", "xxhash")),
    "jaxcache.config": Layer(("jaxcache.types",), ()),
    "kernels_pallas": Layer(("kernels_pallas",), ("jax", "numpy")),
    "jaxcache.pools": Layer(
        ("jaxcache.types", "jaxcache.components", "jaxcache.config", "jaxcache.pools", "kernels_pallas"),
        ("jax", "numpy", "ml_dtypes"),
    ),
    "jaxcache.engine": Layer(
        (*FOUNDATION, "jaxcache.core.stores", "jaxcache.pools", "jaxcache.engine"), ("jax", "numpy")
    ),
    "jaxcache.agreement": Layer(
        (*FOUNDATION, "jaxcache.core", "jaxcache.pools", "jaxcache.engine", "jaxcache.agreement"), ("jax", "numpy")
    ),
    "jaxcache.fleet": Layer(
        (
            *FOUNDATION,
            "jaxcache.__version__",
            "jaxcache.config",
            "jaxcache.core",
            "jaxcache.pools",
            "jaxcache.agreement",
            "jaxcache.fleet",
        ),
        ("jax", "numpy"),
    ),
    "jaxcache.runtime": Layer(MIDDLE, ("jax", "numpy", "xxhash", "prometheus_client", "orbax")),
    "jaxcache.cache": Layer(MIDDLE, ("jax", "numpy")),
    "jaxcache.command_options": Layer((), ()),
    "jaxcache.launch": Layer((), ("jax",)),
    "jaxcache.replay": Layer(
        (*FOUNDATION, "jaxcache.config", "jaxcache.core", "jaxcache.runtime.events", "jaxcache.replay"), ("numpy",)
    ),
    "jaxcache.testing": Layer(
        (
            *FOUNDATION,
            *STORED,
            "jaxcache.config",
            "jaxcache.core",
            "jaxcache.engine",
            "jaxcache.agreement",
            "jaxcache.runtime.controller",
            "jaxcache.testing",
        ),
        ("numpy",),
    ),
    "jaxcache.cli": Layer(("jaxcache", "kernels_pallas"), ("jax", "numpy", "xxhash", "rich", "matplotlib")),
    "jaxcache.__main__": Layer(("jaxcache.cli",), ()),
    "jaxcache": Layer(("jaxcache",), ()),
    "models": Layer(
        ("jaxcache!", "jaxcache.components", *TRYING_OUT, "kernels_pallas", "models"),
        ("jax", "flax", "numpy", "ml_dtypes", "matplotlib", "optax", "rich", *PUBLISHED, *NOTEBOOKS),
    ),
    "benchmarks": Layer(PACKAGES, ("jax", "numpy", "matplotlib", "pytest", "rich")),
}

UNDECIDED = frozenset(
    {"asyncio", "concurrent", "datetime", "multiprocessing", "os", "queue", "random", "secrets", "select", "socket"}
    | {"subprocess", "tempfile", "threading", "time", "uuid"}
)
BROAD = ("Exception", "BaseException")
# Where a worker's outermost frame is, and where what ends serving is told to the other processes first.
WITH_WORKERS = frozenset(
    f"jaxcache.{name}" for name in ("engine.jobs", "engine.storage_io", "runtime.controller", "fleet.start")
)
COMMAND_LINE_ONLY = frozenset({"argparse", "rich", "matplotlib"})
# They run in an environment of their own, with the reference models.
FOREIGN_SCRIPTS = frozenset({"models.make_goldens", "models.make_real_goldens"})


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def sources() -> dict[str, str]:
    """Module name -> source of every file of ours; notebooks are not code of the house."""
    files = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {module_name(path): path.read_text() for path in files if "notebooks" not in path.parts}


SOURCES = sources()


def imports(name: str, source: str) -> Iterator[str]:
    """Dotted names that a module imports anywhere in its text; `from a import b` counts as a.b."""
    is_package = (ROOT / Path(*name.split("."), "__init__.py")).exists()
    package = name.split(".") if is_package else name.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def within(name: str, prefix: str) -> bool:
    if prefix.endswith("!"):
        top = prefix.removesuffix("!")
        path = ROOT / name.replace(".", "/")
        is_module = path.is_dir() or path.with_suffix(".py").exists()
        return name == top or (name.rpartition(".")[0] == top and not is_module)
    return name == prefix or name.startswith(prefix + ".")


def layer_of(name: str) -> tuple[str, Layer]:
    return max((item for item in LAYERS.items() if within(name, item[0])), key=lambda item: len(item[0]))


def forbidden_imports(name: str, source: str) -> list[str]:
    prefix, layer = layer_of(name)
    bad = []
    for target in imports(name, source):
        top = target.partition(".")[0]
        if top in PACKAGES:
            allowed = any(within(target, ours) for ours in layer.ours)
        elif top in sys.stdlib_module_names:
            allowed = not (prefix == "jaxcache.core" and top in UNDECIDED)
        else:
            allowed = top in layer.others
        if top in COMMAND_LINE_ONLY and name.startswith("jaxcache."):
            allowed = prefix == "jaxcache.cli"
        if not allowed:
            bad.append(f"{name} imports {target}")
    return bad


def long_functions(name: str, source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if num_lines > MAX_FUNCTION_LINES:
                found.append(f"{name}.{node.name}: {num_lines} lines")
    return found


def long_file(name: str, source: str) -> list[str]:
    num_lines = len(source.splitlines())
    return [f"{name}: {num_lines} lines"] if num_lines > MAX_FILE_LINES else []


def probes(name: str, source: str) -> list[str]:
    calls = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    return [f"{name}:{c.lineno}: hasattr" for c in calls if isinstance(c.func, ast.Name) and c.func.id == "hasattr"]


def broad_excepts(name: str, source: str) -> list[str]:
    """`except:`, `except Exception`, `except BaseException`, alone or in a tuple, outside the workers' frames, and
    unless it ends by raising the same again, or, of an Exception, another error from it."""
    if name in WITH_WORKERS:
        return []
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            types = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            last = node.body[-1]
            cause = last.cause if isinstance(last, ast.Raise) else None
            is_exception = all(isinstance(t, ast.Name) and t.id != "BaseException" for t in types)
            from_it = is_exception and isinstance(cause, ast.Name) and cause.id == node.name
            raises_again = isinstance(last, ast.Raise) and (last.exc is None or from_it)
            if not raises_again and any(t is None or (isinstance(t, ast.Name) and t.id in BROAD) for t in types):
                found.append(f"{name}:{node.lineno}: too broad")
    return found


HOUSE_RULES = (long_functions, long_file, probes, broad_excepts)


def test_import_rules():
    names = [name for name in SOURCES if name not in FOREIGN_SCRIPTS]
    assert names
    assert not [line for name in names for line in forbidden_imports(name, SOURCES[name])]


def circles(sources: Mapping[str, str]) -> list[list[str]]:
    """Modules that import each other, directly or through others; an import for types alone counts as any."""
    imported = {
        name: {module_of(target, sources) for target in imports(name, source)} for name, source in sources.items()
    }
    names = [name for name in sources if not name.endswith("__main__")]
    reach: dict[str, set[str]] = {}
    for name in names:
        found, stack = set(), [name]
        while stack:
            new = {target for target in imported[stack.pop()] if target} - found
            found |= new
            stack += new
        reach[name] = found
    return [[a, b] for a in names for b in names if a < b and b in reach[a] and a in reach[b]]


def module_of(target: str, sources: Mapping[str, str]) -> str | None:
    """The file that an imported name is in; None: none of ours. The package's own names are imported when asked for."""
    name = target if target in sources else target.rpartition(".")[0]
    return name if name in sources and name != "jaxcache" else None


def test_no_file_is_in_a_circle():
    assert not circles({name: source for name, source in SOURCES.items() if name.startswith("jaxcache.")})


def test_a_circle_is_seen():
    sources = {
        "jaxcache.a": "import jaxcache.b",
        "jaxcache.b": "def f():\n    from jaxcache.c import x",
        "jaxcache.c": "",
    }
    assert not circles(sources)
    typed = "if TYPE_CHECKING:\n    from jaxcache.a import y"
    assert circles({**sources, "jaxcache.c": typed}) == [["jaxcache.a", b] for b in ("jaxcache.b", "jaxcache.c")] + [
        ["jaxcache.b", "jaxcache.c"]
    ]


@pytest.mark.parametrize("rule", HOUSE_RULES, ids=lambda rule: rule.__name__)
def test_house_rules(rule):
    assert not [line for name, source in SOURCES.items() for line in rule(name, source)]


WITHOUT_JAX = ("jaxcache", "jaxcache.core", "jaxcache.launch", "jaxcache.replay.study", "jaxcache.testing.simulation")


@pytest.mark.parametrize("package", WITHOUT_JAX)
def test_imports_without_jax(package):
    code = f"import sys, {package}; print(sorted({{'jax', 'jaxlib', 'flax', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("jaxcache.core.match", "import jax"),
        ("jaxcache.core.match", "def f():\n    from jax import numpy"),
        ("jaxcache.core.match", "import time"),
        ("jaxcache.core.match", "from os import path"),
        ("jaxcache.core.match", "from concurrent.futures import Future"),
        ("jaxcache.core.match", "from jaxcache.components.full_attention import FullAttention"),
        ("jaxcache.core.match", "from jaxcache.components import FullAttention"),
        ("jaxcache.core.match", "from ..storage import base"),
        ("jaxcache.core.match", "from jaxcache import Cache"),
        ("jaxcache.types", "from jaxcache.core import match"),
        ("jaxcache.types", "import jaxcache.components.base"),
        ("jaxcache.config", "import jaxcache.core.match"),
        ("jaxcache.components.base", "import jax"),
        ("jaxcache.storage.file", "from jaxcache.core.tokens import Namespace"),
        ("jaxcache.storage.file", "import jax"),
        ("jaxcache.pools.device_pool", "from jaxcache.core import match"),
        ("jaxcache.runtime.controller", "from jaxcache.cache import Cache"),
        ("jaxcache.engine.storage_io", "from jaxcache.core.prefix_cache import PrefixCache"),
        ("jaxcache.engine.transfer_engine", "from jaxcache.agreement.lanes import Lanes"),
        ("jaxcache.agreement.lanes", "from jaxcache.fleet.fleet import Fleet"),
        ("jaxcache.fleet.fleet", "from jaxcache.runtime.controller import Controller"),
        ("jaxcache.testing.scenario", "import jax"),
        ("jaxcache.runtime.controller", "import argparse"),
        ("jaxcache.runtime.metrics", "from rich.table import Table"),
        ("jaxcache.replay.study", "from matplotlib.figure import Figure"),
        ("jaxcache.replay.replay", "from jaxcache.testing.scenario import Scenario"),
        ("jaxcache.testing.simulation", "from jaxcache import Cache"),
        ("jaxcache.testing.simulation", "import models.serve"),
        ("jaxcache.cli.doctor", "from models import serve"),
        ("jaxcache.cli.replay", "from benchmarks.core.workload import TRACE"),
        ("models.serve", "import benchmarks.turns"),
        ("benchmarks.turns", "import flax"),
        ("kernels_pallas.gather_pages", "from jaxcache.types import Span"),
        ("models.families.qwen3", "from jaxcache.core.match import Matcher"),
        ("models.families.qwen3", "import jaxcache.runtime.controller"),
        ("models.families.qwen3", "from jaxcache import types"),
        ("models.families.qwen3", "import torch"),
    ],
)
def test_import_rules_bite(name, source):
    assert forbidden_imports(name, source)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("jaxcache.core.match", "import heapq\nimport numpy as np\nfrom jaxcache.components.base import Component"),
        ("jaxcache.core.match", "from .node import Node\nfrom jaxcache.types import Span"),
        ("jaxcache.pools.device_pool", "import jax.numpy as jnp\nfrom kernels_pallas.gather_pages import gather_pages"),
        ("jaxcache.cli.doctor", "import argparse\nfrom rich.table import Table\nfrom jaxcache.storage import file"),
        ("benchmarks.core.steps", "import jaxcache.core.lease, models.serve, benchmarks.figure, rich.table"),
        ("models.fleet", "from jaxcache import launch\nfrom jaxcache.replay.traces import read_trace"),
        ("models.families.qwen3", "import jaxcache\nfrom jaxcache import Cache\nfrom flax import nnx\nimport argparse"),
    ],
)
def test_import_rules_allow(name, source):
    assert not forbidden_imports(name, source)


@pytest.mark.parametrize(
    ("rule", "source"),
    [
        (long_functions, "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
        (long_file, "x = 1\n" * (MAX_FILE_LINES + 1)),
        (probes, "y = hasattr(x, 'y')"),
        (broad_excepts, "try:\n    pass\nexcept Exception:\n    pass"),
        (broad_excepts, "try:\n    pass\nexcept (OSError, BaseException) as e:\n    pass"),
        (broad_excepts, "try:\n    pass\nexcept:\n    pass"),
        (broad_excepts, "try:\n    pass\nexcept BaseException as e:\n    raise ValueError from e"),
    ],
)
def test_house_rules_bite(rule, source):
    assert rule("jaxcache.cli.doctor", source)
