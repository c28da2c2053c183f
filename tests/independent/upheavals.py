"""What happens seldom and to everything at once: new weights, reset, a lost device, storage that comes and goes."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

from jaxcache.types import PrefetchPolicy, WritePolicy
from tests.independent.content import demand
from tests.independent.plane import Storage
from tests.independent.pledges import Pledges
from tests.independent.setting import Setting
from tests.independent.world import World

AT_RUN_TIME = tuple(policy for policy in WritePolicy if policy is not WritePolicy.WRITE_BACK)


class Upheavals:
    """spaces: the namespaces that requests come in, one entry of each for each rank."""

    def __init__(self, world: World, setting: Setting, pledges: Pledges, rng: Random, seen: Counter[str]):
        self.world = world
        self.setting = setting
        self.pledges = pledges
        self.rng = rng
        self.seen = seen
        self.storages: list[Storage] = []
        self._version = 0
        self.spaces = [self._new_space() for _ in range(rng.choice((1, 2, 3)))]
        if setting.has_storage and world.first.has_host:
            self._attach()

    def happen(self) -> None:
        """One of them."""
        rng = self.rng
        dice = rng.random()
        if dice < 0.25:
            self._retire()
        elif dice < 0.4:
            self._reset()
        elif dice < 0.55:
            self.world.forget_device()
            self.pledges.void()
            self.seen["lost devices"] += 1
        elif dice < 0.7:
            self._change_policies()
        elif self.world.core.attachment.attached:
            self._detach_or_clear()
        elif self.world.first.has_host and self.setting.has_storage:
            self._attach()

    def strike(self) -> None:
        """What must wait for quiet, while something is being read from storage."""
        if self.rng.random() < 0.6 or not self.world.core.attachment.attached:
            self._reset()
        else:
            self._detach_or_clear()

    def _reset(self) -> None:
        for request in list(self.world.running.values()):
            self.world.release(request)
        self.world.all("reset", lambda rank: rank.core.reset())
        self.pledges.void()
        self.seen["resets"] += 1

    def _change_policies(self) -> None:
        first, rng = self.world.first, self.rng
        if rng.random() < 0.7:
            policy = rng.choice(tuple(PrefetchPolicy))
            self.world.all("change", lambda rank: rank.core.attachment.change(policy, None), policy)
        elif first.has_host and first.write_policy is not WritePolicy.WRITE_BACK:
            policy = rng.choice(AT_RUN_TIME)
            self.world.all("change", lambda rank: rank.core.attachment.change(None, policy), policy)

    # ---- namespaces

    def _new_space(self) -> list[Any]:
        self._version += 1
        tenant = self.rng.choice(self.setting.tenants)
        fields = {"weights_version": str(self._version), **({"tenant": tenant} if tenant else {})}
        return self.world.namespaces(fields)

    def _retire(self) -> None:
        """Old weights go: the same fields are refused from now on, and in the next version nothing can be found."""
        world, place = self.world, self.rng.randrange(len(self.spaces))
        old = self.spaces[place]
        world.call("retire_namespace", old)
        for rank, namespace in zip(world.ranks, old, strict=True):
            rank.core.retire_namespace(namespace)
        world.alike([None] * len(old))
        self.pledges.void(old[0].digest)
        self.seen["retirements"] += 1
        fields = old[0].fields
        world.refused("retired fields", (ValueError,), lambda i, rank: rank.core.new_namespace(**fields))
        self.spaces[place] = new = self._new_space()
        survey = world.first.roots()
        children = [root.children for root, digest, is_live in survey if is_live and digest == new[0].digest]
        demand(children == [{}], "match", "a new namespace has what was retired:", children)

    # ---- storage

    def _attach(self) -> None:
        """The storage of before, or another one."""
        world = self.world
        if not self.storages or self.rng.random() < 0.3:
            self.storages = [{} for _ in world.ranks]
        world.all("attach", lambda rank: rank.core.attachment.attach("dictionary"))
        for rank, storage in zip(world.ranks, self.storages, strict=True):
            rank.plane.storage = storage
        self.seen["attached"] += 1

    def _detach_or_clear(self) -> None:
        if self.rng.random() < 0.5:
            self.world.all("detach", lambda rank: rank.core.attachment.detach())
            for rank in self.world.ranks:
                rank.plane.storage = None
            self.seen["detached"] += 1
        else:
            self.world.all("cleared", lambda rank: rank.core.attachment.cleared())
            for storage in self.storages:
                storage.clear()
            self.seen["cleared"] += 1
