"""Jobs wait for their dependencies without occupying threads."""

import gc
import os
import sys
import threading
import time
import weakref

import pytest

from jaxcache.engine.jobs import JobGraph, Threads, at_once


@pytest.fixture
def graph():
    graph = JobGraph(Threads(1, "test"))
    yield graph
    graph.close()


def test_a_job_runs_after_its_dependencies(graph):
    order, gate = [], threading.Event()
    first = graph.submit(at_once(lambda: gate.wait() and order.append("first")))
    last = graph.submit(at_once(lambda: order.append("last")), [first])
    assert not last.done()
    gate.set()
    last.result()
    assert order == ["first", "last"]


def test_waiting_jobs_occupy_no_thread(graph):
    from concurrent.futures import Future

    gate = Future()
    waiting = [graph.submit(at_once(lambda: "late"), [gate]) for _ in range(10)]
    assert graph.submit(at_once(lambda: "now")).result(10) == "now"
    assert graph.num_open == 10
    gate.set_result(None)
    assert [job.result(10) for job in waiting] == ["late"] * 10


def test_a_failed_dependency_fails_its_dependents_without_running_them(graph):
    ran = []

    def fail():
        raise OSError("disk")

    first = graph.submit(at_once(fail))
    second = graph.submit(at_once(lambda: ran.append(1)), [first])
    third = graph.submit(at_once(lambda: ran.append(1)), [second])
    assert isinstance(third.exception(10), OSError)
    assert ran == []


def test_all_of_some_jobs(graph):
    """Done with the last, and failed if one has."""
    from concurrent.futures import Future

    def fail(message):
        raise OSError(message)

    gate = Future()
    good = [graph.submit(at_once(lambda: None), [gate]) for _ in range(3)]
    bad = [graph.submit(at_once(fail, message), [gate]) for message in ("disk", "net")]
    joined = [graph.all_of(jobs) for jobs in (good, [*good, bad[0]], [*bad, *good], bad[1:], good[1:])]
    assert not any(job.done() for job in joined)
    assert graph.num_open == 5 + 4  # one of one job is that job
    gate.set_result(None)
    assert [str(job.exception(10)) for job in joined] == ["None", "disk", "disk", "net", "None"]
    assert graph.drain(10) and graph.num_open == 0


def test_a_long_failed_chain_does_not_recurse(graph):
    from concurrent.futures import Future

    gate = Future()
    job = gate
    for _ in range(5000):
        job = graph.submit(at_once(lambda: None), [job])
    gate.set_exception(OSError("disk"))
    assert isinstance(job.exception(30), OSError)


def test_diamonds_on_few_threads():
    graph = JobGraph(Threads(2, "test"))
    layers = [[graph.submit(at_once(lambda: 1))]]
    for _ in range(50):
        layers.append([graph.submit(at_once(lambda: 1), layers[-1]) for _ in range(4)])
    assert [job.result(10) for job in layers[-1]] == [1] * 4
    graph.close()


def test_drain_reports_a_timeout(graph):
    gate = threading.Event()
    graph.submit(at_once(gate.wait))
    assert not graph.drain(0.01)
    gate.set()
    assert graph.drain(10)


def test_what_has_not_begun_at_the_end_never_runs(graph):
    gate, began, ran = threading.Event(), threading.Event(), []
    graph.submit(at_once(lambda: (began.set(), gate.wait())))
    graph.submit(at_once(lambda: ran.append(1)))
    assert began.wait(10)
    (thread,) = graph.end()
    thread.join(0.05)
    assert thread.is_alive()
    gate.set()
    thread.join(10)
    late = graph.submit(at_once(lambda: ran.append(2)))
    assert (thread.is_alive(), late.done(), ran) == (False, False, [])
    graph._open.clear()  # for the fixture


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()], ids=repr)
def test_no_error_of_a_job_ends_its_thread(graph, error):
    def fail():
        raise error

    assert graph.submit(at_once(fail)).exception(10) is error
    assert graph.submit(at_once(lambda: "next")).result(10) == "next"


def test_a_graph_that_is_dropped_ends_its_threads_and_keeps_nothing_alive():
    class Page:
        pass

    page, graph = Page(), JobGraph(Threads(2, "test"))
    gone = weakref.ref(page)
    graph.submit(at_once(lambda page=page: page)).result(10)
    threads = graph.workers._threads
    del page
    deadline = time.monotonic() + 10
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.001)  # the thread is about to forget the job
    assert gone() is None
    del graph
    gc.collect()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_refused_priority_is_no_end(monkeypatch):
    """A sandbox may refuse it: the thread works at the usual one."""

    def refuse(*args):
        raise PermissionError("setpriority")

    monkeypatch.setattr(os, "setpriority", refuse)
    graph = JobGraph(Threads(1, "test", niceness=10))
    assert graph.submit(at_once(lambda: 7)).result(10) == 7
    graph.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own there")
def test_threads_of_lower_priority():
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    graph = JobGraph(Threads(1, "test", niceness=3))
    assert graph.submit(at_once(priority)).result(10) == min(priority() + 3, 19)
    graph.close()
