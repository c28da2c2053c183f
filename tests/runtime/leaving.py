"""A program that serves and then ends in one of several ways; run by test_leaving.py.

argv: how it ends, its storage, a folder. While it ends, backups and stores are under way.
    falls off        it closes nothing
    closes at exit   `close` is an `atexit` handler
    serves on        the main thread ends; another one serves on, and closes
    after a fault    serving has ended with an error
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

import jax
import numpy as np

import jaxcache
from jaxcache.engine import device_effects
from jaxcache.engine.device_effects import is_exiting

KV = jaxcache.FieldSpec("kv", (2, 2, 4, 1, 64), "float32", ("layers", None, "slots", "heads", None))
CONFIG = jaxcache.CacheConfig(page_tokens=4, device_pages=512, host_pages=512, storage_threads=2)
NUM_TOKENS = 200


class SlowStorage(jaxcache.Storage):
    """Notes in a file what begins and what ends."""

    secret = b"test"

    def __init__(self, notes: str):
        self.notes = os.open(notes, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.begun = threading.Event()

    def exists(self, keys):
        return [False] * len(keys)

    def get(self, key, buffer):
        return False

    def put(self, key, buffer):
        os.write(self.notes, b"begins\n")
        self.begun.set()
        time.sleep(0.1)
        os.write(self.notes, b"ends\n")
        return True

    def clear(self):
        pass


class HungStorage(SlowStorage):
    def put(self, key, buffer):
        self.begun.set()
        threading.Event().wait()


def storage_of(kind: str, folder: str) -> jaxcache.Storage:
    if kind == "memory":
        return jaxcache.MemoryStorage()
    return {"file": jaxcache.FileStorage, "slow": SlowStorage, "hung": HungStorage}[kind](folder)


model_step = jax.jit(lambda pools: pools, donate_argnums=0)


def serve(cache: jaxcache.Cache, num_requests: int = 6):
    pools, namespace = cache.init_pools(), cache.new_namespace(model="test")
    for seed in range(num_requests):
        pools = cache.step(pools)
        tokens = np.random.default_rng(seed).integers(0, 1000, NUM_TOKENS)
        lease = cache.admit(cache.sequence(tokens, namespace), NUM_TOKENS)
        pools = model_step(cache.apply(pools))
        cache.insert(lease, NUM_TOKENS)
        cache.release(lease)
        pools = cache.apply(pools)
    pools = cache.apply(cache.step(pools))
    if isinstance(cache.storage, SlowStorage):
        cache.storage.begun.wait()
    return pools


def serve_on(cache: jaxcache.Cache) -> None:
    threading.main_thread().join()
    assert not is_exiting()
    serve(cache)
    cache.close()
    print("served on", flush=True)


def fail(cache: jaxcache.Cache) -> None:
    pools = serve(cache)
    cache.engine.fault = OSError("a copy that failed")
    try:
        cache.apply(pools)
    except jaxcache.TransferFault:
        cache.close()


def main(how: str, kind: str, folder: str) -> None:
    assert not is_exiting()
    device_effects.EXIT_S = 1.0
    cache = jaxcache.Cache(
        [jaxcache.FullAttention("full", (KV,))], jaxcache.one_device_mesh(), CONFIG, storage_of(kind, folder)
    )
    if how == "closes at exit":
        atexit.register(cache.close)
    if how == "serves on":
        threading.Thread(target=serve_on, args=(cache,)).start()
    elif how == "after a fault":
        fail(cache)
    else:
        serve(cache)
    print("main ends", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
