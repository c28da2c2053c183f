"""What processes tell each other through jax's coordination service, and what happens when it is not there."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import jax
import pytest
from jax._src import distributed

from jaxcache.fleet import bulletin
from jaxcache.fleet.bulletin import Bulletin


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
    bulletin.leave(0, "", 0.2)
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
    bulletin.leave(1, "", 60.0)


def test_process_0_leaves_after_those_that_have_spoken(use):
    service = FakeService()
    use(service)
    for process in (0, 1, 2):
        Bulletin("7").exchange("kind", process, "", [process, 9], 0.02)
    bulletin.leave(2, "", 60.0)
    leaving = threading.Thread(target=bulletin.leave, args=(0, "", 60.0))
    leaving.start()
    leaving.join(0.1)
    assert leaving.is_alive()
    bulletin.leave(1, "", 60.0)
    leaving.join()


def test_other_processes_are_not_heard(use):
    """Of another replica, which may have the same topic."""
    service = FakeService()
    use(service)
    Bulletin("7").exchange("kind", 2, "somebody else", [2, 3], 0.05)
    assert Bulletin("7").exchange("kind", 0, "a", [0, 1], 0.05) == {0: "a"}
    assert not Bulletin("7").is_posted("kind", [1])


def test_whether_somebody_has_posted(use):
    use(FakeService())
    board = Bulletin("7")
    assert not board.is_posted("kind", [0, 1])
    board.exchange("kind", 1, "b", [0, 1], 0.05)
    assert board.is_posted("kind", [0, 1])
    assert not board.is_posted("other", [0, 1])


def test_who_has_left_and_why(use):
    """A process leaves with all its caches: the topic is none of its business."""
    use(FakeService())
    board = Bulletin("7")
    assert board.left([0, 1]) == {}
    bulletin.leave(1, "MemoryError: no room", 60.0)
    assert board.left([0, 1]) == {1: "MemoryError: no room"}
    assert board.left([0, 2]) == {}
    assert board.is_posted("kind", [0, 1])
    assert not board.is_posted("kind", [0, 2])


def test_a_service_that_does_not_answer_is_asked_once(use, monkeypatch):
    class Silent(FakeService):
        num_asked = 0

        def key_value_dir_get(self, folder):
            self.num_asked += 1
            threading.Event().wait()

    monkeypatch.setattr(bulletin, "ASK_S", 0.05)
    service = Silent()
    use(service)
    board = Bulletin("7")
    assert [board.is_posted("kind", [0, 1]) for _ in range(3)] == [False] * 3
    assert service.num_asked == 1
