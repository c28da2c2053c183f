"""Jobs in virtual time: order, waiting, and what has nothing left to do."""

from __future__ import annotations

import pytest

from jaxcache.testing.virtual_jobs import VirtualJob, VirtualJobs


class Noted(VirtualJob):
    def __init__(self, name: str, log: list[str], has_work: bool = True):
        super().__init__()
        self.name, self.log, self.has_work = name, log, has_work

    def begin(self) -> bool:
        self.log.append(f"begin {self.name}")
        return self.has_work

    def end(self) -> None:
        self.log.append(f"end {self.name}")


def test_jobs_end_in_the_order_of_their_times():
    jobs, log = VirtualJobs(), []
    slow, quick = Noted("slow", log), Noted("quick", log)
    jobs.submit(slow, 20)
    jobs.submit(quick, 10)
    jobs.advance(15)
    assert log == ["begin slow", "begin quick", "end quick"]
    assert (quick.done(), slow.done(), jobs.now_us) == (True, False, 15)
    jobs.advance(20)
    assert log[-1] == "end slow"


def test_a_job_begins_when_all_that_it_needs_is_done():
    jobs, log = VirtualJobs(), []
    first, second, third = (Noted(name, log) for name in "abc")
    jobs.submit(first, 10)
    jobs.submit(second, 30)
    jobs.submit(third, 5, after=[first, second])
    jobs.advance(34)
    assert log == ["begin a", "begin b", "end a", "end b", "begin c"]
    jobs.advance(35)
    assert third.done()


def test_waiting_lets_just_as_much_time_pass_as_is_needed():
    jobs, log = VirtualJobs(), []
    first, second, other = (Noted(name, log) for name in "abc")
    jobs.submit(first, 10)
    jobs.submit(second, 5, after=[first])
    jobs.submit(other, 100)
    jobs.wait(second)
    assert (jobs.now_us, other.done()) == (15, False)
    jobs.wait(second)
    assert jobs.now_us == 15


def test_what_has_nothing_to_do_is_over_at_once():
    jobs, log = VirtualJobs(), []
    idle, after = Noted("idle", log, has_work=False), Noted("after", log)
    jobs.submit(idle, 1000)
    jobs.submit(after, 10, after=[idle])
    assert log == ["begin idle", "begin after"]
    assert idle.done()


def test_time_never_goes_back():
    jobs = VirtualJobs()
    jobs.advance(10)
    jobs.advance(5)
    assert jobs.now_us == 10


def test_waiting_for_what_was_never_submitted_is_noticed():
    with pytest.raises(AssertionError, match="waits for what will never be done"):
        VirtualJobs().wait(Noted("a", []))
