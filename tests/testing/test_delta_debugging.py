"""ddmin finds a part of which nothing can be left out."""

from __future__ import annotations

import random

import pytest

from jaxcache.testing.simulation_failure import ddmin


@pytest.mark.parametrize(
    "needed", [{7}, {0, 99}, {3, 4, 50}, set(range(0, 100, 10)), {0, 1, 2, 3, 97, 98, 99}], ids=len
)
def test_exactly_what_is_needed_is_left(needed):
    assert ddmin(range(100), lambda part: needed <= set(part)) == sorted(needed)


def test_what_is_left_has_one_element_less_only_where_that_passes():
    """Of failures that are not monotonic: no single element can be left out."""
    rng = random.Random(0)
    for _ in range(50):
        weights = [rng.randrange(20) for _ in range(30)]
        bound = sum(weights) // 3

        def fails(part, weights=weights, bound=bound):
            return sum(weights[i] for i in part) % 37 > 18 or sum(weights[i] for i in part) > bound

        if not fails(range(30)):
            continue
        rest = ddmin(range(30), fails)
        assert fails(rest)
        assert len(rest) == 1 or not any(fails(rest[:i] + rest[i + 1 :]) for i in range(len(rest)))


def test_it_stops_when_it_may_not_try_any_more():
    tries = iter([True] * 5)
    rest = ddmin(range(100), lambda part: 50 in part, lambda: next(tries, False))
    assert 50 in rest
    assert 1 < len(rest) < 100


def test_nothing_at_all_is_tried_first():
    tried = []
    assert ddmin(range(100), lambda part: tried.append(part) or True) == []
    assert tried == [[]]


def test_a_single_element_is_not_tried_alone():
    tried = []
    assert ddmin([1], lambda part: bool(tried.append(part))) == [1]
    assert tried == [[]]
