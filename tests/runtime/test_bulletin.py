"""What processes tell each other through jax's coordination service, and what happens when it is not there."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import jax
import pytest
from jax._src import distributed

from jaxcache.runtime import bulletin
from jaxcache.runtime.bulletin import Bulletin


class FakeService:
    """As much of the coordination service's client as is used; all processes of a test share it."""

    def __init__(self):
        self.values: dict[str, str] = {}

    def key_value_set(self, key: str, value: str, allow_overwrite: bool) -> None:
        assert allow_overwrite
        self.values[key] = value

    def key_value_dir_get(self, folder: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(folder)]


class Stopped(FakeService):
    def key_value_set(self, key, value, allow_overwrite):
        threading.Event().wait()


class Gone(FakeService):
    def key_value_dir_get(self, folder):
        raise jax.errors.JaxRuntimeError("UNAVAILABLE: Socket closed")


@pytest.fixture
def use(monkeypatch):
    def use(client) -> None:
        monkeypatch.setattr(distributed, "global_state", SimpleNamespace(client=client, coordinator_address="h:1"))

    return use


def test_all_hear_all(use):
    use(FakeService())
    first, second = Bulletin("7"), Bulletin("7")
    heard = {}
    thread = threading.Thread(target=lambda: heard.update(first.exchange("kind", 0, "a", [0, 1], 60.0)))
    thread.start()
    assert second.exchange("kind", 1, "b", [0, 1], 60.0) == {0: "a", 1: "b"}
    thread.join()
    assert heard == {0: "a", 1: "b"}


def test_topics_and_kinds_are_apart(use):
    use(FakeService())
    Bulletin("7").exchange("kind", 0, "a", [0, 1], 0.05)
    assert Bulletin("8").exchange("kind", 1, "b", [0, 1], 0.05) == {1: "b"}
    assert Bulletin("7").exchange("other", 1, "b", [0, 1], 0.05) == {1: "b"}
    assert Bulletin("7").exchange("kind", 1, "b", [0, 1], 60.0) == {0: "a", 1: "b"}


@pytest.mark.parametrize("service", [Stopped, Gone])
def test_a_service_that_does_not_answer_costs_no_more_than_the_bound(use, service):
    use(service())
    start = time.monotonic()
    assert Bulletin("7").exchange("kind", 1, "b", [0, 1], 0.2) == {1: "b"}
    bulletin.leave(0, 0.2)
    assert time.monotonic() - start < 30


def test_without_jax_distributed(use):
    use(None)
    alone = Bulletin("7")
    assert alone.exchange("kind", 0, "a", [0, 1], 60.0) == {0: "a"}
    assert "was not initialized" in alone.why_silent


def test_a_jax_that_keeps_its_client_elsewhere(monkeypatch):
    monkeypatch.delattr(distributed, "global_state")
    lost = Bulletin("7")
    assert lost.exchange("kind", 0, "a", [0, 1], 60.0) == {0: "a"}
    assert f"jax {jax.__version__} has no coordination client" in lost.why_silent
    assert bulletin.coordinator_address() is None
    bulletin.leave(1, 60.0)


def test_process_0_leaves_after_those_that_have_spoken(use):
    service = FakeService()
    use(service)
    for process in (0, 1, 2):
        Bulletin("7").exchange("kind", process, "", [process, 9], 0.02)
    bulletin.leave(2, 60.0)
    leaving = threading.Thread(target=bulletin.leave, args=(0, 60.0))
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive()
    bulletin.leave(1, 60.0)
    leaving.join()
