"""The processes that `python -m models.serve` runs in: started here for a try-out, or by a cluster.

--processes N      starts N of the same command on this host; the first one's output is shown
--coordinator ...  this is one process of a fleet that somebody else starts; `jax.distributed` connects them
neither            one process
"""

from __future__ import annotations

import math
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax

from jaxcache import launch
from jaxcache.command_options import mesh_shape
from jaxcache.launch import ProcessesFailed

__all__ = ["ProcessesFailed", "check_options", "failed", "join", "make_mesh", "start", "three_numbers"]


def start(argv: Sequence[str], num_processes: int, mesh_size: int, storage: Path | None) -> int:
    """Serves over local processes until all have ended; ProcessesFailed, naming whom, if not all ended well."""
    if num_processes < 1 or mesh_size % num_processes:
        raise ValueError(f"--processes {num_processes} must divide the {mesh_size} devices of --mesh")
    platform = launch.local_platform()
    if platform == "gpu" and launch.num_gpus() < mesh_size:
        raise ValueError(
            f"--mesh needs {mesh_size} GPUs, this host has {launch.num_gpus()}; JAX_PLATFORMS=cpu tries it"
        )
    with tempfile.TemporaryDirectory(prefix="jaxcache-demo-") as folder:
        own = ["--processes", "1", "--storage", str(storage or folder)]  # of equal options the last one counts
        fleet = launch.Processes(
            ["-m", "models.serve", *argv, *own],
            num_processes,
            mesh_size // num_processes,
            platform=platform,
            forward=(0,),
        )
        with fleet:
            fleet.check(math.inf)
    return 0


def check_options(processes: int, coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Refuses what would be ignored, and what is no address."""
    if coordinator is not None:
        if processes != 1:
            raise ValueError("--processes starts a fleet on this host, --coordinator joins one: use one of them")
        host, _, port = coordinator.rpartition(":")
        if coordinator != "auto" and not (host and port.isdecimal() and 0 < int(port) < 65536):
            raise ValueError(f"--coordinator must be HOST:PORT or auto, not {coordinator!r}")
    if coordinator is None and (num_processes is not None or process_id is not None):
        raise ValueError("--num-processes and --process-id need --coordinator; --processes starts a fleet on this host")


def join(coordinator: str | None, num_processes: int | None, process_id: int | None, mesh_size: int) -> int:
    """Becomes a part of the fleet, if there is one. Returns the number of this process."""
    if launch.is_started():
        return launch.join()
    if coordinator is None:
        launch.share_cpu_devices(mesh_size, 1)
        return 0
    address = None if coordinator == "auto" else coordinator
    if address is not None and process_id == 0:
        _check_port(os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or address.rpartition(":")[2])
    options = {"--coordinator HOST:PORT": address, "--num-processes": num_processes, "--process-id": process_id}
    try:
        return launch.join(address, num_processes, process_id, mesh_size)
    except ValueError as error:
        missing = ", ".join(option for option, value in options.items() if value is None)
        if not missing:
            raise
        raise ValueError(f"{error} What the cluster does not tell must be set: {missing}") from error


def _check_port(address: str) -> None:
    """OSError if process 0 cannot listen at [HOST:]PORT: jax would crash."""
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), int(port)))
        except OSError as error:
            raise OSError(f"--coordinator: process 0 cannot listen on port {port}: {error.strerror}") from error


def failed() -> int:
    """The exit code; a process of a fleet ends here, at once, because the others wait for it."""
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        launch.leave(1)
    return 1


def three_numbers(option: str, text: str) -> tuple[int, int, int]:
    """What an option says; ValueError names it."""
    try:
        return mesh_shape(text)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from None


def make_mesh(shape: tuple[int, ...]) -> jax.sharding.Mesh:
    """A mesh (cp, tp, pp) of the devices of all processes."""
    num_devices = math.prod(shape)
    if len(jax.devices()) < num_devices:
        raise ValueError(f"--mesh {shape} needs {num_devices} devices, there are {len(jax.devices())}")
    devices = jax.devices()[:num_devices]
    if idle := set(range(jax.process_count())) - {device.process_index for device in devices}:
        raise ValueError(f"--mesh {shape} leaves processes {sorted(idle)} without a device")
    axis_types = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh(shape, ("cp", "tp", "pp"), axis_types=axis_types, devices=devices)
