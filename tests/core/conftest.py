"""Spines that fit the small caches of these tests: every check looks at each of a tier's pages."""

from __future__ import annotations

import pytest

from jaxcache.core.kinds import spine


@pytest.fixture(autouse=True, scope="module")
def small_spines():
    patch = pytest.MonkeyPatch()
    patch.setattr(spine, "SPINE_PAGES", 1 << 9)
    yield
    patch.undo()
