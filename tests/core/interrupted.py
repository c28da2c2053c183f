"""Raises an exception at every line that mutating calls of the core execute; run by test_interrupts.py.

    run ---- call ---- line ---- line ----> ...       the run goes on undisturbed
                         `-- fork: an exception is raised here, and then every call must say that serving has ended

argv: name of a mixture in RUNS, number of steps, and one of how many places is tried.
Prints {"places", "calls", "unended"} as JSON, or what went wrong.
A place is a line, in a call that has been entered: the first time that it is reached, and once more at random later.
"""

from __future__ import annotations

import json
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxcache.core
from jaxcache.components import FullAttention
from jaxcache.core.attachment import Attachment
from jaxcache.core.prefix_cache import PrefixCache
from jaxcache.testing.scenario import Scenario
from jaxcache.testing.storage_faults import FAULTS, StorageFaults
from jaxcache.types import ServingEnded, WritePolicy
from tests.core.driver import draw_components, draw_config, iterate

CORE = str(Path(jaxcache.core.__file__).parent)
RUNS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "full": (("full",), {"host_pages": 0, "tenants": {}, "eviction_policy": "lru"}),
    "every kind": (("full", "window", "state"), {"write_policy": WritePolicy.WRITE_THROUGH}),
    "write back": (("full", "window", "state"), {"write_policy": WritePolicy.WRITE_BACK, "events": True}),
    "no full": (("window", "state"), {}),
}
ERRORS: tuple[type[BaseException], ...] = (KeyboardInterrupt, MemoryError, ValueError, AssertionError)
BY_HAND = ("admit", "extend_all", "grow", "insert", "release")  # guarded as `changes` does
SECOND_LOOKS = 40  # one of so many lines that have been seen before is tried again


def mutating(kind: type) -> list[str]:
    return [name for name, method in vars(kind).items() if getattr(method, "changes", False)]


class Interrupter:
    """Traces the calls of one core. seen: (call, file, line) that have been tried."""

    def __init__(self, core: PrefixCache, scenario: Scenario, one_of: int):
        self.core, self.scenario, self.one_of = core, scenario, one_of
        self.seen: dict[tuple[str, str, int], None] = {}
        self.calls: dict[str, None] = {}
        self.unended: dict[str, None] = {}
        self.random = random.Random(1)
        self.call = ""
        self.is_child = False
        for owner, names in (
            (core, [*mutating(PrefixCache), *BY_HAND]),
            (core.attachment, mutating(Attachment)),
        ):
            for name in names:
                setattr(owner, name, self.traced(name, getattr(owner, name)))

    def traced(self, name: str, method: Callable) -> Callable:
        def call(*args, **kwargs):
            if self.is_child:
                return method(*args, **kwargs)
            self.call = name
            self.calls[name] = None
            sys.settrace(self.trace)
            try:
                return method(*args, **kwargs)
            except BaseException as error:
                sys.settrace(None)
                if not self.is_child:
                    raise
                self.end_child(error)
            finally:
                sys.settrace(None)

        return call

    def trace(self, frame, event, arg):
        return self.line if frame.f_code.co_filename.startswith(CORE) else None

    def line(self, frame, event, arg):
        if event == "line":
            place = (self.call, frame.f_code.co_filename, frame.f_lineno)
            if place not in self.seen or not self.random.randrange(SECOND_LOOKS):
                self.seen[place] = None
                if not self.random.randrange(self.one_of):
                    self.fork(frame)
        return self.line

    def fork(self, frame) -> None:
        self.place = f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_code.co_name}"
        self.line_number = frame.f_lineno
        self.error = ERRORS[len(self.seen) % len(ERRORS)]
        sys.stdout.flush()
        read, write = os.pipe()
        child = os.fork()
        if not child:
            os.close(read)
            self.is_child, self.pipe, self.before = True, write, fingerprint(self.core)
            raise self.error("interrupted here")
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        assert status == 0 and said, f"{self.call}, {self.place}, line {self.line_number}: {said or status}"
        if said != "ended":
            self.unended[said] = None

    def end_child(self, error: BaseException) -> None:
        """What was raised has come out of the call: says what has become of serving, and ends the process."""
        said = ""
        try:
            if type(error) is not self.error:
                said = f"{error!r} came out instead of {self.error.__name__}"
            elif self.core.serving.ended is None:
                same = fingerprint(self.core) == self.before
                said = self.place if same else f"serving goes on after {self.error.__name__}, and something has changed"
            else:
                said = self.continued() or "ended"
        except BaseException as other:
            said = f"afterwards: {other!r}"
        os.write(self.pipe, said.encode())
        os._exit(0 if said in ("ended", self.place) else 1)

    def continued(self) -> str:
        """The name of a call that still works, or that says something else than that serving has ended."""
        core, scenario = self.core, self.scenario
        namespace = scenario.namespaces[0][0]
        leases = [lease for lease in core.leases.values() if not lease._released]
        sequence = core.sequence([1, 2, 3], namespace) if not namespace.retired else None
        calls: list[tuple[str, Callable[[], Any]]] = [
            ("new_namespace", lambda: core.new_namespace(model="new")),
            ("retire_namespace", lambda: core.retire_namespace(namespace)),
            ("commit", lambda: core.commit({})),
            ("take_plan", core.take_plan),
            ("reset", core.reset),
            ("detach", core.attachment.detach),
            ("cleared", core.attachment.cleared),
            ("plan_is_applied", core.plan_is_applied),
            ("extend_all", lambda: core.extend_all([], [])),
            ("grow_all", lambda: core.grow_all(leases, [lease.num_computed for lease in leases])),
        ]
        if sequence is not None:
            calls += [("admit", lambda: core.admit(sequence, 3)), ("prefetch", lambda: core.prefetch(sequence))]
        for lease in leases:
            calls += [
                ("grow", lambda lease=lease: core.grow(lease, lease.num_computed, 1)),
                ("insert", lambda lease=lease: core.insert(lease, lease.num_computed)),
                ("release", lambda lease=lease: core.release(lease)),
                ("page_tables", lambda lease=lease: lease.page_tables),
            ]
        for name, call in calls:
            try:
                call()
            except ServingEnded as ended:
                if ended.__cause__ is None or type(ended.__cause__) is not self.error:
                    return f"{name} does not name the cause: {ended!r}"
                continue
            return f"{name} still works after {self.error.__name__}"
        return ""


