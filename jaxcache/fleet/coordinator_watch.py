"""Notices at once that process 0 is gone: it hosts jax's coordination service, without which jax aborts the others.

Holds a plain connection to the service, on which nothing is ever said, and sees it end. A call of the service would
fail as soon, but with a C++ exception, and those wait while the aborting thread writes its stack: until the abort.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

CONNECT_S = 10.0
SHORT_S = 1.0
NAP_S, MAX_NAPS = 0.005, 20  # a process that dies may take connections for some milliseconds, and drop them


class CoordinatorWatch:
    """From its making until `close`; calls `on_loss` on a thread of its own, once.

    address: "host:port" of the service, or None: nothing is watched
    """

    def __init__(self, address: str | None, on_loss: Callable[[], None]):
        self._is_over = threading.Event()
        self._connection: socket.socket | None = None
        host, _, port = (address or "").rpartition(":")
        if port.isdigit():
            args = (host.strip("[]"), int(port)), on_loss
            threading.Thread(target=self._watch, args=args, name="jaxcache-watch", daemon=True).start()

    def close(self) -> None:
        """Whatever ends now, ends in order. The thread ends, and lets go of `on_loss`."""
        self._is_over.set()
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it has ended by itself
                self._connection.shutdown(socket.SHUT_RDWR)

    def _watch(self, address: tuple[str, int], on_loss: Callable[[], None]) -> None:
        """The service closes what stays silent, after a minute; then it takes the next."""
        was_there, num_short = False, 0
        while not self._is_over.is_set():
            start = time.monotonic()
            try:
                connection = socket.create_connection(address, CONNECT_S)
            except (ConnectionRefusedError, ConnectionResetError):
                if was_there and not self._is_over.is_set():
                    on_loss()
                return
            except OSError:  # slow, or out of reach: left to jax's heartbeats
                return
            was_there = True
            self._hold(connection)
            num_short = num_short + 1 if time.monotonic() - start < SHORT_S else 0
            if num_short:  # a coordinator that goes on dropping connections at once is asked rarely
                self._is_over.wait(NAP_S if num_short <= MAX_NAPS else SHORT_S)

    def _hold(self, connection: socket.socket) -> None:
        """Returns when either side ends the connection."""
        with connection:
            self._connection = connection
            if self._is_over.is_set():
                return
            connection.settimeout(None)
            with contextlib.suppress(OSError):
                while connection.recv(4096):
                    pass
