"""The reference serving loop: continuous batching, chunked prefill, prefetch, decode, retraction. Meant to be copied.

    waiting --prefetch--> waiting --admit--> running: prefill chunk by chunk --> decode token by token --> finished
                                      ^                      |
                                      +------ retracted -----+   when there is no room to go on

    one iteration:  step -> admit -> apply -> decode -> step -> apply -> prefill       insert and release as they come

`python -m models.serve` runs it on a trace, with and without the cache (see models/trace_demo.py).
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import jax
import numpy as np

import jaxcache
from models.paged_attention import ExtendBatch

WAIT_S = 0.0005
TIERS = ("device", "host", "storage")
Extend = Callable[[Any, Any, ExtendBatch], tuple[jax.Array, Any]]


@dataclass(frozen=True)
class BatchShape:
    """The shapes of the step programs; each is compiled once.

    prefill_rows x chunk_tokens and decode_rows x 1 tokens; `table_pages` bounds a request's length
    """

    prefill_rows: int = 4
    chunk_tokens: int = 64
    decode_rows: int = 16
    table_pages: int = 256


@dataclass(eq=False)
class Request:
    """tokens: prompt, then what was generated, up to max_new_tokens or the first of `stop_tokens`.

    temperature: 0: greedy; else sampled, reproducibly from `seed`
    arrival_s:   when it came, on the clock of time.perf_counter, if that is to count
    kept_at:     where the last recurrent state is that a slot of its lease keeps
    """

    prompt: np.ndarray
    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0
    stop_tokens: frozenset[int] = frozenset()
    arrival_s: float | None = None
    output: list[int] = field(default_factory=list)
    num_computed: int = 0
    kept_at: int = 0
    hit_tokens: dict[str, int] | None = None  # by tier, at the first admission
    service_start_s: float = 0.0
    first_token_s: float = 0.0
    num_retractions: int = 0
    sequence: jaxcache.Sequence | None = None
    ticket: jaxcache.Ticket | None = None
    lease: jaxcache.Lease | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def is_finished(self) -> bool:
        is_stopped = bool(self.output) and self.output[-1] in self.stop_tokens
        return is_stopped or len(self.output) >= self.max_new_tokens

    @property
    def is_prefilling(self) -> bool:
        return not self.output or self.num_tokens - self.num_computed > 1

    @property
    def ttft_ms(self) -> float:
        """Time to first token from its arrival, if that counts, else from the start of service, without queueing."""
        start_s = self.service_start_s if self.arrival_s is None else self.arrival_s
        return (self.first_token_s - start_s) * 1000


class Server:
    """Serves requests first come, first served.

    extend(params, pools, batch) -> (logits, pools): donates the pools
    namespace: names model and weights; other weights must never get its pages, so name their version too
    """

    def __init__(
        self,
        cache: jaxcache.Cache,
        extend: Extend,
        params: Any,
        namespace: jaxcache.Namespace,
        shape: BatchShape | None = None,
    ):
        self.cache = cache
        self.extend = extend
        self.params = params
        self.shape = shape or BatchShape()
        self.namespace = namespace
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.pools = cache.init_pools()

    def warmup(self) -> None:
        """Compiles everything that serving will run."""
        self.pools = self.cache.warmup(self.cache.step(self.pools))
        self._run_model([None] * self.shape.prefill_rows, self.shape.chunk_tokens)
        self._run_model([None] * self.shape.decode_rows, 1)

    def submit(self, request: Request) -> None:
        longest = self.shape.table_pages * self.cache.config.page_tokens
        if len(request.prompt) + request.max_new_tokens > longest:
            raise ValueError(f"{len(request.prompt)} + {request.max_new_tokens} tokens exceed a table's {longest}")
        self.waiting.append(request)

    def run(self) -> Iterator[Request]:
        """Serves until nobody is left; yields requests as they finish."""
        while self.waiting or self.running:
            yield from self.step()
            if not self.running:
                time.sleep(WAIT_S)  # everybody waits for storage: leave the processor to its threads

    def stream(self, request: Request, keep_going: Callable[[], bool] = lambda: True) -> Iterator[int]:
        """Submits a request and serves until it is finished; yields its tokens as they come.

        keep_going: asked between steps; False: everything that is being served is abandoned
        """
        self.submit(request)
        num_seen = 0
        while num_seen < len(request.output) or not request.is_finished:
            if not keep_going():
                self.abandon()
                return
            if num_seen < len(request.output):
                yield request.output[num_seen]
                num_seen += 1
            else:
                self.step()
                if not self.running and not request.is_finished:
                    time.sleep(WAIT_S)

    def abandon(self) -> None:
        """Nobody wants what is being served any more; what was computed of it can be found."""
        for request in [*self.running, *self.waiting]:
            if request.lease is not None:
                self._publish(request)
                self.cache.release(request.lease)
                request.lease = None
            if request.ticket is not None:
                self.cache.cancel(request.ticket)
                request.ticket = None
        self.running.clear()
        self.waiting.clear()

    def step(self) -> list[Request]:
        """One iteration: decode, then prefill, each a step of the cache. Returns the requests that finished in it.

        What an admission loads back comes in while the others decode, so that it can be prefilled right after.
        """
        self.pools = self.cache.step(self.pools)
        self._admit()
        self.pools = self.cache.apply(self.pools)
        decoding = [request for request in self.running if not request.is_prefilling]
        self._extend(self._grow_by_token(decoding), self.shape.decode_rows, 1)
        finished = self._finish()
        self.pools = self.cache.apply(self.cache.step(self.pools))
        prefilling = [request for request in self.running if request.is_prefilling]
        self._extend(self._grow_by_chunk(prefilling), self.shape.prefill_rows, self.shape.chunk_tokens)
        return finished + self._finish()

    # ---- admission

    def _admit(self) -> None:
        """Prefetches for those who will be served soon, and admits while there are rows and room.

        Nobody is admitted before there is a row to prefill it: its pages would be held for nothing.
        """
        for request in islice(self.waiting, self.shape.decode_rows):
            if request.sequence is None:
                request.sequence = self.cache.sequence(request.prompt, self.namespace)
                request.ticket = self.cache.prefetch(request.sequence)
        free = self.shape.prefill_rows - sum(request.is_prefilling for request in self.running)
        free = min(free, self.shape.decode_rows - len(self.running))
        while self.waiting and free and self._admit_one(self.waiting[0]):
            self.running.append(self.waiting.popleft())
            free -= 1

    def _admit_one(self, request: Request) -> bool:
        """Service starts now, or, if only the prefetch is awaited, with the first attempt: that is no queueing."""
        assert request.sequence is not None
        start_s = request.service_start_s or time.perf_counter()
        found = self.cache.match(request.sequence).num_tokens
        chunk = min(self.shape.chunk_tokens, request.num_tokens - found)
        lease = self.cache.admit(request.sequence, chunk, ticket=request.ticket)
        if isinstance(lease, jaxcache.Wait):
            if lease.reason == "prefetch":
                request.service_start_s = start_s
            if not self.running and lease.reason in ("no room", "floors") and self.cache.idle:
                raise self._does_not_fit(request)
            return False
        request.lease, request.ticket = lease, None
        request.num_computed = lease.num_cached_tokens
        request.service_start_s = start_s
        if request.hit_tokens is None:
            tiers = {"device": lease.device_tokens, "host": lease.host_tokens, "storage": lease.storage_tokens}
            request.hit_tokens = tiers
        return True

    def _does_not_fit(self, request: Request) -> MemoryError:
        pages = f"{self.cache.device_pages} pages of {self.cache.config.page_tokens} tokens"
        floors = ", less the floors of other tenants" if self.cache.config.tenants else ""
        return MemoryError(f"a request of {request.num_tokens} tokens does not fit the device tier: {pages}{floors}")

    # ---- model steps

    def _extend(self, spans: list[tuple[Request, int]], num_rows: int, num_columns: int) -> None:
        """One model step for these requests, each up to its end: run, sample, publish."""
        if not spans:
            return
        self.pools = self.cache.apply(self.pools)
        rows = [*spans, *[None] * (num_rows - len(spans))]
        logits = self._run_model(rows, num_columns)
        complete = [row for row, (request, end) in enumerate(spans) if end == request.num_tokens]
        self._append_tokens([spans[row][0] for row in complete], logits[complete, 0])
        for row, (request, end) in enumerate(spans):
            request.num_computed = end
            is_prompt_computed = end >= len(request.prompt) and len(request.output) == 1
            assert request.lease is not None
            if end in request.lease.checkpoints:
                request.kept_at = end
            if is_prompt_computed or (end == request.lease.next_stop and row not in complete):  # a stop of a prefill
                self._publish(request)

    def _publish(self, request: Request) -> None:
        """What is computed, and the state that is kept: while decoding, that of the last whole page."""
        assert request.lease is not None
        states = [request.kept_at] if request.kept_at in request.lease.checkpoints else []
        self.cache.insert(request.lease, request.num_computed, states=states)

    def _loaded(self, batch: list[Request]) -> list[Request]:
        """Those whose pages are on the device."""
        step = self.cache.step_number
        return [request for request in batch if request.lease is not None and request.lease.first_step <= step]

    def _grow_by_token(self, batch: list[Request]) -> list[tuple[Request, int]]:
        """Room for one more token of each; while there is none for all, the youngest request is retracted."""
        batch = self._loaded(batch)
        while batch:
            leases = [request.lease for request in batch if request.lease is not None]
            computed = [request.num_computed for request in batch]
            if self._has_room(functools.partial(self.cache.grow_all, leases, computed), len(batch)):
                break
            self._retract(self.running[-1])
            batch = [request for request in batch if request.lease is not None]
        return [(request, request.num_tokens) for request in batch]

    def _grow_by_chunk(self, batch: list[Request]) -> list[tuple[Request, int]]:
        """Room for the next chunk of each that can have it, and where it ends."""
        spans = []
        for request in self._loaded(batch):
            if request.lease is not None:  # making room for another may have retracted it
                end = self._chunk_end(request)
                if self._make_room(request, end):
                    spans.append((request, end))
        return [(request, end) for request, end in spans if request.lease is not None]

    def _chunk_end(self, request: Request) -> int:
        assert request.lease is not None
        end = min(request.num_computed + self.shape.chunk_tokens, request.num_tokens)
        stop = request.lease.next_stop
        return end if stop is None else min(end, stop)

    def _make_room(self, request: Request, end: int) -> bool:
        """Room up to `end`; if there is none the youngest request is retracted, which may be this one."""
        assert request.lease is not None
        grow = functools.partial(self.cache.grow, request.lease, request.num_computed, end - request.num_computed)
        while not self._has_room(grow, True):
            youngest = self.running[-1]
            self._retract(youngest)
            if youngest is request:
                return False
        return True

    def _has_room(self, grow: Callable[[], int], wanted: int) -> bool:
        """Whether `grow` gives what is wanted; asked twice, since pages that only earlier tables name are held for the
        loop until it has asked for new ones."""
        if grow() == wanted:
            return True
        self.pools = self.cache.apply(self.pools)
        leases = [request.lease for request in self._loaded(self.running)]
        padding = [None] * (self.shape.decode_rows - len(leases))
        self.cache.tables([*leases, *padding], self.shape.table_pages)
        return grow() == wanted

    def _retract(self, request: Request) -> None:
        """Gives everything back; what was published may still be found when it is admitted again.

        Raises MemoryError if neither another request nor a transfer in flight holds the room that is missing.
        """
        assert request.lease is not None
        self._publish(request)
        self.cache.release(request.lease)
        request.lease = None
        request.num_retractions += 1
        self.running.remove(request)
        self.waiting.appendleft(request)
        if not self.running and self.cache.idle:
            raise self._does_not_fit(request)

    def _run_model(self, rows: list[tuple[Request, int] | None], num_columns: int) -> np.ndarray:
        """Runs one program: row b computes tokens num_computed .. end of its request. Returns f32[B, 1, vocab]."""
        num_rows = len(rows)
        tokens = np.zeros((num_rows, num_columns), np.int32)
        starts, num_new = np.zeros(num_rows, np.int32), np.zeros(num_rows, np.int32)
        for b, row in enumerate(rows):
            if row is not None:
                request, end = row
                starts[b], num_new[b] = request.num_computed, end - request.num_computed
                tokens[b, : num_new[b]] = _tokens(request, request.num_computed, end)
        leases = [None if row is None else row[0].lease for row in rows]
        tables = self.cache.tables(leases, self.shape.table_pages)
        slots = self.cache.state_slots(leases, [0 if row is None else row[1] for row in rows])
        last = np.maximum(num_new - 1, 0)[:, None]
        arrays: Any = (tokens, starts, num_new, tables, last, slots)  # numpy: jit puts them on the mesh
        logits, self.pools = self.extend(self.params, self.pools, ExtendBatch(*arrays))
        return np.asarray(self.cache.wait(logits))

    def _append_tokens(self, requests: list[Request], logits: np.ndarray) -> None:
        """The next token of each. logits: f32[len(requests), vocab]"""
        for request, row in zip(requests, logits, strict=True):
            request.output.append(sample(row, request.temperature, request.seed, len(request.output)))
            if len(request.output) == 1:
                request.first_token_s = time.perf_counter()
        sequences = [request.sequence for request in requests if request.sequence is not None]
        self.cache.extend_all(sequences, [request.output[-1] for request in requests])

    def _finish(self) -> list[Request]:
        finished = [request for request in self.running if request.is_finished]
        for request in finished:
            assert request.lease is not None
            self._publish(request)
            self.cache.release(request.lease)
            request.lease = None
            self.running.remove(request)
        return finished


def hits_by_tier(requests: Iterable[Request]) -> dict[str, int]:
    """Cached tokens, of all of them together."""
    return {tier: sum((request.hit_tokens or {}).get(tier, 0) for request in requests) for tier in TIERS}


def _tokens(request: Request, begin: int, end: int) -> np.ndarray:
    """Tokens [begin, end) of prompt and output."""
    split = len(request.prompt)
    generated = request.output[max(0, begin - split) : max(0, end - split)]
    return np.concatenate([request.prompt[begin:end], np.array(generated, np.int32)])


def sample(logits: np.ndarray, temperature: float, seed: int, position: int) -> int:
    """The next token: argmax, or drawn with the Gumbel trick from (seed, position) alone.

    logits: f32[vocab]
    """
    if temperature < 0:
        raise ValueError(f"{temperature=} must not be negative")
    if not temperature:
        return int(logits.argmax())
    noise = np.random.default_rng((seed, position)).gumbel(size=logits.shape)
    return int((logits / temperature + noise).argmax())


if __name__ == "__main__":
    import sys

    from models.trace_demo import main

    sys.exit(main(sys.argv[1:]))
