"""Starts fleets of test processes and gathers what they say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxcache.launch import Processes
from tests.multiprocess.rank import Job

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 280.0


def run(platform: str, job: Job, num_processes: int) -> list[list[dict[str, Any]]]:
    """The results of every process, part by part. Skips the test where the host has too few GPUs."""
    num_devices = job.shape[0] * job.shape[1] * job.shape[2] // num_processes
    if platform == "gpu":
        import jax

        if num_processes * num_devices > len(jax.devices()):
            pytest.skip(f"{num_processes} processes of {num_devices} GPUs each; this host has {len(jax.devices())}")
    program = ["-m", "tests.multiprocess.rank", job.to_json()]
    with Processes(program, num_processes, num_devices, platform=platform, cwd=ROOT) as processes:
        return [json.loads(exit.stdout) for exit in processes.check(TIMEOUT_S)]


def agreed(results: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What every process says, if all say the same: tokens, hits and digests."""
    for part in zip(*results, strict=True):
        compared = [{name: value for name, value in result.items() if name != "corrupt"} for result in part]
        assert all(result == compared[0] for result in compared), compared
    return results[0]
