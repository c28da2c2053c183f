"""What keeping pages costs a loop: one workload without a cache, and with it at 0, 25, 50 and 75 % hits.

    python -m benchmarks overhead [--model tiny|real-ratio] [--mesh 1,1,1] [--requests 32] [--rounds 3] [--hits 0]

Every arm serves the same prompts without a cache and with one (host tier, storage in a temporary folder, defaults) that
has just served their shared beginning; the arms take turns, and which is first changes every round. A figure is the
throughput of prompt and generated tokens, with / without, the median round.

model       KV bytes per FLOP of a token
tiny        2e-3, that of `make demo-trace`: 250 times what real models have, so copies weigh 250 times as much
real-ratio  9e-6, that of Qwen3-8B in bfloat16 (147 KB and 16 GFLOP a token)
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

import jaxcache
from models.decoder import components, init_params, make_extend
from models.families import TINY
from models.families.qwen3 import Qwen3Config
from models.fleet import make_mesh, three_numbers
from models.serve import BatchShape, Request, Server

PAGE_TOKENS = 16
PROMPT_TOKENS, OUTPUT_TOKENS = 384, 16
HITS = (0, 25, 50, 75)  # percent
GOALS = {"tiny": 0.93, "real-ratio": 0.97}  # at zero hits

REAL_RATIO = Qwen3Config(
    vocab_size=512,
    hidden_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=1,
    head_dim=64,
    mlp_size=4096,
    rope_theta=10_000.0,
)
MODELS = {"tiny": (TINY["tiny-moe"], jnp.float32), "real-ratio": (REAL_RATIO, jnp.bfloat16)}


class Workload:
    """One model on one mesh, and requests that share the beginning of their prompts."""

    def __init__(self, model: str, mesh_text: str, num_requests: int, options: dict[str, Any], folder: str):
        """folder: for storage. What is there stays: ext4 takes 300 us to make a file, not 19, where many were removed
        shortly before."""
        self.cfg, self.dtype = MODELS[model]
        self.mesh = make_mesh(three_numbers("--mesh", mesh_text))
        self.params = init_params(self.cfg, self.mesh, seed=0, dtype=self.dtype)
        self.extend = make_extend(self.cfg, self.mesh, PAGE_TOKENS)
        self.num_requests, self.options, self.folder = num_requests, options, folder
        self.shape = BatchShape(table_pages=32)
        self.seeds = itertools.count()

    def prompts(self, share: float) -> list[np.ndarray]:
        """New ones every time, of which the first `share` is the same."""
        rng = np.random.default_rng(next(self.seeds))
        shared = rng.integers(0, self.cfg.vocab_size, int(share * PROMPT_TOKENS))
        own = rng.integers(0, self.cfg.vocab_size, (self.num_requests, PROMPT_TOKENS - len(shared)))
        return [np.concatenate([shared, row]).astype(np.int32) for row in own]

    def tokens_per_s(self, prompts: list[np.ndarray], shared: int, caching: bool, folder: str) -> tuple[float, int]:
        """(tokens per second, tokens of prompts that were found)."""
        config = jaxcache.CacheConfig(
            page_tokens=PAGE_TOKENS,
            device_pages=1024,
            host_pages=1536 if caching else 0,
            max_transfer_pages=128,
            caching=caching,
            **self.options,
        )
        storage = jaxcache.FileStorage(folder) if caching else None
        parts = components(self.cfg, PAGE_TOKENS, jnp.dtype(self.dtype).name)
        with jaxcache.Cache(parts, self.mesh, config, storage=storage) as cache:
            namespace = cache.new_namespace(model="overhead")
            server = Server(cache, self.extend, self.params, namespace, self.shape)
            server.warmup()
            if shared:
                server.submit(Request(prompts[0][: shared + 1], 1))
                list(server.run())
            requests = [Request(prompt, OUTPUT_TOKENS) for prompt in prompts]
            for request in requests:
                server.submit(request)
            start = time.perf_counter()
            list(server.run())
            seconds = time.perf_counter() - start
        found = sum(sum(request.hit_tokens.values()) for request in requests if request.hit_tokens)
        return len(prompts) * (PROMPT_TOKENS + OUTPUT_TOKENS) / seconds, found

    def ratio(self, share: float, cache_first: bool) -> tuple[float, float]:
        """(throughput with / without, share of the prompts' tokens that was found), of one round."""
        prompts, shared = self.prompts(share), int(share * PROMPT_TOKENS)
        rates, found = {}, 0
        for caching in (cache_first, not cache_first):
            folder = tempfile.mkdtemp(dir=self.folder)
            rates[caching], hits = self.tokens_per_s(prompts, shared, caching, folder)
            found += hits
        return rates[True] / rates[False], found / (len(prompts) * PROMPT_TOKENS)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks overhead", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--model", choices=MODELS, default="real-ratio")
    parser.add_argument("--mesh", default="1,1,1", help="cp,tp,pp (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hits", type=int, nargs="+", choices=range(100), default=HITS, metavar="PERCENT")
    parser.add_argument("--write-policy", choices=[p.value for p in jaxcache.WritePolicy], help="default: the cache's")
    parser.add_argument("--json", metavar="FILE", help="write the figures there; - is standard output")
    args = parser.parse_args(argv)
    options = {"write_policy": jaxcache.WritePolicy(args.write_policy)} if args.write_policy else {}
    shares = [percent / 100 for percent in args.hits]
    rounds = {share: [] for share in shares}
    todo = [(share, bool(i % 2)) for i in range(args.rounds) for share in shares]
    with tempfile.TemporaryDirectory() as folder:
        workload = Workload(args.model, args.mesh, args.requests, options, folder)
        for share, cache_first in track(todo, "arms by turns", console=Console(stderr=True)):
            rounds[share].append(workload.ratio(share, cache_first))
    shown, figures = Table("hits", "found", "with / without a cache", "rounds", "goal", "met"), {}
    for share, pairs in rounds.items():
        ratios = sorted(ratio for ratio, _ in pairs)
        goal = GOALS[args.model] if not share else 1.0
        figures[f"hits_{share:.0%}"] = {
            "ratio": statistics.median(ratios),
            "rounds": ratios,
            "found": statistics.median(found for _, found in pairs),
            "goal": goal,
            "met": statistics.median(ratios) >= goal,
        }
        found, said = f"{figures[f'hits_{share:.0%}']['found']:.0%}", " ".join(f"{ratio:.3f}" for ratio in ratios)
        met = "yes" if figures[f"hits_{share:.0%}"]["met"] else "NO"
        shown.add_row(f"{share:.0%}", found, f"{statistics.median(ratios):.3f}", said, f">= {goal}", met)
    Console(stderr=args.json == "-").print(shown)
    if args.json:
        text = json.dumps({"model": args.model, "mesh": args.mesh, "figures": figures}, indent=2) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
    return 0 if all(figure["met"] for figure in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
