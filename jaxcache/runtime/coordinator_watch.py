"""Notices at once that process 0 is gone: it hosts jax's coordination service, without which jax aborts the others.

Holds a plain connection to the service, on which nothing is ever said, and sees it end. A call of the service would
fail as soon, but with a C++ exception, and those wait while the aborting thread writes its stack: until the abort.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable

CONNECT_S = 10.0


class CoordinatorWatch:
    """From its making until `close`; calls `on_loss` on a thread of its own, once.

    address: "host:port" of the service, or None: nothing is watched
    """

    def __init__(self, address: str | None, on_loss: Callable[[], None]):
        self._is_over = threading.Event()
        if address is not None:
            host, _, port = address.rpartition(":")
            args = (host.strip("[]"), int(port)), on_loss
            threading.Thread(target=self._watch, args=args, name="jaxcache-watch", daemon=True).start()

    def close(self) -> None:
        """Whatever ends now, ends in order."""
        self._is_over.set()

    def _watch(self, address: tuple[str, int], on_loss: Callable[[], None]) -> None:
        try:
            while not self._is_over.is_set():
                _hold(address)  # the service closes what stays silent, after minutes; then it takes the next
        except TimeoutError:  # the host is slow or gone, which is left to jax's heartbeats
            return
        except OSError:
            if not self._is_over.is_set():
                on_loss()


def _hold(address: tuple[str, int]) -> None:
    """Returns when the other side ends the connection; OSError if there is nobody to connect to."""
    with socket.create_connection(address, CONNECT_S) as connection:
        connection.settimeout(None)
        try:
            while connection.recv(4096):
                pass
        except ConnectionError:
            pass
