"""What processes tell each other when the mesh can no longer be used: short texts, by process, under a topic.

    exchange(kind, own text) ----> jax's coordination service (in process 0) ----> {process: text}

It stands on the client of that service, which jax keeps private. Without it (one process alone, or a jax that keeps it
elsewhere) nobody hears anybody, and `why_silent` says so. The service may hang or be gone: every call has a bound.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

import jax

T = TypeVar("T")

ROOT, LEFT = "jaxcache", "left"
LEFT_FOLDER = f"{ROOT}/{LEFT}/"  # of all topics: a process ends with all its caches
POLL_S = 0.005
ASK_S = 0.2


class Bulletin:
    """One topic; all processes of a cache use the same."""

    def __init__(self, topic: str):
        self._topic = topic
        self._client, self.why_silent = _client()
        self._asking = threading.Event()
        self._asking.set()

    def is_posted(self, kind: str, processes: Collection[int]) -> bool:
        """Whether one of these has said anything, or has left; False, too, while the service does not answer."""
        return bool(self._read([f"{ROOT}/{self._topic}/{kind}/", LEFT_FOLDER], processes))

    def left(self, processes: Collection[int]) -> dict[int, str]:
        """Those of these that have left, and why."""
        return self._read([LEFT_FOLDER], processes)

    def _read(self, folders: Sequence[str], processes: Collection[int]) -> dict[int, str]:
        """What the service answers within ASK_S; one that has not answered the last time is not asked again."""
        client, found = self._client, {}
        if client is None or not self._asking.is_set():
            return found

        def ask() -> None:
            for folder in folders:
                found.update(_said(client, folder, processes))

        self._asking = _bounded(ask, ASK_S)
        return found.copy()

    def exchange(
        self, kind: str, process: int, text: str, processes: Collection[int], timeout_s: float
    ) -> dict[int, str]:
        """Says `text` and listens to the others, until all have been heard or time is up. Returns what was heard."""
        heard = {process: text}
        if self._client is None or set(processes) <= {process}:
            return heard
        client, folder, over = self._client, f"{ROOT}/{self._topic}/{kind}/", threading.Event()

        def talk() -> None:
            client.key_value_set(f"{folder}{process}", text, True)
            while not over.is_set() and not set(processes) <= set(heard):
                heard.update(_said(client, folder, processes))
                over.wait(POLL_S)

        _bounded(talk, timeout_s)
        over.set()
        return dict(sorted(heard.copy().items()))


def leave(process: int, why: str, timeout_s: float) -> None:
    """Says that this process ends now, and why. With process 0 the service ends, and jax aborts the processes that
    still run: it waits, up to `timeout_s`, until all that have posted anything have left."""
    client, _ = _client()
    if client is None:
        return

    def talk() -> None:
        client.key_value_set(f"{LEFT_FOLDER}{process}", why, True)
        while process == 0 and _posters(client, but=LEFT) - _posters(client, only=LEFT) - {process}:
            time.sleep(POLL_S)

    _bounded(talk, timeout_s)


def _posters(client: Any, but: str = "", only: str = "") -> set[int]:
    paths = [key.split("/") for key, _ in client.key_value_dir_get(f"{ROOT}/")]
    return {int(path[-1]) for path in paths if path[1] != but and only in ("", path[1])}


def _said(client: Any, folder: str, processes: Collection[int]) -> dict[int, str]:
    """What these processes have posted in a folder."""
    texts = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}
    return {process: text for process, text in texts.items() if process in processes}


def _bounded(work: Callable[[], None], timeout_s: float) -> threading.Event:
    """Runs it on a thread that is left behind when time is up: a call to a stopped service never returns.

    Returns what is set when it has returned.
    """
    done = threading.Event()

    def run() -> None:
        try:
            work()
        except (RuntimeError, ValueError):  # the service is gone; what was heard before counts
            pass
        finally:
            done.set()

    threading.Thread(target=run, name="jaxcache-bulletin", daemon=True).start()
    done.wait(timeout_s)
    return done


def coordinator_address() -> str | None:
    """host:port of the coordination service, if there is one."""
    try:
        from jax._src import distributed

        return distributed.global_state.coordinator_address
    except (ImportError, AttributeError):
        return None


def _client() -> tuple[Any, str]:
    """jax's client of the coordination service, or None and why there is none."""
    try:
        from jax._src import distributed

        client = distributed.global_state.client
    except (ImportError, AttributeError):
        return None, f"jax {jax.__version__} has no coordination client where this jaxcache looks for it"
    return client, "" if client is not None else "jax.distributed was not initialized"
