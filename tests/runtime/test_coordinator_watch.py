"""Process 0's end is noticed; that it closes a silent connection, or that serving ends, is none."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from jaxcache.fleet import coordinator_watch
from jaxcache.fleet.coordinator_watch import CoordinatorWatch

PATIENCE_S = 60.0


def accept(server: socket.socket) -> socket.socket:
    server.settimeout(PATIENCE_S)
    connection, _ = server.accept()
    connection.sendall(b"settings that nobody reads")
    return connection


def test_the_service_ends():
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        CoordinatorWatch(f"127.0.0.1:{server.getsockname()[1]}", lost.set)
        connection = accept(server)
    assert not lost.is_set()
    connection.close()
    assert lost.wait(PATIENCE_S)


def test_a_closed_connection_is_made_again():
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        CoordinatorWatch(f"127.0.0.1:{server.getsockname()[1]}", lost.set)
        accept(server).close()
        connection = accept(server)
        assert not lost.is_set()
    connection.close()
    assert lost.wait(PATIENCE_S)


def test_an_orderly_end_is_no_loss():
    lost = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = CoordinatorWatch(f"127.0.0.1:{server.getsockname()[1]}", lost.set)
        connection = accept(server)
    watch.close()
    connection.close()
    for thread in threading.enumerate():
        if thread.name == "jaxcache-watch":
            thread.join(PATIENCE_S)
    assert not lost.is_set()


def test_nothing_to_watch():
    before = threading.active_count()
    CoordinatorWatch(None, lambda: None).close()
    assert threading.active_count() == before


def test_a_service_that_closes_every_connection_is_not_pestered(monkeypatch):
    monkeypatch.setattr(coordinator_watch, "SHORT_S", 0.2)
    monkeypatch.setattr(coordinator_watch, "MAX_NAPS", 1)
    times = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        watch = CoordinatorWatch(f"127.0.0.1:{server.getsockname()[1]}", lambda: None)
        for _ in range(4):
            accept(server).close()
            times.append(time.monotonic())
        watch.close()
    assert times[-1] - times[0] > 0.3


@pytest.mark.parametrize("address", ["127.0.0.1:9", "no-such-host.invalid:1", "no port"])
def test_what_was_never_there_is_no_loss(address):
    lost = threading.Event()
    CoordinatorWatch(address, lost.set)
    for thread in threading.enumerate():
        if thread.name == "jaxcache-watch":
            thread.join(PATIENCE_S)
    assert not lost.is_set()
