"""Jobs in virtual time: order, rests, few workers, and waiting."""

from __future__ import annotations

import pytest

from jaxcache.engine.jobs import Job, JobGraph, Pause, Steps
from jaxcache.testing.virtual_time import VirtualTime, VirtualWorkers


def noted(name: str, log: list[str], *rests_us: int) -> Steps:
    log.append(f"begin {name}")
    for us in rests_us:
        yield Pause(us / 1e6)
        log.append(f"{name} after {us}")
    log.append(f"end {name}")


def graph_on(time: VirtualTime, num_workers: int = 8) -> JobGraph:
    return JobGraph(VirtualWorkers(time, num_workers, lambda pause: round(pause.rest_s * 1e6)))


def test_jobs_end_in_the_order_of_their_times():
    time, log = VirtualTime(), []
    graph = graph_on(time)
    slow, quick = graph.submit(noted("slow", log, 20)), graph.submit(noted("quick", log, 10))
    time.advance(15)
    assert log == ["begin slow", "begin quick", "quick after 10", "end quick"]
    assert (quick.done(), slow.done(), time.now_us) == (True, False, 15)
    time.advance(20)
    assert log[-1] == "end slow"


def test_a_job_begins_when_all_that_it_needs_is_done():
    time, log = VirtualTime(), []
    graph = graph_on(time)
    needs = [graph.submit(noted("a", log, 10)), graph.submit(noted("b", log, 15, 15))]
    third = graph.submit(noted("c", log, 5), needs)
    time.advance(34)
    assert log == ["begin a", "begin b", "a after 10", "end a", "b after 15", "b after 15", "end b", "begin c"]
    time.advance(35)
    assert third.done()


def test_a_job_waits_for_a_free_worker():
    time, log = VirtualTime(), []
    graph = graph_on(time, num_workers=1)
    for name in "abc":
        graph.submit(noted(name, log, 10))
    time.advance(19)
    assert log == ["begin a", "a after 10", "end a", "begin b"]
    time.advance(30)
    assert log[-1] == "end c"


def test_what_has_not_begun_at_the_end_never_runs():
    time, log = VirtualTime(), []
    graph = graph_on(time, num_workers=1)
    jobs = [graph.submit(noted(name, log, 10)) for name in "ab"]
    assert graph.end() == []
    time.advance(100)
    assert [job.done() for job in jobs] == [True, False]


def test_waiting_lets_just_as_much_time_pass_as_is_needed():
    time, log = VirtualTime(), []
    graph = graph_on(time)
    first = graph.submit(noted("a", log, 10))
    second = graph.submit(noted("b", log, 5), [first])
    other = graph.submit(noted("c", log, 100))
    time.wait(second)
    assert (time.now_us, other.done()) == (15, False)
    time.wait(second)
    assert time.now_us == 15


def test_a_long_failed_chain_does_not_recurse():
    graph, gate = graph_on(VirtualTime()), Job()
    job = gate
    for _ in range(5000):
        job = graph.submit(noted("never", []), [job])
    gate.set_exception(OSError("disk"))
    assert isinstance(job.exception(), OSError)


def test_time_never_goes_back():
    time = VirtualTime()
    time.advance(10)
    time.advance(5)
    assert time.now_us == 10


def test_waiting_for_what_was_never_submitted_is_noticed():
    with pytest.raises(AssertionError, match="waits for what will never be done"):
        VirtualTime().wait(Job())
