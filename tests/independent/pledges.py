"""What `insert(retain_steps=...)` has promised: that resuming there needs nothing but the device, until some step."""

from __future__ import annotations

from typing import NamedTuple

from tests.independent.content import Text, demand
from tests.independent.survey import Survey
from tests.independent.world import Request, World


class Pledge(NamedTuple):
    text: Text
    num_tokens: int
    until: int


class Pledges:
    """One for each lease: the last one. It outlives the lease."""

    def __init__(self):
        self._of_lease: dict[int, Pledge] = {}
        self._kept: list[Pledge] = []

    def made(self, world: World, request: Request, num_steps: int) -> None:
        """The deepest published end from which a request could go on, with the device alone."""
        if request.sequences[0].namespace.retired or not world.config.caching:
            return
        survey = Survey(world.first, world.runs)
        lease = request.lease
        end = survey.longest(request.text, world.first.published(lease), device_only=True).num_tokens
        earlier = self._of_lease.get(lease.id)
        until = world.step + num_steps
        if earlier is not None:
            until = max(until, earlier.until)
        if end:
            text = Text(request.text.namespace, request.text.tokens[:end])
            self._of_lease[lease.id] = Pledge(text, end, until)

    def released(self, lease_id: int) -> None:
        """Nobody can change it any more."""
        pledge = self._of_lease.pop(lease_id, None)
        if pledge is not None:
            self._kept.append(pledge)

    def void(self, namespace: bytes | None = None) -> None:
        """All of a namespace, or all there are: what was retired, reset or lost is not kept."""
        if namespace is None:
            self._of_lease.clear()
            self._kept.clear()
        self._kept = [pledge for pledge in self._kept if pledge.text.namespace != namespace]
        self._of_lease = {id: p for id, p in self._of_lease.items() if p.text.namespace != namespace}

    def check(self, survey: Survey, step: int) -> None:
        self._kept = [pledge for pledge in self._kept if pledge.until > step]
        for pledge in (*self._kept, *self._of_lease.values()):
            if pledge.until > step:
                found = survey.longest(pledge.text, pledge.num_tokens, device_only=True).num_tokens
                demand(found == pledge.num_tokens, "retention", found, "tokens are left of", pledge)
