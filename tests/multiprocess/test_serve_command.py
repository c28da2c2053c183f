"""`python -m models.serve --processes N`: one table, one JSON document, and whose fault it was."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxcache import launch
from models import trace_demo
from tests.multiprocess.fleets import TIMEOUT_S

pytestmark = pytest.mark.multiprocess

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "models.serve", "--processes", "2", "--mesh", "1,1,2"]


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    """On CPU devices, wherever the tests run."""
    command, env = [*COMMAND, *options], {**os.environ, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.mark.slow
def test_the_first_process_shows_the_results_of_all(tmp_path):
    done = serve("--requests", "4", "--json", "-", "--storage", str(tmp_path / "storage"))
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["tokens_identical"]
    assert figures["restart"]["tokens_identical"]
    assert figures["restart"]["hit_tokens"]["storage"] > 0
    assert figures["compiles_after_warmup"] == 0
    assert done.stderr.count("every token as without a cache") == 1
    assert any((tmp_path / "storage" / "values").glob("*/*"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["options", "slurm"])
def test_processes_that_somebody_else_starts_find_their_coordinator(tmp_path, launcher):
    """Each makes its own two CPU devices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    outputs = [tmp_path / "0.json", tmp_path / "1.json"]
    started = [start_one(launcher, port, i, outputs[i]) for i in range(2)]
    try:
        errors = [process.communicate(timeout=TIMEOUT_S)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    assert json.loads(outputs[0].read_text())["requests"] == 2
    assert not outputs[1].exists()


def start_one(launcher: str, port: str, index: int, output: Path) -> subprocess.Popen[bytes]:
    """One of two processes, which is told where it belongs by options or by the variables of Slurm."""
    address = f"127.0.0.1:{port}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_COORDINATOR_BIND_ADDRESS": address, "XLA_FLAGS": ""}
    if launcher == "slurm":
        job = {"JOB_ID": "1", "STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "PROCID": str(index), "LOCALID": str(index)}
        env |= {f"SLURM_{name}": value for name, value in job.items()} | {"JAX_COORDINATOR_PORT": port}
        where = ["--coordinator", "auto"]
    else:
        where = ["--coordinator", address, "--num-processes", "2", "--process-id", str(index)]
    one = [sys.executable, "-m", "models.serve", "--mesh", "1,2,2", "--requests", "2", "--no-cache", *where]
    return subprocess.Popen([*one, "--json", str(output)], cwd=ROOT, env=env, stderr=subprocess.PIPE)


@pytest.mark.parametrize("coordinator", ["HOST0", ":1", "host:port", "host:0", "host:99999"])
def test_a_coordinator_without_an_address_is_refused(capsys, coordinator):
    assert trace_demo.main(["--mesh", "1,1,1", "--trace", "nowhere.jsonl", "--coordinator", coordinator]) == 1
    assert "--coordinator must be HOST:PORT or auto" in capsys.readouterr().err


def test_two_ways_to_have_a_fleet_are_refused(capsys):
    command = ["--mesh", "2,1,1", "--trace", "nowhere.jsonl", "--processes", "2", "--coordinator", "auto"]
    assert trace_demo.main(command) == 1
    assert "--processes starts a fleet on this host, --coordinator joins one" in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused(capsys):
    """jax would crash."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = ["--mesh", "2,1,1", "--coordinator", address, "--num-processes", "2", "--process-id", "0"]
        assert trace_demo.main(command) == 1
    assert "cannot listen on port" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--num-processes", "--process-id"])
def test_options_of_a_fleet_without_its_coordinator_are_refused(capsys, option):
    assert trace_demo.main(["--mesh", "1,1,1", "--trace", "nowhere.jsonl", option, "1"]) == 1
    assert "--num-processes and --process-id need --coordinator" in capsys.readouterr().err


@pytest.fixture
def joins_here(monkeypatch):
    """This process may try to join a fleet: its streams stay, and jax believes that it has not begun."""
    monkeypatch.setattr(launch, "_keep_stdout", lambda: None)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: False)


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        (["auto"], "--coordinator HOST:PORT, --num-processes, --process-id"),
        (["127.0.0.1:1", "--process-id", "0"], "--num-processes"),
    ],
)
def test_what_no_cluster_tells_is_named(joins_here, capsys, options, missing):
    assert trace_demo.main(["--coordinator", *options]) == 1
    assert capsys.readouterr().err.endswith(f"What the cluster does not tell must be set: {missing}\n")


def test_a_number_of_processes_that_jax_does_not_know_is_named(joins_here, monkeypatch, capsys):
    """As with a jax that keeps it elsewhere."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: None)
    monkeypatch.setattr("jax._src.distributed.global_state", None)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    assert trace_demo.main(["--coordinator", "auto"]) == 1
    error = capsys.readouterr().err
    assert "The number of processes is not known." in error and "--num-processes" in error


def test_an_error_is_shown_with_the_number_of_its_process():
    done = serve("--trace", "nowhere.jsonl")
    assert done.returncode == 1
    assert "exit codes by process: 0: 1, 1: 1" in done.stderr
    assert "--- stderr of process 1\nerror: [Errno 2] No such file or directory: 'nowhere.jsonl'" in done.stderr
