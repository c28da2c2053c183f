"""The processes of one mesh, and the reports they write together when serving must end.

    this process sees that ...   it says so on stderr at once    and raises, with what was heard of the others
    a rank does not answer       step, digest, last decision     RankUnresponsive: the same of them, and who is silent
    it cannot go on itself       the error                       the error; the others: RankUnresponsive, and why
    ranks differ                                                 RanksDiverged: the first decision that differs

When process 0, which hosts jax's coordination service, is gone, jax aborts the others a tenth of a second later. So the
first line goes out before anybody is asked, and a thread watches process 0: a collective may not notice in time.
"""

from __future__ import annotations

import atexit
import json
import math
import sys
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxcache.agreement.peers import Peers, ProcessReport
from jaxcache.agreement.readiness import wait_until_ready
from jaxcache.core.decisions import DecisionLog, first_difference
from jaxcache.fleet.bulletin import Bulletin, coordinator_address
from jaxcache.fleet.coordinator_watch import CoordinatorWatch
from jaxcache.fleet.process_end import reason
from jaxcache.types import RanksDiverged, RankUnresponsive, ServingEnded, TransferFault

LISTEN_SHARE = 0.2  # of the bound, for hearing the others
MAX_LISTEN_S = 2.0
END_SHARE = 0.1  # for the end of the process after that
MAX_END_S = 1.0
GIVEN_UP, FAULT = "unresponsive", "TransferFault: "


