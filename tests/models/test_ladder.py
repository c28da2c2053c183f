"""Whatever a cache brings, no answer changes: cold, warm, reloaded and restarted answer as without one, token by token.

The arms, the prompts and their needles are in `tests/models/ladder.py`. `make ladder` runs all of it, and prints a
table of what each arm found.
"""

from __future__ import annotations

import enum
import functools
import io
import itertools
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from jaxcache import FileStorage, MemoryStorage, PrefetchPolicy, WritePolicy
from models import fetch
from models.decoder import FULL, WINDOW
from models.serve import BatchShape
from tests.models.ladder import (
    CHUNKED,
    FAMILIES,
    ROOT,
    WHOLE,
    Ladder,
    ListeningServer,
    Prompt,
    Submit,
    check_answers,
    climb,
    first_process,
    off,
    one_by_one,
    published,
    read_answers,
    tiny,
    together,
)
from tests.models.serving import Answer, WrongAnswer, check_equal

TIERS = ("device", "host", "storage")
NEAREST = {"warm": "device", "reloaded": "host", "restarted": "storage"}  # tier that an arm finds its prefixes in
WINDOWED = "gpt_oss"
COMPONENTS = (("qwen3", FULL), (WINDOWED, FULL), (WINDOWED, WINDOW))
ONE, EIGHT = (1, 1, 1), (2, 2, 2)
SHAPES = {"chunked": CHUNKED, "whole": WHOLE}


class Found(enum.Enum):
    """What an arm finds, and that some of it comes from its tier."""

    ALL = enum.auto()  # of every prompt all that can be found
    SOME = enum.auto()
    ANY = enum.auto()  # or nothing: what has come by then
    NOTHING = enum.auto()  # from its tier: requests of one arm still share


@dataclass(frozen=True)
class Policy:
    """choices: of CacheConfig. reloaded, restarted: what those arms find"""

    choices: Mapping[str, Any]
    reloaded: Found
    restarted: Found

    def found(self, arm: str) -> Found:
        return {"warm": Found.ALL, "reloaded": self.reloaded, "restarted": self.restarted}[arm]


def timeout(seconds: float) -> dict[str, Any]:
    allowance = {"prefetch_timeout_s": seconds, "prefetch_timeout_s_per_1k_tokens": 0.0}
    return {"prefetch_policy": PrefetchPolicy.TIMEOUT, **allowance}


DEFAULT = Policy({}, Found.ALL, Found.ALL)  # write_through and wait_complete
POLICIES = {
    "no writes": Policy({"write_policy": WritePolicy.NONE}, Found.NOTHING, Found.NOTHING),
    "selective": Policy({"write_policy": WritePolicy.WRITE_THROUGH_SELECTIVE}, Found.SOME, Found.SOME),
    "write back": Policy({"write_policy": WritePolicy.WRITE_BACK}, Found.ALL, Found.ALL),
    "large values": Policy({"storage_unit_pages": None}, Found.ALL, Found.SOME),  # a prompt may part inside one
    "best effort": Policy({"prefetch_policy": PrefetchPolicy.BEST_EFFORT}, Found.ALL, Found.ANY),
    "timeout": Policy(timeout(60.0), Found.ALL, Found.ALL),
    "no time": Policy(timeout(0.0), Found.ALL, Found.ANY),
}


# ---- the arms


@functools.cache
def tiny_off(family: str, mesh: Mesh, shape: BatchShape = CHUNKED) -> list[Answer]:
    return off(tiny(family, mesh, shape))


def check_hits(ladder: Ladder, arms: Mapping[str, list[Answer]], policy: Policy = DEFAULT) -> None:
    """Without hits equal answers would prove nothing."""
    firsts = [i for i, prompt in enumerate(ladder.prompts) if prompt.needle is prompt.document.needles[0]]
    assert all(arms["cold"][i].hits == (0, 0, 0) for i in firsts)
    assert sum_of_hits(arms["cold"], "device") > 0
    for arm, tier in NEAREST.items():
        found = policy.found(arm)
        for prompt, answer in zip(ladder.prompts, arms[arm], strict=True):
            most = ladder.most_cached(prompt)
            assert sum(answer.hits) == most if found is Found.ALL else sum(answer.hits) <= most, f"{arm}, {prompt}"
        from_tier = sum_of_hits(arms[arm], tier)
        assert from_tier == 0 if found is Found.NOTHING else from_tier > 0 or found is Found.ANY, f"{arm} from {tier}"


def sum_of_hits(answers: list[Answer], tier: str) -> int:
    return sum(answer.hits[TIERS.index(tier)] for answer in answers)


