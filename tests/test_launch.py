"""The launcher of local processes: what each is given, how ends are noticed, and that nothing is left behind."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from jaxcache.launch import Processes, ProcessesFailed, leave, share_cpu_devices

SLEEP = "import time; time.sleep(60)"
FOREVER_S = 60.0


def code(text: str) -> list[str]:
    return ["-c", text]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_output_and_environment_of_each():
    names = "PYTHONHASHSEED", "JAXCACHE_PROCESS_ID", "JAX_PLATFORMS", "XLA_FLAGS", "EXTRA"
    show = f"import os, sys; print([os.environ[n] for n in {names}]); print('err', file=sys.stderr)"
    with Processes(code(show), 2, 3, env={"EXTRA": "x"}) as processes:
        exits = processes.check(FOREVER_S)
    shown = [eval(exit.stdout) for exit in exits]
    assert [s[:3] for s in shown] == [["1", "0", "cpu"], ["2", "1", "cpu"]]
    assert all(s[3].endswith("device_count=3") and s[3].count("device_count") == 1 and s[4] == "x" for s in shown)
    assert [exit.stderr for exit in exits] == ["err\n", "err\n"]
    assert not any(exit.was_ended for exit in exits)


def test_each_process_gets_its_own_gpus():
    show = "import os; print(os.environ['JAXCACHE_LOCAL_DEVICES'], os.environ['JAX_PLATFORMS'])"
    with Processes(code(show), 2, 2, platform="gpu") as processes:
        assert [exit.stdout for exit in processes.check(FOREVER_S)] == ["0,1 cuda,cpu\n", "2,3 cuda,cpu\n"]


def test_output_larger_than_a_pipe_does_not_block():
    with Processes(code("print('x' * 1_000_000)"), 1) as processes:
        assert len(processes.check(FOREVER_S)[0].stdout) == 1_000_001


def test_a_failure_ends_the_others_and_is_named():
    fail = "import os, time\nif os.environ['JAXCACHE_PROCESS_ID'] == '1': raise KeyError('mine')\ntime.sleep(60)"
    start = time.monotonic()
    with Processes(code(fail), 2) as processes, pytest.raises(ProcessesFailed, match="mine") as failed:
        processes.check(FOREVER_S, grace_s=0.1)
    assert time.monotonic() - start < FOREVER_S / 2
    assert [exit.was_ended for exit in failed.value.exits] == [True, False]
    assert [exit.code for exit in failed.value.exits] == [-signal.SIGABRT, 1]
    assert "process 1 ended with 1" in str(failed.value)
    assert "process 0 ended" not in str(failed.value)


def test_time_up_ends_all_and_shows_where_they_were():
    with Processes(code(f"print('sleeping', flush=True); {SLEEP}"), 2) as processes:
        while not all(processes.stdout(index) for index in range(2)):
            time.sleep(0.01)
        exits = processes.wait(0.1)
    assert all(exit.was_ended and exit.code == -signal.SIGABRT for exit in exits)
    assert all("most recent call first" in exit.stderr for exit in exits)
    assert [exit.stdout for exit in exits] == ["sleeping\n"] * 2


def test_kill_and_stop_one():
    with Processes(code(SLEEP), 3) as processes:
        processes.kill(0)
        processes.stop(1)
        exits = processes.wait(FOREVER_S, grace_s=0.2)
    assert [exit.code for exit in exits] == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGABRT]
    assert [exit.was_ended for exit in exits] == [False, True, True]


def test_nothing_is_left_behind():
    with Processes(code(SLEEP), 2) as processes:
        pids = processes.pids
        assert all(map(is_alive, pids))
    assert not any(map(is_alive, pids))


def test_if_one_cannot_be_started_those_before_are_ended(monkeypatch):
    popen, started = subprocess.Popen, []

    def start(*args, **options):
        if len(started) == 2:
            raise OSError("no more processes")
        started.append(popen(*args, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", start)
    with pytest.raises(OSError, match="no more processes"):
        Processes(code(SLEEP), 3)
    codes = [process.poll() for process in started]
    for process in started:
        process.kill()
    assert codes == [-signal.SIGABRT] * 2


def test_cpu_devices_are_shared_unless_somebody_has_said_how_many(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--other")
    share_cpu_devices(8, 2)
    assert os.environ["XLA_FLAGS"] == "--other --xla_force_host_platform_device_count=4"
    share_cpu_devices(8, 4)
    assert os.environ["XLA_FLAGS"] == "--other --xla_force_host_platform_device_count=4"


def test_with_gpus_no_cpu_devices_are_made(monkeypatch):
    monkeypatch.setattr("jaxcache.launch.local_platform", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    share_cpu_devices(8, 2)
    assert not os.environ["XLA_FLAGS"]


def test_bad_arguments():
    with pytest.raises(ValueError, match="num_processes=0"):
        Processes(code(""), 0)
    with pytest.raises(ValueError, match="platform='tpu'"):
        Processes(code(""), 1, platform="tpu")


def test_a_process_whose_output_nobody_reads_leaves_all_the_same(monkeypatch):
    class Closed(io.StringIO):
        def flush(self):
            raise BrokenPipeError

    ended = []
    monkeypatch.setattr(sys, "stdout", Closed())
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", ended.append)
    leave(7)
    assert ended == [7]


# ---- with jax

JOINED = """
import jax, numpy as np, sys
from jaxcache.launch import join
index = join()
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
mesh = Mesh(np.array(jax.devices()), ("x",))
rows = np.arange(4, dtype=np.int32)
array = jax.make_array_from_callback((4,), NamedSharding(mesh, P("x")), lambda at: rows[at])
total = jax.jit(lambda a: a.sum(), out_shardings=NamedSharding(mesh, P()))(array)
print(index, jax.process_count(), len(jax.local_devices()), int(total))
"""
FAILS = JOINED + "if index == 1: raise RuntimeError('only here')\nimport time; time.sleep(60)"
PARENT = """
import sys
from jaxcache.launch import Processes
processes = Processes(["-c", sys.argv[1]], 2)
print(*processes.pids, flush=True)
"""


@pytest.mark.multiprocess
def test_processes_join_one_fleet():
    with Processes(code(JOINED), 2, 2) as processes:
        exits = processes.check(FOREVER_S)
    assert [exit.stdout for exit in exits] == ["0 2 2 6\n", "1 2 2 6\n"]  # what gloo prints is elsewhere


@pytest.mark.multiprocess
def test_a_process_that_fails_does_not_wait_for_the_others():
    """jax's own farewell would, for minutes."""
    with Processes(code(FAILS), 2, 2) as processes:
        exits = processes.wait(FOREVER_S, grace_s=0.1)
    assert exits[1].code == 1
    assert "only here" in exits[1].stderr
    assert exits[0].was_ended


@pytest.mark.multiprocess
def test_the_fleet_ends_with_whoever_started_it():
    waits = "from jaxcache.launch import join\nimport time\njoin()\ntime.sleep(60)"
    with Processes(["-c", PARENT, waits], 1) as parent:
        while not parent.stdout(0):
            time.sleep(0.01)
        pids = [int(pid) for pid in parent.stdout(0).split()]
        parent.wait(FOREVER_S)
    deadline = time.monotonic() + FOREVER_S / 2
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))