class Fleet(Peers):
    """Who takes part, and how long one waits for the others.

    timeout_s: until this process has ended: `wait_s` for the mesh, `listen_s` for hearing the others, the end
    topic:     of the reports; the same in all processes
    """

    def __init__(self, mesh: Mesh, timeout_s: float, topic: str):
        devices = list(mesh.devices.flat)
        self.processes = sorted({device.process_index for device in devices})
        self.process = devices[0].client.process_index()
        self.listen_s = min(MAX_LISTEN_S, LISTEN_SHARE * timeout_s)
        self._wait_s = timeout_s - self.listen_s - min(MAX_END_S, END_SHARE * timeout_s)
        self._bulletin = Bulletin(topic)
        self._watch: CoordinatorWatch | None = None

    @property
    def wait_s(self) -> float:
        """For the mesh; one process alone waits for no other, whatever it computes."""
        return self._wait_s if len(self.processes) > 1 else math.inf

    def wait_for(self, arrays: Sequence[Any]) -> None:
        """Which may need all ranks. One process alone gets the runtime's own errors."""
        try:
            wait_until_ready(arrays, self.wait_s, self.is_reported)
        except RankUnresponsive as error:
            if error.__cause__ is not None and len(self.processes) == 1:
                raise error.__cause__ from None  # no other process can be to blame
            raise

    def watch(self, state: Callable[[], ProcessReport]) -> None:
        """From now on says on stderr what `state`, called on another thread, returns when process 0 is gone."""

        state_of = weakref.WeakMethod(state)  # a thread must keep no cache alive

        def report() -> None:
            here = state_of()
            self._say(f"process 0 is gone, and jax will abort this one; {here().summary if here else 'no cache'}")

        if self.process != 0 and len(self.processes) > 1:
            self._watch = CoordinatorWatch(coordinator_address(), report)
            atexit.register(self._watch.close)  # runs before jax leaves the service

    def close(self) -> None:
        """Serving has ended in an orderly way."""
        if self._watch is not None:
            self._watch.close()
            atexit.unregister(self._watch.close)

    def _say(self, text: str) -> None:
        print(f"jaxcache: process {self.process}: {text}", file=sys.stderr, flush=True)

    def is_reported(self) -> bool:
        """Whether another process has given up or left."""
        return len(self.processes) > 1 and self._bulletin.is_posted(GIVEN_UP, self.processes)

    def fault(self, error: ServingEnded, state: ProcessReport, is_own: bool = True) -> ServingEnded:
        """A copy or a call failed, and this process stops: the others are told why before they miss it, or say why.

        RankUnresponsive: what failed here is what a lost process owes, as far as one can tell.
        """
        self._say(f"{error}; {state.summary}")
        heard = self._exchange(GIVEN_UP, f"{FAULT}{error}" if is_own else state.summary)
        silent = self._silent(heard)
        if is_own and silent and isinstance(error.__cause__, jax.errors.JaxRuntimeError):
            return RankUnresponsive("\n  ".join([f"{error} (process {self.process})", *_by_process(heard), *silent]))
        return error if is_own else _fault_of(heard) or error

    def unresponsive(
        self, what: str, error: RankUnresponsive, state: ProcessReport
    ) -> RankUnresponsive | TransferFault:
        """The report on `what`, which did not come; `error` says how. TransferFault: another stopped for that."""
        own = f"{what} {error}; {state.summary}"
        self._say(own)
        heard = self._exchange(GIVEN_UP, own)
        silent = self._silent(heard)
        fault = _fault_of(heard)
        if fault is not None and not silent:
            return fault
        return RankUnresponsive("\n  ".join([f"{what} {error} (process {self.process})", *_by_process(heard), *silent]))

    def give_up(self, error: Exception, state: ProcessReport) -> None:
        """This process cannot go on, whatever the others do: they are told why before they miss it."""
        self._say(f"{reason(error)}; {state.summary}")
        self._exchange(GIVEN_UP, f"cannot go on: {reason(error)}")

    def _silent(self, heard: Collection[int]) -> list[str]:
        silent = [process for process in self.processes if process not in heard]
        if not silent:
            return []
        left = _by_process({process: f"has ended: {why}" for process, why in self._bulletin.left(silent).items()})
        why = f" ({self._bulletin.why_silent})" if self._bulletin.why_silent else ""
        return [*left, f"nothing was heard within {self.listen_s:g} s of: process {', '.join(map(str, silent))}{why}"]

    def diverged(self, error: RanksDiverged, state: ProcessReport) -> RanksDiverged:
        """The report on a difference that every process has seen in the same step."""
        self._say(f"{error}; {state.summary}")
        own = {"summary": state.summary, "since": state.since, "log": state.decisions, "counts": dict(state.counts)}
        heard = {process: json.loads(text) for process, text in self._exchange("diverged", json.dumps(own)).items()}
        logs = {p: DecisionLog(said["since"], [tuple(d) for d in said["log"]]) for p, said in heard.items()}
        difference = first_difference(logs)
        if difference is None and len(logs) == len(self.processes):
            difference = f"none since step {max(log.since for log in logs.values())}"
        lines = [f"{error} (process {self.process})", f"first difference: {difference or 'not known'}"]
        lines += lines_that_differ({process: said["counts"] for process, said in heard.items()})
        lines += _by_process({process: said["summary"] for process, said in heard.items()})
        return RanksDiverged("\n  ".join([*lines, *self._silent(heard)]))

    def exchange_settings(self, settings: Mapping[str, str]) -> list[str]:
        """What all processes say about themselves, where that differs; and who said nothing."""
        heard = self._exchange("settings", json.dumps(dict(settings)))
        said = {process: json.loads(text) for process, text in heard.items()}
        return [*lines_that_differ(said), *self._silent(heard)]

    def failures(self, own: str) -> list[str]:
        """Why processes could not start, of all that say so; own: why this one could not, or nothing."""
        heard = self._exchange("start", own)
        return [*_by_process({process: why for process, why in heard.items() if why}), *self._silent(heard)]

    def _exchange(self, kind: str, text: str) -> dict[int, str]:
        return self._bulletin.exchange(kind, self.process, text, self.processes, self.listen_s)


def lines_that_differ(said: Mapping[int, Mapping[str, object]]) -> list[str]:
    """One line for every name under which processes hold different values, in the order of the names."""
    names = dict.fromkeys(name for values in said.values() for name in values)
    lines = []
    for name in names:
        values = {process: values.get(name) for process, values in said.items()}
        if len(set(map(str, values.values()))) > 1:
            lines.append(f"{name} differs: " + "; ".join(f"process {p}: {value}" for p, value in values.items()))
    return lines


def _fault_of(heard: Mapping[int, str]) -> TransferFault | None:
    """What a process has said whose own copy failed."""
    for process, text in heard.items():
        if text.startswith(FAULT):
            return TransferFault(f"process {process}: {text.removeprefix(FAULT)}")
    return None


def _by_process(said: Mapping[int, str]) -> list[str]:
    return [f"process {process}: {text}" for process, text in said.items()]