def fingerprint(core: PrefixCache) -> tuple:
    """All that a call could have changed."""
    tiers = core.tiers
    nodes, stack = [], tiers.tree.all_roots()
    while stack:
        node = stack.pop()
        pages = tuple(None if ids is None else ids.tobytes() for ids in node.pages)
        nodes.append((node.id, bytes(node.edge), pages, tuple(node.pins), node.ends_here, len(node.children)))
        stack += node.children.values()
    free = [residency.allocator.free_ids().tobytes() for residency in tiers.residencies]
    leases = [
        (lease.id, lease.num_computed, lease.num_tokens, lease._published, tuple(map(id, lease.page_ids)))
        for lease in core.leases.values()
    ]
    return core.digest, core.sizes(), nodes, free, leases, len(core.outbox.transfers), core.next_lease_id


def main(name: str, num_steps: int, one_of: int) -> None:
    kinds, overrides = RUNS[name]
    rng = random.Random(7)
    components = (FullAttention("full", ()),) if kinds == ("full",) else draw_components(rng, kinds, 4)
    config = draw_config(rng, components, 4, 12, **{"host_pages": 40, **overrides})
    scenario = Scenario(components, config, 7, (1, 1, 1), StorageFaults(7, 1, FAULTS, 1.0))
    scenario.namespace(1)
    interrupter = Interrupter(scenario.core, scenario, one_of)
    for step in range(num_steps):
        iterate(scenario, rng, 48, 0.05)
        if step % 20 == 19:
            scenario.retire(step // 20 % 2)
        if step % 30 == 29 and scenario.core.tiers.has_host:
            scenario.detach()
            scenario.attach()
            scenario.clear_storage()
            scenario.core.attachment.change(None, None)
        if step % 25 == 24:
            scenario.forget_device()
        if step % 40 == 39:
            scenario.reset()
        for request in list(scenario.waiting)[:1] if step % 5 == 0 else ():
            scenario.cancel(request)
        leases = [request.leases[0] for request in scenario.running if request.leases[0].num_computed]
        if leases and scenario.core.plan_is_applied():
            scenario.core.grow_all(leases, [lease.num_computed for lease in leases])
        namespace = scenario.namespaces[0][0]
        if not namespace.retired:
            scenario.core.extend_all([scenario.core.sequence([1, 2], namespace) for _ in range(2)], [3, 4])
    print(
        json.dumps(
            {
                "places": len(interrupter.seen),
                "calls": sorted(interrupter.calls),
                "unended": sorted(interrupter.unended),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
