"""What a snapshot says of itself, read and checked before anything else.

    format, page_tokens, components     must be equal here and there
    versions, namespaces, num_tokens    for people; of namespaces nothing that is private
    num_pages, chunks, tree             what there is, where, and the checksum of the tree

The mesh is not in it: pages are whole (pools/whole_pages.py). Neither are the versions compared: what a page holds is
fixed by its fields and its namespace, whose weights_version is the caller's to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from importlib.metadata import version
from typing import Any

import jax
from xxhash import xxh3_64_hexdigest

from jaxcache import __version__
from jaxcache.components.base import Component
from jaxcache.core.tokens import PUBLIC_FIELDS
from jaxcache.core.tree_record import TreeRecord

FORMAT = 1
COMPARED = ("format", "page_tokens", "components")

Manifest = dict[str, Any]


def manifest_of(
    components: Sequence[Component], record: TreeRecord, num_pages: Mapping[str, int], chunks: Any, tree: bytes
) -> Manifest:
    """chunks: where the pages are, see runtime/snapshot.py; tree: the bytes of the recorded tree"""
    return {
        "format": FORMAT,
        "page_tokens": record.page_tokens,
        "components": [_component(component) for component in components],
        "versions": {"jaxcache": __version__, "jax": jax.__version__, "orbax-checkpoint": version("orbax-checkpoint")},
        "namespaces": [
            {name: value for name, value in of_one.items() if name in PUBLIC_FIELDS} for of_one in record.namespaces
        ],
        "num_tokens": record.num_tokens,
        "num_pages": dict(num_pages),
        "chunks": chunks,
        "tree": xxh3_64_hexdigest(tree),
    }


def _component(component: Component) -> dict[str, Any]:
    """All that it declares, but for its code."""
    declared = {field.name: component.__dict__[field.name] for field in fields(component)}
    declared["fields"] = [dict(spec.__dict__) for spec in component.fields]
    return {"kind": type(component).__name__, **declared}


def checked(manifest: Manifest, components: Sequence[Component], page_tokens: int) -> None:
    """Raises ValueError, naming every difference, unless pages of the snapshot are pages here."""
    here = {"format": FORMAT, "page_tokens": page_tokens, "components": [_component(c) for c in components]}
    ours, theirs = _flat({name: here[name] for name in COMPARED}), _flat({n: manifest.get(n) for n in COMPARED})
    names = dict.fromkeys([*ours, *theirs])
    lines = [
        f"{name}: {ours.get(name, 'nothing')} here, {theirs.get(name, 'nothing')} in the snapshot"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]
    if lines:
        made_by = ", ".join(f"{name} {number}" for name, number in (manifest.get("versions") or {}).items())
        raise ValueError("\n  ".join([f"this cache cannot restore the snapshot (made by {made_by}):", *lines]))


def _flat(value: Any, path: str = "") -> dict[str, str]:
    """{"components.full.fields.kv.dtype": "'float32'"} of nested ones; of a list of what has a name, also their order.
    Tuples and lists of plain values are values."""
    return dict(_walk(json.loads(json.dumps(value)), path))


def _walk(value: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        yield path, repr([entry.get("name") for entry in value])
        value = {entry.get("name"): entry for entry in value}
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _walk(part, f"{path}.{name}" if path else str(name))
    else:
        yield path, repr(value)


def sealed(manifest: Manifest) -> dict[str, Any]:
    """The manifest and its checksum."""
    return {"manifest": manifest, "checksum": checksum(manifest)}


def unsealed(content: Any) -> Manifest:
    """Raises ValueError if it is not what `sealed` made."""
    if not isinstance(content, dict) or set(content) != {"manifest", "checksum"}:
        raise ValueError("it has no manifest")
    if content["checksum"] != checksum(content["manifest"]):
        raise ValueError("its manifest is damaged")
    return content["manifest"]


def checksum(manifest: Manifest) -> str:
    return xxh3_64_hexdigest(json.dumps(manifest, sort_keys=True).encode())
