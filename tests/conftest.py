"""Where the tests run and with which seed: eight CPU devices, or the GPUs of this host, strict jax, one seed for all.

pytest --devices cpu|gpu   auto (the default) takes the GPUs on a host that has eight, else eight CPU devices
pytest --seed N            seeds the fixtures, tiny models and their prompts, and Hypothesis; without it Hypothesis runs
                           the same examples every time
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from jaxcache import launch

NUM_DEVICES = 8
MESH_AXES = ("cp", "tp", "pp")
SEED_VARIABLE = "JAXCACHE_TESTS_SEED"
BUILD = Path(__file__).parent.parent / "build"


def pytest_addoption(parser: pytest.Parser):
    group = parser.getgroup("jaxcache")
    group.addoption("--devices", choices=("auto", "cpu", "gpu"), default="auto", help="where jax tests run")
    group.addoption("--seed", type=int, default=None, help="seed of fixtures and Hypothesis (default: 0, no search)")


@pytest.hookimpl(tryfirst=True)  # before Hypothesis and jax read their settings
def pytest_configure(config: pytest.Config):
    config.stash[PLATFORM] = _platform(config.getoption("--devices"))
    os.environ[SEED_VARIABLE] = str(config.getoption("--seed") or 0)  # for modules, and processes that tests start
    _configure_hypothesis(config, config.getoption("--seed"))
    _configure_jax(config.stash[PLATFORM])


PLATFORM = pytest.StashKey[str]()


def _platform(devices: str) -> str:
    if devices != "auto":
        return devices
    return "gpu" if launch.local_platform() == "gpu" and launch.num_gpus() >= NUM_DEVICES else "cpu"


def _configure_hypothesis(config: pytest.Config, seed: int | None):
    from hypothesis.database import DirectoryBasedExampleDatabase

    settings.register_profile("fixed", deadline=None, derandomize=True)
    settings.register_profile("seeded", deadline=None, database=DirectoryBasedExampleDatabase(BUILD / "hypothesis"))
    settings.load_profile("fixed" if seed is None else "seeded")
    if seed is not None:
        config.option.hypothesis_seed = str(seed)


def _configure_jax(platform: str):
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={NUM_DEVICES}".strip()
    os.environ["JAX_PLATFORMS"] = "cuda,cpu" if platform == "gpu" else "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(BUILD / "jax-cache")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # tests that start processes share the GPUs

    import jax

    from tests import strict_jax

    strict_jax.configure()
    if platform == "gpu":
        try:
            jax.devices("gpu")
        except RuntimeError as error:
            raise pytest.UsageError(f"--devices gpu: {error}") from error


def pytest_report_header(config: pytest.Config) -> str:
    import jax

    seed = config.getoption("--seed")
    return f"jaxcache: devices {config.stash[PLATFORM]}, seed {seed or 0}, jax {jax.__version__}"


CLOSING_LINES = pytest.StashKey[list[str]]()
OF_WORKER = "closing_lines"


@pytest.fixture(scope="session")
def closing_lines(request: pytest.FixtureRequest) -> list[str]:
    """Tests add what is to be printed when all have run."""
    return request.config.stash.setdefault(CLOSING_LINES, [])


def pytest_sessionfinish(session: pytest.Session):
    """pytest-xdist: a worker's lines go to the process that prints."""
    if (output := getattr(session.config, "workeroutput", None)) is not None:
        output[OF_WORKER] = session.config.stash.get(CLOSING_LINES, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any):
    lines = getattr(node, "workeroutput", {}).get(OF_WORKER, [])
    node.config.stash.setdefault(CLOSING_LINES, []).extend(lines)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config):
    for line in config.stash.get(CLOSING_LINES, []):
        terminalreporter.write_line(line)
    caught, run = Counter[str](), Counter[str]()
    for outcome in ("passed", "failed", "error"):
        for report in terminalreporter.stats.get(outcome, []):
            is_mutation = isinstance(report, pytest.TestReport) and "mutation" in report.keywords
            if is_mutation and (report.when == "call" or outcome == "error"):
                run[report.location[0]] += 1
                caught[report.location[0]] += outcome == "passed"
    if run:
        by_file = ", ".join(f"{Path(file).stem} {caught[file]}/{run[file]}" for file in sorted(run))
        terminalreporter.write_line(f"mutations caught: {caught.total()}/{run.total()}: {by_file}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    if config.stash[PLATFORM] == "gpu":
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: --devices gpu"))


@pytest.fixture(scope="session")
def platform(request: pytest.FixtureRequest) -> str:
    """Where the tests run, and the processes that they start: cpu or gpu."""
    return request.config.stash[PLATFORM]


@pytest.fixture(scope="session")
def seed(request: pytest.FixtureRequest) -> int:
    return request.config.getoption("--seed") or 0


@pytest.fixture
def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.fixture(scope="session")
def mesh_shapes() -> tuple[tuple[int, int, int], ...]:
    """The (cp, tp, pp) that a test which depends on the mesh goes through."""
    return (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2)


@pytest.fixture(scope="session")
def make_mesh() -> Callable:
    """make_mesh(cp, tp, pp, axis_types=Auto): a jax Mesh of the first devices; equal calls give the same mesh.

    Skips the test where the host has too few GPUs.
    """
    import jax

    def make(cp: int = 1, tp: int = 1, pp: int = 1, axis_type=jax.sharding.AxisType.Auto) -> jax.sharding.Mesh:
        shape = (cp, tp, pp)
        devices = jax.devices()
        if math.prod(shape) > len(devices):
            if devices[0].platform == "cpu":
                raise ValueError(f"{shape=} needs more than the {len(devices)} CPU devices of the tests")
            pytest.skip(f"mesh {shape} needs {math.prod(shape)} GPUs, this host has {len(devices)}")
        grid = np.asarray(devices[: math.prod(shape)]).reshape(shape)
        return jax.sharding.Mesh(grid, MESH_AXES, axis_types=(axis_type,) * len(MESH_AXES))

    return make
