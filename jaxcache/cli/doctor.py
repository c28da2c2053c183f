"""python -m jaxcache doctor: what this machine offers the cache, one line each.

    ok    mesh     cp2 x tp2 x pp2 on 8 of 8 devices
    FAIL  storage  /mnt/cache: Permission denied
    warn  flax     missing: pip install 'jaxcache[models]'

The exit code is 1 if something that was asked for is missing, else 0; a warning never counts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from jaxcache.command_options import STDOUT, mesh_shape, prepare_json, write_json

HELP = "say what this machine offers the cache, and why something asked for is missing"
MESH_AXES = ("cp", "tp", "pp")
REQUIRED = ("jax", "jaxlib", "numpy", "ml_dtypes", "xxhash")
OPTIONAL = {
    "flax": "models",
    "safetensors": "dev",
    "matplotlib": "cli",
    "rich": "cli",
    "prometheus-client": "metrics",
    "orbax-checkpoint": "models",
}
PINNED_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class Finding:
    """One line. status: "ok", "warn" (works, but less than it could) or "FAIL" (asked for, and missing)."""

    check: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:<5} {self.check:<18} {self.detail}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mesh", type=mesh_option, metavar="cp,tp,pp", help="can this mesh be built?")
    parser.add_argument("--storage", metavar="PATH", help="can the file engine work in this folder?")
    parser.add_argument("--platform", choices=("cpu", "gpu"), help="are there devices of this kind?")
    parser.add_argument(
        "--json", metavar="FILE", help="also write the findings to FILE; - writes them instead of lines"
    )


def mesh_option(text: str) -> tuple[int, int, int]:
    """`mesh_shape`, with its error for the command line."""
    try:
        return mesh_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(args: argparse.Namespace) -> int:
    try:
        prepare_json(args.json)
    except ValueError as error:
        print(f"doctor: {error}", file=sys.stderr)
        return 1
    findings = [*versions(), *device_findings(args.platform, args.mesh)]
    if args.storage is not None:
        findings.append(probe_storage(Path(args.storage).absolute()))
    failed = [finding for finding in findings if finding.status == "FAIL"]
    if args.json != STDOUT:
        print(*findings, sep="\n")
    write_json(args.json, {"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    for finding in failed:
        print(f"doctor: {finding.check}: {finding.detail}", file=sys.stderr)
    return 1 if failed else 0


def versions() -> Iterator[Finding]:
    yield Finding("python", "ok", sys.version.split()[0])
    for package in REQUIRED:
        version = installed(package)
        yield Finding(package, "ok" if version else "FAIL", version or "missing: pip install jaxcache")
    for package, extra in OPTIONAL.items():
        version = installed(package)
        yield Finding(package, "ok" if version else "warn", version or f"missing: pip install 'jaxcache[{extra}]'")


def installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_findings(platform: str | None, shape: tuple[int, int, int] | None) -> Iterator[Finding]:
    try:
        import jax

        devices = jax.devices(platform)
    except (ImportError, RuntimeError) as error:
        yield Finding("devices", "FAIL", first_line(error))
        if shape is not None:
            yield Finding("mesh", "FAIL", "there are no devices to build it from")
        return
    first = devices[0]
    yield Finding("devices", "ok", f"{len(devices)} x {first.device_kind} ({first.platform})")
    yield Finding("processes", "ok", f"{jax.process_count()}")
    yield Finding("memory_kinds", "ok", " ".join(memory.kind for memory in first.addressable_memories()))
    yield probe_pinned(jax.local_devices(backend=first.platform)[0])
    if shape is not None:
        yield probe_mesh(shape, devices)


def probe_mesh(shape: tuple[int, int, int], devices: Sequence[Any]) -> Finding:
    import jax
    import numpy as np

    needed = math.prod(shape)
    name = " x ".join(f"{axis}{num_ranks}" for axis, num_ranks in zip(MESH_AXES, shape, strict=True))
    if needed > len(devices):
        detail = f"{name} needs {needed} devices, there are {len(devices)}"
        if devices[0].platform == "cpu":
            detail += f"; XLA_FLAGS=--xla_force_host_platform_device_count={needed} makes as many"
        return Finding("mesh", "FAIL", detail)
    jax.sharding.Mesh(np.asarray(devices[:needed]).reshape(shape), MESH_AXES)
    return Finding("mesh", "ok", f"{name} on {needed} of {len(devices)} devices")


def probe_pinned(device: Any) -> Finding:
    """Sends a probe value to pinned host memory and back."""
    import jax
    import numpy as np

    on_device, on_host = (
        jax.sharding.SingleDeviceSharding(device, memory_kind=kind) for kind in ("device", "pinned_host")
    )
    sent = np.arange(PROBE_BYTES // 4, dtype=np.int32)
    try:
        pinned = jax.device_put(jax.device_put(sent, on_device), on_host)
        returned = np.asarray(jax.device_put(pinned, on_device))
    except (RuntimeError, ValueError) as error:
        return Finding("pinned_host", "warn", f"unusable: {first_line(error)}")
    if not np.array_equal(sent, returned):
        return Finding("pinned_host", "FAIL", "a probe value came back changed")
    limit = os.environ.get(PINNED_LIMIT, "unset: 64")
    return Finding("pinned_host", "ok", "works" + (f"; {PINNED_LIMIT}={limit}" if device.platform == "gpu" else ""))


def probe_storage(path: Path) -> Finding:
    """Opens the storage in `path`, if there is one, as serving would; then tries out the disk.

    Leaves nothing new behind. Killed, it leaves a folder .doctor-... in `path`, or where `path` would be made.
    """
    from jaxcache.storage.base import StorageError
    from jaxcache.storage.folder import PROBE_PREFIX, STILL_READABLE

    only_readable = "what is stored can be read, but nothing can be written"
    place = next(folder for folder in (path, *path.parents) if os.path.lexists(folder))
    is_readable = False
    try:
        if place == path:
            is_readable = open_storage(path)
        with tempfile.TemporaryDirectory(prefix=PROBE_PREFIX, dir=place) as directory:
            broken, milliseconds = try_out(directory)
    except OSError as error:
        cause = error.__cause__ if isinstance(error, StorageError) else error
        if is_readable and isinstance(cause, OSError) and cause.errno in STILL_READABLE:
            return Finding("storage", "warn", f"{path}: {only_readable}: {cause.strerror}")
        reason = error.strerror or first_line(error)
        if place != path:
            reason = f"does not exist, and cannot be made in {place}: {reason}"
        return Finding("storage", "FAIL", f"{path}: {reason}")
    if is_readable and "write" in broken:
        return Finding("storage", "warn", f"{path}: {only_readable}: a probe value of {PROBE_BYTES >> 20} MiB failed")
    if broken:
        return Finding("storage", "FAIL", f"{path}: in {place} a probe value failed to {', '.join(broken)}")
    works = f"write, read, link; {PROBE_BYTES >> 20} MiB both ways {milliseconds:.1f} ms"
    if place != path:
        detail = f"does not exist yet; serving would make it in {place}, which works ({works}). If it should exist, "
        return Finding("storage", "warn", f"{path}: {detail}check its name and the mount")
    return Finding("storage", "ok", f"{path}: {works}")


def open_storage(path: Path) -> bool:
    """Whether there is a storage. OSError if there is one that cannot be opened, or if none may be made there."""
    from jaxcache.storage.file import FileStorage
    from jaxcache.storage.folder import check_owner, is_claimed

    check_owner(str(path), path.stat())
    if not is_claimed(str(path)):
        return False
    FileStorage(path).close()
    return True


def try_out(directory: str) -> tuple[list[str], float]:
    """Puts, reads and puts again a probe value; what failed, and how long the first put and its reading took, in ms."""
    from jaxcache.storage.base import ObjectKey
    from jaxcache.storage.file import FileStorage

    key = ObjectKey(page_key=bytes(32), component="doctor", cell="probe")
    value, other, buffer = os.urandom(PROBE_BYTES), os.urandom(PROBE_BYTES), bytearray(PROBE_BYTES)
    storage = FileStorage(directory)
    start = time.perf_counter()
    written = storage.put(key, memoryview(value))
    read = storage.get(key, memoryview(buffer)) and buffer == value
    milliseconds = (time.perf_counter() - start) * 1e3
    storage.put(key, memoryview(other))
    kept = storage.get(key, memoryview(buffer)) and buffer == value
    storage.close()
    return [name for name, good in (("write", written), ("read", read), ("link", kept)) if not good], milliseconds


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
