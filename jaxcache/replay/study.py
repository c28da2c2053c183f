"""One trace replayed again and again: policies side by side, hit rates by capacity of the device, tiers as they fill.

Nothing is computed twice: a replay is known by its setting, the optimum by the capacity that it has.

    settings ---> reports        at the capacity that was asked for, with occupancies
        |
        +--around--> curves      every policy at 1/8, 1/4, 1/2, 1, 2, 4 times that capacity
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jaxcache.replay.optimum import offline
from jaxcache.replay.replay import Replay, Setting
from jaxcache.replay.traces import TraceRequest

OCTAVES = (-3, -2, -1, 0, 1, 2)  # around the capacity that was asked for
SAMPLES = 200  # of an occupancy
BASELINE = "lru"  # has a curve beside whatever was chosen

Advance = Callable[[str, int], None]  # what is being done, and how many requests further it is


class Curves(NamedTuple):
    """Hit rates, 0 to 1, all tiers together; one for every capacity of the device, which are tokens, ascending.

    policies: name -> hit rates; infinite: the same for all capacities
    """

    capacities: list[int]
    policies: dict[str, list[float]]
    optimum: list[float]
    infinite: float


@dataclass
class Occupancy:
    """Tokens that lay on the tiers after so many requests. tokens: tier -> one for each of `served`."""

    capacity: dict[str, int]  # tier -> tokens; only tiers that there are
    served: list[int] = field(default_factory=list)
    tokens: dict[str, list[int]] = field(default_factory=dict)

    def sample(self, replay: Replay) -> None:
        self.served.append(replay.num_requests)
        resident = replay.resident_tokens()
        for tier in self.capacity:
            self.tokens.setdefault(tier, []).append(resident[tier])


class Study:
    """hit_rates: of every setting replayed so far. occupancies: of those that were reported.

    advance: is told of the work as it goes on, `num_steps` in all
    """

    def __init__(self, requests: Sequence[TraceRequest], advance: Advance = lambda label, num_requests: None):
        self.requests = requests
        self.advance = advance
        self.num_tokens = sum(request.input_length for request in requests)
        self.hit_rates: dict[Setting, float] = {}
        self.occupancies: dict[Setting, Occupancy] = {}
        self._bounds: dict[int, dict[str, float]] = {}

    def num_steps(self, settings: Sequence[Setting]) -> int:
        """Requests in all replays and optima of these settings together."""
        return len(self.requests) * (len(set(settings)) + len({largest_tokens(setting) for setting in settings}))

    def reports(self, settings: Sequence[Setting]) -> list[dict[str, Any]]:
        """JSON, one for each."""
        return [self._report(setting) for setting in settings]

    def _report(self, setting: Setting) -> dict[str, Any]:
        done, self.occupancies[setting] = self._replay(setting)
        return {"policy": setting.policy, **done.report(), **self.bounds(setting)}

    def curves(self, settings: Sequence[Setting]) -> Curves:
        """Of settings as `around` makes them."""
        capacities = sorted({setting.device_tokens for setting in settings})
        policies = {}
        for policy in dict.fromkeys(setting.policy for setting in settings):
            policies[policy] = [
                self._hit_rate(replace(settings[0], policy=policy, device_tokens=capacity)) for capacity in capacities
            ]
        bounds = [self.bounds(replace(settings[0], device_tokens=capacity)) for capacity in capacities]
        optimum = [bound["optimum_hit_rate"] for bound in bounds]
        return Curves(capacities, policies, optimum, bounds[0]["infinite_hit_rate"])

    def bounds(self, setting: Setting) -> dict[str, float]:
        """What no cache can beat: knowing the future with the largest tier's capacity, and a cache without end."""
        capacity = largest_tokens(setting)
        if capacity not in self._bounds:
            found = offline(self.requests, setting.page_tokens, capacity, setting.num_namespaces)
            self._bounds[capacity] = {
                "optimum_hit_rate": found.optimum / self.num_tokens,
                "infinite_hit_rate": found.infinite / self.num_tokens,
            }
            self.advance(f"optimum, {capacity:,} tokens", len(self.requests))
        return self._bounds[capacity]

    def _hit_rate(self, setting: Setting) -> float:
        if setting not in self.hit_rates:
            self._replay(setting)
        return self.hit_rates[setting]

    def _replay(self, setting: Setting) -> tuple[Replay, Occupancy]:
        replay = Replay(setting)
        occupancy = Occupancy({tier: tokens for tier, tokens in replay.capacity_tokens().items() if tokens})
        occupancy.sample(replay)
        stride = -(-len(self.requests) // SAMPLES)
        for first in range(0, len(self.requests), stride):
            some = self.requests[first : first + stride]
            for request in some:
                replay.request(request)
            occupancy.sample(replay)
            self.advance(f"{setting.policy}, {setting.device_tokens:,} tokens", len(some))
        self.hit_rates[setting] = replay.hit_rate()
        return replay, occupancy


def around(settings: Sequence[Setting]) -> list[Setting]:
    """The policies of these settings and the baseline, on devices of octaves around theirs, none less than a page."""
    policies = dict.fromkeys([*(setting.policy for setting in settings), BASELINE])
    given = settings[0]
    capacities = [int(given.device_tokens * 2.0**octave) for octave in OCTAVES]
    return [
        replace(given, policy=policy, device_tokens=capacity)
        for capacity in capacities
        if capacity >= given.page_tokens
        for policy in policies
    ]


def largest_tokens(setting: Setting) -> int:
    return max(setting.device_tokens, setting.host_tokens, setting.storage_tokens)
