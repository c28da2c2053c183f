"""What makes pages of a snapshot pages of a cache, and how differences are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from jaxcache.components import FieldSpec, FullAttention, RecurrentState, SlidingWindow
from jaxcache.components.base import Component
from jaxcache.core.tree_record import record_of, sources_of
from jaxcache.runtime.snapshot_manifest import Manifest, checked, manifest_of, sealed, unsealed
from tests.core.helpers import PAGE, make_core

KV = FieldSpec("kv", (2, 4, 8), "bfloat16", ("layers", "slots", None))
INDEX = FieldSpec("index", (2, 4), "uint8", ("layers", "slots"))
FULL = FullAttention("full", (KV, INDEX))
WINDOW = SlidingWindow("window", (KV,), window_tokens=10)
COMPONENTS = (FULL, WINDOW)


def manifest(components: tuple[Component, ...] = COMPONENTS) -> Manifest:
    core = make_core(*components)
    core.new_namespace(model="m", tenant_salt="secret")
    record = record_of(core, sources_of(core)[1])
    return manifest_of(components, record, dict.fromkeys(["full", "window"], 0), [], b"tree")


def test_equal_components_of_other_meshes_and_sizes():
    checked(manifest(), COMPONENTS, PAGE)


@pytest.mark.parametrize(
    ("components", "page_tokens", "lines"),
    [
        (COMPONENTS, 8, ["page_tokens: 8 here, 4 in the snapshot"]),
        (
            (FULL,),
            PAGE,
            ["components: ['full'] here, ['full', 'window'] in", "components.window.window_tokens: nothing"],
        ),
        ((WINDOW, FULL), PAGE, ["components: ['window', 'full'] here, ['full', 'window'] in the snapshot"]),
        (
            (FULL, replace(WINDOW, window_tokens=11)),
            PAGE,
            ["components.window.window_tokens: 11 here, 10 in the snapshot"],
        ),
        (
            (FullAttention("full", (INDEX, KV)), WINDOW),
            PAGE,
            ["components.full.fields: ['index', 'kv'] here, ['kv', 'index'] in the snapshot"],
        ),
        (
            (FullAttention("full", (replace(KV, dtype="float16", shape=(3, 4, 8)), INDEX)), WINDOW),
            PAGE,
            [
                "components.full.fields.kv.shape: [3, 4, 8] here, [2, 4, 8] in the snapshot",
                "components.full.fields.kv.dtype: 'float16' here, 'bfloat16' in the snapshot",
            ],
        ),
        (
            (FULL, RecurrentState("window", (KV,), chunk_tokens=2)),
            PAGE,
            [
                "components.window.kind: 'RecurrentState' here, 'SlidingWindow' in the snapshot",
                "components.window.chunk_tokens: 2 here, nothing in the snapshot",
                "components.window.window_tokens: nothing here, 10 in the snapshot",
            ],
        ),
    ],
    ids=["page", "missing", "order", "window", "order-of-fields", "field", "kind"],
)
def test_every_difference_is_named(components, page_tokens, lines):
    with pytest.raises(ValueError, match=r"cannot restore the snapshot \(made by jaxcache") as error:
        checked(manifest(), components, page_tokens)
    told = str(error.value).splitlines()[1:]
    assert all(any(line in of_one for of_one in told) for line in lines)
    if len(components) == 2:
        assert len(told) == len(lines)


def test_another_format():
    with pytest.raises(ValueError, match="format: 1 here, 2 in the snapshot"):
        checked({**manifest(), "format": 2}, COMPONENTS, PAGE)


def test_private_fields_are_not_in_it():
    assert "secret" not in repr(manifest()) and manifest()["namespaces"] == [{"model": "m"}]


def _without(content: dict[str, Any]) -> Any:
    return {"manifest": content["manifest"]}


def _changed(content: dict[str, Any]) -> Any:
    return {**content, "manifest": {**content["manifest"], "num_tokens": 1}}


@pytest.mark.parametrize(
    ("damage", "match"), [(lambda _: None, "no manifest"), (_without, "no manifest"), (_changed, "is damaged")]
)
def test_a_seal_is_broken(damage, match):
    content = sealed(manifest())
    assert unsealed(content) == manifest()
    with pytest.raises(ValueError, match=match):
        unsealed(damage(content))
