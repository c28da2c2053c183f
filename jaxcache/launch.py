"""Starts the processes of one fleet on this host, for tests and for trying things out; ends only what it started.

    caller                                           process i of N
    Processes(["-m", "my_loop"], 2) -- starts ---->  join(): jax.distributed on 127.0.0.1; then its own work
    wait(60) <------- exit code, stdout, stderr ---  its output goes to files, so that it never blocks

A process that fails leaves without jax's farewell, which would wait for the others; the caller notices, gives those a
moment to end by themselves, and ends them.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

LOOPBACK = "127.0.0.1"
PLATFORMS = {"cpu": "cpu", "gpu": "cuda,cpu"}
DEVICE_COUNT = "--xla_force_host_platform_device_count"
NUM_PROCESSES, PROCESS_ID, LOCAL_DEVICES = "JAXCACHE_NUM_PROCESSES", "JAXCACHE_PROCESS_ID", "JAXCACHE_LOCAL_DEVICES"
POLL_S = 0.01
ABORT_S = 2.0  # for the stacks of all threads, which an aborted process prints
LINGER_S = 1.0  # a failed process stays so long, the coordinator's twice: jax aborts the others when that is gone
TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Exit:
    """How one process ended.

    code:      exit code; negative: the signal that ended it
    seconds:   from the start until the end was noticed
    was_ended: by `Processes`, because time was up or another process had failed
    """

    index: int
    code: int
    seconds: float
    was_ended: bool
    stdout: str
    stderr: str


class ProcessesFailed(RuntimeError):
    """Some process failed; the message has the output of those that failed first. exits: of all, by number."""

    def __init__(self, exits: Sequence[Exit]):
        self.exits = list(exits)
        bad = [exit for exit in exits if exit.code]
        shown = [exit for exit in bad if not exit.was_ended] or bad
        codes = ", ".join(f"{exit.index}: {exit.code}{' (ended)' if exit.was_ended else ''}" for exit in exits)
        super().__init__("\n".join([f"exit codes by process: {codes}", *map(_describe, shown)]))


class Processes:
    """N processes of one Python program; a context manager that ends those that still run.

    program:             arguments of the interpreter: ["-m", "module", ...] or ["file.py", ...]; it calls `join`
    devices_per_process: CPU devices each, or GPUs each (process i gets the i-th so many of those visible here)
    env:                 further variables of every process; the rest, such as JAX_COMPILATION_CACHE_DIR, is passed on
    forward:             processes whose output goes to the caller's streams and is not kept
    """

    def __init__(
        self,
        program: Sequence[str],
        num_processes: int,
        devices_per_process: int = 1,
        *,
        platform: str = "cpu",
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        forward: Collection[int] = (),
    ):
        if num_processes < 1 or devices_per_process < 1:
            raise ValueError(f"{num_processes=} and {devices_per_process=} must be at least 1")
        if platform not in PLATFORMS:
            raise ValueError(f"{platform=} must be one of {sorted(PLATFORMS)}")
        self._folder = tempfile.TemporaryDirectory(prefix="jaxcache-processes-")
        self._forward = frozenset(forward)
        self._exits: dict[int, Exit] = {}
        self._children: list[subprocess.Popen[bytes]] = []
        self._ended: set[int] = set()
        self._start = time.monotonic()
        common = {**os.environ, **_fleet_env(num_processes, platform), **(env or {})}
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            for index in range(num_processes):
                own = {**common, **_process_env(index, devices_per_process, platform, common)}
                self._children.append(self._start_one(index, program, own, cwd))
            on_failure.pop_all()

    def _start_one(
        self, index: int, program: Sequence[str], env: Mapping[str, str], cwd: str | os.PathLike[str] | None
    ) -> subprocess.Popen[bytes]:
        command = [sys.executable, *program]
        if index in self._forward:
            return subprocess.Popen(command, stdin=subprocess.PIPE, env=env, cwd=cwd)
        with self._file(index, "stdout").open("wb") as out, self._file(index, "stderr").open("wb") as err:
            return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=err, env=env, cwd=cwd)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def pids(self) -> list[int]:
        """By number."""
        return [child.pid for child in self._children]

    def kill(self, index: int) -> None:
        """SIGKILL."""
        self._children[index].kill()

    def stop(self, index: int) -> None:
        """SIGSTOP: it stays, and does nothing any more."""
        self._children[index].send_signal(signal.SIGSTOP)

    def has_ended(self, index: int) -> bool:
        """By itself or by a signal."""
        self._notice()
        return index in self._exits

    def stdout(self, index: int) -> str:
        """What it has printed so far; empty for one that is forwarded."""
        return self._output(index, "stdout")

    def stderr(self, index: int) -> str:
        """Like `stdout`."""
        return self._output(index, "stderr")

    def wait(self, timeout_s: float, grace_s: float = 10.0) -> list[Exit]:
        """Until all have ended: by themselves, or because time is up, or `grace_s` after the first one that failed."""
        deadline = time.monotonic() + timeout_s
        while len(self._exits) < len(self._children) and time.monotonic() < deadline:
            failed = self._notice()
            if failed:
                deadline = min(deadline, self._start + min(exit.seconds for exit in failed) + grace_s)
            time.sleep(POLL_S)
        self._end()
        return [self._exits[index] for index in range(len(self._children))]

    def check(self, timeout_s: float, grace_s: float = 10.0) -> list[Exit]:
        """`wait`, and raises ProcessesFailed unless every exit code is 0."""
        exits = self.wait(timeout_s, grace_s)
        if any(exit.code for exit in exits):
            raise ProcessesFailed(exits)
        return exits

    def close(self) -> None:
        """Ends what still runs, and removes the files of outputs."""
        self._end()
        self._folder.cleanup()

    def _notice(self) -> list[Exit]:
        """Notes who has ended; returns those that failed so far."""
        for index, child in enumerate(self._children):
            if index not in self._exits and child.poll() is not None:
                assert child.stdin is not None
                child.stdin.close()
                was_ended = index in self._ended
                seconds = time.monotonic() - self._start
                output = self.stdout(index), self.stderr(index)
                self._exits[index] = Exit(index, child.returncode, seconds, was_ended, *output)
        return [exit for exit in self._exits.values() if exit.code]

    def _end(self) -> None:
        """Aborts, then kills what still runs."""
        self._notice()
        for end, patience_s in ((signal.SIGABRT, ABORT_S), (signal.SIGKILL, None)):
            running = [index for index in range(len(self._children)) if index not in self._exits]
            for index in running:
                self._ended.add(index)
                self._children[index].send_signal(end)
            deadline = time.monotonic() + (patience_s or 0)
            while len(self._exits) < len(self._children) and (patience_s is None or time.monotonic() < deadline):
                self._notice()
                time.sleep(POLL_S)

    def _file(self, index: int, stream: str) -> Path:
        return Path(self._folder.name) / f"{index}.{stream}"

    def _output(self, index: int, stream: str) -> str:
        return "" if index in self._forward else self._file(index, stream).read_text(errors="replace")


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    num_devices: int | None = None,
) -> int:
    """Joins the fleet, before any other use of jax. Returns the number of this process.

    In a process that `Processes` started, all is known. Elsewhere the arguments are those of
    `jax.distributed.initialize`, and what is not given jax learns from the cluster's environment (Slurm, Open MPI);
    num_devices: of the whole fleet, see `share_cpu_devices`.
    From now on an uncaught exception, and the end of the process that started this one, ends it: see `leave`.
    """
    import jax

    sys.excepthook = _leave_with
    _keep_stdout()
    if PROCESS_ID not in os.environ:
        jax.distributed.initialize(coordinator, num_processes, process_id)
        if num_devices is not None:
            share_cpu_devices(num_devices, num_processes or _fleet_size())
        return jax.process_index()
    threading.Thread(target=_end_with_caller, daemon=True).start()
    devices = os.environ.get(LOCAL_DEVICES)
    jax.distributed.initialize(
        num_processes=int(os.environ[NUM_PROCESSES]),
        process_id=int(os.environ[PROCESS_ID]),
        local_device_ids=[int(device) for device in devices.split(",")] if devices else None,
        cluster_detection_method="deactivate",
    )
    return jax.process_index()


def share_cpu_devices(num_devices: int, num_processes: int) -> None:
    """This process's share of so many CPU devices, before jax starts; not with GPUs, nor if XLA_FLAGS has a number."""
    flags = os.environ.get("XLA_FLAGS", "")
    if local_platform() == "cpu" and DEVICE_COUNT not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {DEVICE_COUNT}={max(1, num_devices // num_processes)}".strip()


def is_started() -> bool:
    """Whether `Processes` started this process."""
    return PROCESS_ID in os.environ


def leave(code: int) -> NoReturn:
    """Ends this process without jax's farewell, after LINGER_S; the coordinator's last, so that all can report."""
    import jax

    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    time.sleep(LINGER_S * (2 if jax.process_index() == 0 else 1))
    os._exit(code)


def local_platform() -> str:
    """What `Processes` would run on here: "gpu" with GPUs, a jax that knows them and no other choice made, or "cpu"."""
    has_plugin = any(importlib.util.find_spec(f"jax_cuda{major}_plugin") for major in (12, 13))
    wanted = os.environ.get("JAX_PLATFORMS") or "cuda"
    is_allowed = "cuda" in wanted or "gpu" in wanted
    return "gpu" if has_plugin and is_allowed and num_gpus() else "cpu"


def num_gpus() -> int:
    """GPUs of this host, without starting jax."""
    return len(glob.glob("/dev/nvidia[0-9]*"))


def _fleet_size() -> int:
    """What jax has learnt from the cluster; jax.process_count() would start the backend."""
    try:
        from jax._src import distributed

        return distributed.global_state.num_processes
    except (ImportError, AttributeError):
        raise ValueError("The number of processes is not known.") from None


def _keep_stdout() -> None:
    """Standard output is Python's alone: what libraries print there (gloo does) goes to standard error."""
    sys.stdout.flush()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)


def _end_with_caller() -> None:
    while os.read(0, 1):  # the caller writes nothing, so this is the end of its pipe
        pass
    os._exit(1)


def _leave_with(kind: type[BaseException], error: BaseException, trace: object) -> None:
    traceback.print_exception(error)
    leave(1)


def _fleet_env(num_processes: int, platform: str) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        address = f"{LOOPBACK}:{probe.getsockname()[1]}"
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_PLATFORMS": PLATFORMS[platform],
        "PYTHONFAULTHANDLER": "1",
        NUM_PROCESSES: str(num_processes),
    }


def _process_env(index: int, num_devices: int, platform: str, common: Mapping[str, str]) -> dict[str, str]:
    own = {PROCESS_ID: str(index), "PYTHONHASHSEED": str(index + 1)}
    if platform == "gpu":
        return own | {LOCAL_DEVICES: ",".join(str(index * num_devices + i) for i in range(num_devices))}
    flags = re.sub(rf"{DEVICE_COUNT}=\d+", "", common.get("XLA_FLAGS", ""))
    return own | {"XLA_FLAGS": f"{flags} {DEVICE_COUNT}={num_devices}".strip()}


def _describe(exit: Exit) -> str:
    text = f"process {exit.index} ended with {exit.code} after {exit.seconds:.1f} s"
    for name, output in (("stdout", exit.stdout), ("stderr", exit.stderr)):
        if output.strip():
            text += f"\n--- {name} of process {exit.index}\n{output.strip()[-TAIL_CHARACTERS:]}"
    return text