@pytest.fixture(scope="module")
def report(request: pytest.FixtureRequest, closing_lines: list[str]):
    """report(ladder, arms, what, ...): a row of the table, which is printed in the end under `pytest -v`."""
    heads = ("model", "mesh", "prefill", "requests", "policy", "tokens", "cold", "warm", "reloaded", "restarted")
    table = Table(*heads, title="prompt tokens, and how many came from device / host / storage", box=None)

    def add(ladder: Ladder, arms: Mapping[str, list[Answer]], *what: str) -> None:
        hits = (" / ".join(f"{sum_of_hits(answers, tier):,}" for tier in TIERS) for answers in arms.values())
        table.add_row(*what, f"{sum(len(prompt.tokens) for prompt in ladder.prompts):,}", *hits)

    yield add
    if request.config.get_verbosity() > 0:
        text = io.StringIO()
        Console(file=text, width=150).print(table)
        closing_lines += text.getvalue().splitlines()


def cases() -> Iterator:
    """Every family in every batching on one device and eight, every policy of every family, all policies on eight.

    Quick: every family once, every policy once, and requests one by one.
    """
    batchings = list(itertools.product(SHAPES, (together, one_by_one)))
    for family in FAMILIES:
        for grid, (shape, submit) in itertools.product((ONE, EIGHT), batchings):
            is_quick = grid == ONE and shape == "chunked" and (submit is together or family == WINDOWED)
            yield case(is_quick, family, grid, shape, submit, "default")
        for policy, submit in itertools.product(POLICIES, (together, one_by_one)):
            yield case(family == WINDOWED and submit is together, family, ONE, "chunked", submit, policy)
    for policy in POLICIES:
        yield case(False, WINDOWED, EIGHT, "chunked", together, policy)


def case(is_quick: bool, family: str, grid: tuple[int, ...], shape: str, submit: Submit, policy: str):
    words = (family, "x".join(map(str, grid)), shape, submit.__name__, policy)
    marks = () if is_quick else pytest.mark.slow
    return pytest.param(family, grid, shape, submit, policy, marks=marks, id="-".join(words).replace("_", " "))


@pytest.mark.parametrize(("family", "grid", "shape", "submit", "policy"), list(cases()))
def test_every_arm_answers_as_without_a_cache(report, tmp_path, make_mesh, family, grid, shape, submit, policy):
    chosen, mesh = POLICIES.get(policy, DEFAULT), make_mesh(*grid)
    ladder = tiny(family, mesh, SHAPES[shape], **chosen.choices)
    arms = climb(ladder, lambda: FileStorage(tmp_path / "storage"), submit)
    check_answers(ladder, arms, tiny_off(family, mesh, SHAPES[shape]))
    check_hits(ladder, arms, chosen)
    report(ladder, arms, family, mesh_name(mesh), shape, submit.__name__.replace("_", " "), policy)


def mesh_name(mesh: Mesh) -> str:
    return " x ".join(map(str, mesh.devices.shape))


