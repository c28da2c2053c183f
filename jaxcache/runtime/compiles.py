"""Counts XLA compiles of this process, so that "no compile after warm-up" can be asserted and exported."""

from __future__ import annotations

import threading

import jax

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class _CompileCounter:
    """Listens to jax; listeners live as long as the process, so there is one."""

    def __init__(self):
        self._lock = threading.Lock()
        self.num_compiles = 0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == COMPILE_EVENT:
            with self._lock:
                self.num_compiles += 1


_counter = _CompileCounter()


def compile_count() -> int:
    """Programs that XLA compiled since this module was imported."""
    return _counter.num_compiles
