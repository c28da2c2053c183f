"""Serves a trace three times and compares: without a cache, with it, and again after a restart on the same storage.

Every generated token must be the same. Prints a table and writes the figures as JSON.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import jaxcache
from jaxcache.command_options import prepare_json, write_json
from jaxcache.replay.traces import read_trace
from models import fleet
from models.command import ERRORS, show_error
from models.decoder import components, init_params, make_extend
from models.families import TINY
from models.fleet import make_mesh, three_numbers
from models.layer_plan import STATE, LayerPlan
from models.loading import load_model, weights_version
from models.serve import TIERS, WAIT_S, BatchShape, Request, Server, hits_by_tier

TRACE = Path(__file__).parents[1] / "benchmarks" / "traces" / "conversation.jsonl.gz"
BLOCK_TOKENS = 16  # a 512-token block of the trace becomes so many
SHRINK = 16  # of output lengths
SERVED_SHARE = 0.75

SLOT_SHARE = 8  # pages to a slot for a recurrent state


@dataclass
class Run:
    """One pass over the requests."""

    requests: list[Request]
    seconds: float
    stats: dict[str, Any]
    compiles: int

    @property
    def outputs(self) -> list[list[int]]:
        return [request.output for request in self.requests]

    def hit_tokens(self) -> dict[str, int]:
        return hits_by_tier(self.requests)

    def cached_share(self, i: int) -> float:
        hits = self.requests[i].hit_tokens
        return sum(hits.values()) / len(self.requests[i].prompt) if hits else 0.0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m models.serve", description=__doc__)
    plain = parser.add_argument

    def add(option: str, default: Any, help: str, **how: Any) -> None:
        plain(option, default=default, help=f"{help} (default: %(default)s)", **how)

    tiny = f"{', '.join(TINY)} (random fp32 weights of a fixed seed)"
    add("--model", "tiny-moe", f"one of {tiny}, a Hugging Face folder, or a file *.gguf")
    add("--trace", TRACE, "requests in the Mooncake schema, JSONL, gzipped or not", type=Path)
    add("--requests", 500, "how many requests of the trace", type=int)
    plain(
        "--arrivals",
        metavar="SPEED",
        type=float,
        help="requests come when the trace says, at so many times its speed, and times to first token count from there "
        "(default: all come at once, and times count from the start of service)",
    )
    add("--mesh", "2,2,2", "cp,tp,pp")
    add("--processes", 1, "start so many on this host, each with its part of the mesh", type=int)
    plain("--coordinator", help="HOST:PORT of process 0 of a fleet started elsewhere, or auto (Slurm, Open MPI)")
    plain("--num-processes", type=int, help="of that fleet")
    plain("--process-id", type=int, help="of this process in that fleet")
    add("--page-tokens", 16, "tokens per page", type=int)
    add("--device-pages", 1024, "pages of the device tier", type=int)
    add("--host-pages", 1536, "pages of the host tier", type=int)
    plain(
        "--storage",
        type=Path,
        help="folder of the storage tier, shared by all (default: a temporary one); with --coordinator it is required, "
        "unless --no-cache is given",
    )
    plain("--storage-grid", help="cp,tp,pp of the values in storage; meshes with one grid share it (default: the mesh)")
    add("--write-policy", "write_through", "see CacheConfig", choices=[p.value for p in jaxcache.WritePolicy])
    prefetch = ["off", *(p.value for p in jaxcache.PrefetchPolicy)]
    add("--prefetch", "wait_complete", "from storage", choices=prefetch)
    plain("--no-cache", action="store_true", help="serve only once, without a cache")
    plain("--json", metavar="FILE", help="write the figures there; - is standard output")
    return parser


def main(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    try:
        prepare_json(args.json)
        shape = three_numbers("--mesh", args.mesh)
        fleet.check_options(args.processes, args.coordinator, args.num_processes, args.process_id)
        check_arrivals(args)
        if args.processes != 1:
            return fleet.start(argv, args.processes, math.prod(shape), args.storage)
        is_first = fleet.join(args.coordinator, args.num_processes, args.process_id, math.prod(shape)) == 0
        console = Console(stderr=args.json == "-", quiet=not is_first)
        demo = Demo(args, make_mesh(shape), console)
        figures = demo.without_cache() if args.no_cache else demo.compare()
    except (*ERRORS, fleet.ProcessesFailed) as error:
        show_error(error)
        return fleet.failed()
    if is_first:
        write_json(args.json, figures)
    is_same = figures.get("tokens_identical", True) and figures.get("restart", {}).get("tokens_identical", True)
    return 0 if is_same else 1


def check_arrivals(args: argparse.Namespace) -> None:
    if args.arrivals is None:
        return
    if not 0 < args.arrivals < math.inf:
        raise ValueError(f"--arrivals must be a positive number, not {args.arrivals}")
    if args.processes != 1 or args.coordinator is not None:
        raise ValueError("--arrivals goes by the clock of one process: several would not admit in one order")


class Demo:
    """One model on one mesh, and the requests of the trace."""

    def __init__(self, args: argparse.Namespace, mesh: jax.sharding.Mesh, console: Console):
        self.args, self.mesh, self.console = args, mesh, console
        if args.model in TINY:
            self.cfg = TINY[args.model]
            self.params, self.weights_version = init_params(self.cfg, mesh, seed=0, dtype=jnp.float32), "seed 0"
        else:
            self.cfg, self.params = load_model(Path(args.model), mesh, jnp.float32)
            self.weights_version = weights_version(Path(args.model))
        self.extend = make_extend(self.cfg, mesh, args.page_tokens)
        if args.requests < 1:
            raise ValueError(f"--requests must be at least 1, not {args.requests}")
        self.trace = read_trace(args.trace, args.requests)
        if args.arrivals is not None and any(line.timestamp_ms is None for line in self.trace):
            raise ValueError(f"--arrivals: not every request of {args.trace} has a timestamp in milliseconds")
        longest = max(len(r.prompt) + r.max_new_tokens for r in self.requests())
        self.shape = BatchShape(table_pages=1 << (longest // args.page_tokens).bit_length())

    def requests(self) -> list[Request]:
        return [
            Request(line.prompt(BLOCK_TOKENS, self.cfg.vocab_size), max(1, line.output_length // SHRINK))
            for line in self.trace
        ]

    def config(self, caching: bool) -> jaxcache.CacheConfig:
        args = self.args
        prefetch = jaxcache.PrefetchPolicy("best_effort" if args.prefetch == "off" else args.prefetch)
        return jaxcache.CacheConfig(
            page_tokens=args.page_tokens,
            device_pages=self._pages(args.device_pages),
            host_pages=self._pages(args.host_pages) if caching else 0,
            write_policy=jaxcache.WritePolicy(args.write_policy),
            prefetch_policy=prefetch,
            storage_grid=three_numbers("--storage-grid", args.storage_grid) if args.storage_grid else None,
            prefetch_min_tokens=2**30 if args.prefetch == "off" else 2 * args.page_tokens,
            max_transfer_pages=128,
            caching=caching,
        )

    def _pages(self, num_pages: int) -> dict[str, int]:
        slots = max(1, num_pages // SLOT_SHARE)
        return {name: slots if name == STATE else num_pages for name in LayerPlan(self.cfg).kept}

    def serve(self, title: str, caching: bool, storage: jaxcache.Storage | None, requests: list[Request]) -> Run:
        """One pass: a new cache, everything compiled before, then all requests."""
        parts = components(self.cfg, self.args.page_tokens, "float32")
        with jaxcache.Cache(parts, self.mesh, self.config(caching), storage=storage) as cache:
            namespace = cache.new_namespace(model=self.args.model, weights_version=self.weights_version)
            server = Server(cache, self.extend, self.params, namespace, self.shape)
            server.warmup()
            compiled = jaxcache.compile_count()
            start = time.perf_counter()
            self._watch(title, server, requests)
            seconds = time.perf_counter() - start
            compiles = jaxcache.compile_count() - compiled
            if storage is not None:
                server.pools = cache.drain(server.pools)
            return Run(requests, seconds, cache.stats(), compiles)

    def _served(self, server: Server, requests: list[Request]) -> Iterator[Request]:
        """All of them, as they finish."""
        if self.args.arrivals is None:
            for request in requests:
                server.submit(request)
            yield from server.run()
            return
        stamps_ms = np.array([line.timestamp_ms for line in self.trace], float)
        arrivals_s = time.perf_counter() + (stamps_ms - stamps_ms.min()) / 1000 / self.args.arrivals
        coming = deque(sorted(zip(arrivals_s.tolist(), requests, strict=True), key=itemgetter(0)))
        while coming or server.waiting or server.running:
            while coming and coming[0][0] <= time.perf_counter():
                arrival_s, request = coming.popleft()
                request.arrival_s = arrival_s
                server.submit(request)
            yield from server.step()
            if not server.running:
                time.sleep(WAIT_S)

    def _watch(self, title: str, server: Server, requests: list[Request]) -> None:
        columns = (TextColumn("{task.description:22}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=len(requests))
            for _ in self._served(server, requests):
                progress.advance(task)

    def without_cache(self) -> dict[str, Any]:
        run = self.serve("without a cache", False, None, self.requests())
        return {"requests": len(run.requests), "ttft_ms": percentiles(run.requests), **throughput(run)}

    def compare(self) -> dict[str, Any]:
        if self.args.storage is None and jax.process_count() > 1:
            raise ValueError("--storage must name a folder that all processes share")
        folder = self.args.storage or Path(tempfile.mkdtemp(prefix="jaxcache-demo-"))
        try:
            storage = jaxcache.FileStorage(folder)  # refuses what it cannot use before anybody waits
            uncached = self.serve("without a cache", False, None, self.requests())
            cached = self.serve("with the cache", True, storage, self.requests())
            again = self.serve("after a restart", True, jaxcache.FileStorage(folder), self.requests())
        finally:
            if self.args.storage is None:
                shutil.rmtree(folder)
        figures = compare_runs(uncached, cached, again)
        self.console.print(report(figures, uncached, cached))
        if self.args.arrivals is not None:
            self.console.print("Tokens per second count the waiting for requests, too.")
        return figures


def compare_runs(uncached: Run, cached: Run, again: Run) -> dict[str, Any]:
    served = [i for i in range(len(cached.requests)) if cached.cached_share(i) >= SERVED_SHARE]
    hits = cached.hit_tokens()
    prompt_tokens = sum(len(request.prompt) for request in cached.requests)
    return {
        "requests": len(cached.requests),
        "prompt_tokens": prompt_tokens,
        "hit_tokens": hits,
        "computed_tokens": prompt_tokens - sum(hits.values()),
        "ttft_ms": percentiles(cached.requests),
        "ttft_ms_uncached": percentiles(uncached.requests),
        "ttft_ms_hit75": p50_of(cached, served),
        "ttft_ms_hit75_uncached": p50_of(uncached, served),
        **throughput(cached),
        "tokens_per_s_uncached": throughput(uncached)["tokens_per_s"],
        "tokens_identical": cached.outputs == uncached.outputs,
        "distinct_tokens": len({token for output in cached.outputs for token in output}),
        "retractions": sum(request.num_retractions for request in cached.requests),
        "drops": {name: n for name, n in cached.stats["counters"].items() if name.startswith(DROPS)},
        "restart": {
            "hit_tokens": again.hit_tokens(),
            "tokens_identical": again.outputs == uncached.outputs,
            **throughput(again),
        },
        "compiles_after_warmup": uncached.compiles + cached.compiles + again.compiles,
    }


DROPS = ("dropped", "skipped", "unfulfilled", "failed")


def percentiles(requests: list[Request]) -> dict[str, float]:
    times = [request.ttft_ms for request in requests]
    return {"p50": round(float(np.percentile(times, 50)), 2), "p99": round(float(np.percentile(times, 99)), 2)}


def p50_of(run: Run, indices: list[int]) -> dict[str, Any]:
    times = [run.requests[i].ttft_ms for i in indices]
    return {"requests": len(times), "p50": round(float(np.median(times)), 2) if times else None}


def throughput(run: Run) -> dict[str, float]:
    tokens = sum(len(r.prompt) + len(r.output) for r in run.requests)
    return {"tokens_per_s": round(tokens / run.seconds, 1)}


def report(figures: dict[str, Any], uncached: Run, cached: Run) -> Table:
    """The table that people look at."""
    table = Table(
        title=f"{figures['requests']} requests, {figures['prompt_tokens']:,} prompt tokens", show_header=False
    )
    row: Callable[[str, str], None] = table.add_row
    for tier in TIERS:
        row(f"prompt tokens from {tier}", f"{figures['hit_tokens'][tier]:,}")
    row("prompt tokens computed", f"{figures['computed_tokens']:,}")
    for low, high in ((0.0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1.01)):
        chosen = [i for i in range(len(cached.requests)) if low <= cached.cached_share(i) < high]
        with_cache, without = p50_of(cached, chosen)["p50"], p50_of(uncached, chosen)["p50"]
        row(
            f"time to first token, {low:.0%} to {min(high, 1):.0%} cached",
            f"{with_cache} ms with, {without} ms without ({len(chosen)} requests)",
        )
    row("tokens per second", f"{figures['tokens_per_s']:,} with, {figures['tokens_per_s_uncached']:,} without")
    row("dropped", ", ".join(f"{name} {n}" for name, n in figures["drops"].items() if n) or "nothing")
    row("every token as without a cache", "yes" if figures["tokens_identical"] else "NO")
    restart = figures["restart"]
    row("after a restart, prompt tokens from storage", f"{restart['hit_tokens']['storage']:,}")
    row("after a restart, tokens per second", f"{restart['tokens_per_s']:,}")
    row("after a restart, every token the same", "yes" if restart["tokens_identical"] else "NO")
    row("programs compiled while serving", str(figures["compiles_after_warmup"]))
    return table