def restart_elsewhere(model: str, storage: Path, file: Path) -> list[Answer]:
    """The last arm, by a new process."""
    command = [sys.executable, "-m", "tests.models.ladder", model, str(storage), str(file)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return read_answers(file)


@pytest.mark.slow
@pytest.mark.parametrize("family", [WINDOWED, "gemma3"])
def test_another_process(report, tmp_path, make_mesh, family):
    ladder = tiny(family, make_mesh())
    arms = first_process(ladder, FileStorage(tmp_path / "storage"), one_by_one)
    arms["restarted"] = restart_elsewhere(family, tmp_path / "storage", tmp_path / "answers.npz")
    check_answers(ladder, arms, tiny_off(family, make_mesh()))
    check_hits(ladder, arms)
    report(ladder, arms, family, mesh_name(make_mesh()), "chunked", "one by one", "another process")


# ---- published weights


def check_published(report, tmp_path: Path, name: str, path: Path, mesh: Mesh) -> None:
    """Most codes are told, so a needle that is lost would show; so does another code in storage."""
    ladder = published(path, mesh)
    want = off(ladder)
    told = [str(p.code) in ladder.decode(answer.tokens) for p, answer in zip(ladder.prompts, want, strict=True)]
    assert sum(told) > len(told) / 2, [ladder.decode(answer.tokens) for answer in want]
    arms = first_process(ladder, FileStorage(tmp_path / "storage"), together)
    arms["restarted"] = restart_elsewhere(str(path), tmp_path / "storage", tmp_path / "answers.npz")
    check_answers(ladder, arms, want)
    check_hits(ladder, arms)
    what = f"{name}: {sum(told)} of {len(told)} told"
    report(ladder, arms, what, mesh_name(mesh), "chunked", "together", "another process")
    check_shows(with_another_code(ladder), FULL, "restarted")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2(report, tmp_path, make_mesh):
    check_published(report, tmp_path, "SmolLM2 135M", fetch.fetch(fetch.SMOLLM2), make_mesh())


@pytest.mark.gemma
@pytest.mark.timeout(900)
def test_gemma3_270m(report, tmp_path, make_mesh, gemma3_270m):
    check_published(report, tmp_path, "Gemma 3 270M", gemma3_270m, make_mesh())


# ---- what would show


def recoded(ladder: Ladder, prompt: Prompt) -> Prompt:
    """The same but for the two digits that are asked for."""
    codes = {other.needle.name: other.code for other in ladder.prompts}
    codes[prompt.needle.name] = (prompt.code + 35) % 90 + 10
    return ladder.recode(codes)[ladder.prompts.index(prompt)]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_needle_counts(make_mesh, family):
    """An answer differs where nothing but the code that is asked for does."""
    mesh = make_mesh()
    ladder, want = tiny(family, mesh), tiny_off(family, mesh)
    asked = tuple(recoded(ladder, prompt) for prompt in ladder.prompts)
    for got, miss in zip(off(replace(ladder, prompts=asked)), want, strict=True):
        with pytest.raises(WrongAnswer):
            check_equal(got, miss)
    assert len({tuple(answer.tokens) for answer in want}) > 1


def with_another_code(ladder: Ladder) -> Ladder:
    """One prompt, and the same with another code."""
    return replace(ladder, prompts=(ladder.prompts[0], recoded(ladder, ladder.prompts[0])))


def page_number(ladder: Ladder, prompt: Prompt, component: str) -> int:
    """A page that a hit on the prompt reads: with the code that is asked for, or the last one of the window."""
    token = ladder.most_cached(prompt) - 1 if component == WINDOW else prompt.needle.at
    return token // ladder.choices["page_tokens"]


def page_id(ladder: Ladder, server: ListeningServer, prompt: Prompt, component: str, tier: str) -> int:
    """Where that page of a cached prompt is."""
    core, sequence = server.cache.core, server.cache.sequence(prompt.tokens, server.namespace)
    names = [c.name for c in core.components]
    place = TIERS.index(tier) * len(names) + names.index(component)
    first, wanted = 0, page_number(ladder, prompt, component)
    for node, _ in core.tiers.tree.walk(sequence, sequence.num_tokens - 1):
        stop = node.end // ladder.choices["page_tokens"]
        if wanted < stop:
            return int(node.pages[place][wanted - first])
        first = stop
    raise AssertionError(f"page {wanted} of {prompt.needle} is not cached")


def page_key(ladder: Ladder, server: ListeningServer, prompt: Prompt, component: str) -> bytes:
    wanted = page_number(ladder, prompt, component)
    return server.cache.sequence(prompt.tokens, server.namespace).page_keys(wanted + 1)[wanted]


def spoil_device(ladder: Ladder, component: str, server: ListeningServer) -> None:
    mine, other = (page_id(ladder, server, prompt, component, "device") for prompt in ladder.prompts)
    kv = server.pools[component]["kv"]
    pages = np.array(kv)
    pages[mine] = pages[other]
    server.pools[component] = {"kv": jax.device_put(pages, kv.sharding)}


def spoil_host(ladder: Ladder, component: str, server: ListeningServer) -> None:
    mine, other = (page_id(ladder, server, prompt, component, "host") for prompt in ladder.prompts)
    server.cache.engine.drain()
    for rows in server.cache.engine.effects.host_pools[component].rows.values():
        rows[mine] = rows[other]


def spoil_storage(ladder: Ladder, component: str, server: ListeningServer) -> None:
    """In a storage that checks nothing."""
    mine, other = (page_key(ladder, server, prompt, component) for prompt in ladder.prompts)
    values = server.cache.storage._values
    spoilt = [key for key in values if key.page_key == mine and key.component == component]
    assert spoilt
    for key in spoilt:
        values[key] = values[replace(key, page_key=other)]


SPOILS = {"warm": spoil_device, "reloaded": spoil_host, "restarted": spoil_storage}


def check_shows(ladder: Ladder, component: str, arm: str) -> None:
    """A page of the second prompt takes the place of the first one's: the arm that reads it fails, and none before."""
    spoil, storage, want = functools.partial(SPOILS[arm], ladder, component), MemoryStorage(), off(ladder)
    arms = climb(ladder, lambda: storage, one_by_one, {arm: spoil})
    assert sum_of_hits(arms[arm][:1], NEAREST[arm]) == ladder.most_cached(ladder.prompts[0])
    check_answers(ladder, {name: arms[name] for name in list(arms)[: list(arms).index(arm)]}, want)
    with pytest.raises(WrongAnswer, match=f"{arm}, .*'{ladder.prompts[0].needle.name}'"):
        check_answers(ladder, {arm: arms[arm]}, want)


@pytest.mark.mutation
@pytest.mark.parametrize("arm", SPOILS)
@pytest.mark.parametrize(("family", "component"), COMPONENTS)
def test_a_page_of_another_request_shows(make_mesh, family, component, arm):
    ladder = tiny(family, make_mesh())
    check_shows(replace(ladder, prompts=ladder.prompts[:2]), component, arm)


@pytest.mark.mutation
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_of_another_code_shows(make_mesh, family):
    """Of the same text, but for two digits."""
    ladder = tiny(family, make_mesh())
    check_shows(with_another_code(ladder), FULL, "restarted")
