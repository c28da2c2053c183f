"""The kinds of decisions that enter the digest, and what their numbers say: for the report when ranks differ.

Every call that changes the core notes one, but for a `grow` that needs no page, whose tokens are noted when they come:
who, how much, and, where content comes in (a namespace, a prompt, generated tokens), a checksum of it, so that ranks
which were given different content differ in the digest of the same step. What is published later has been noted before.
"""

from __future__ import annotations

from collections.abc import Callable

from xxhash import xxh3_64_intdigest

checksum: Callable[..., int] = xxh3_64_intdigest  # of bytes; against accidents, not against attackers

_TRANSFER = ("transfer", "pages", "moves")
# name: what its numbers say, at most five. The place in this table is what enters the digest.
NUMBERS: dict[str, tuple[str, ...]] = {
    "namespace": ("namespace checksum", "node"),
    "retire": ("namespace checksum", "namespaces left"),
    "admit": ("lease", "cached tokens", "namespace checksum", "content checksum", "new tokens"),
    "grow": ("lease", "computed tokens", "new tokens"),
    "extend": ("lease", "tokens", "checksum of the new tokens"),
    "extend_all": ("sequences", "checksum of their leases", "checksum of the new tokens"),
    "insert": ("lease", "published tokens", "node", "computed tokens", "sum of states' positions"),
    "options": ("lease", "priority", "retained steps"),
    "duplicates": ("lease", "pages given back"),
    "release": ("lease",),
    "prefetch": ("transfer", "end", "namespace checksum", "content checksum"),
    "leave": ("transfer", "tickets left"),
    "stored": ("transfer",),
    "fetched": ("transfer", "agreed end", "pages left"),
    "cancel": ("transfer",),
    "quiet": ("transfer",),
    "reset": (),
    "forget_device": (),
    "attach": ("checksum of the kind",),
    "detach": (),
    "cleared": (),
    "policies": ("prefetch policy", "write policy"),
    "restore": ("nodes", "checksum of the snapshot"),
    "BACKUP": _TRANSFER,
    "LOAD_BACK": _TRANSFER,
    "STORE": _TRANSFER,
    "QUERY": _TRANSFER,
    "FETCH": _TRANSFER,
}
CODES = {name: code for code, name in enumerate(NUMBERS)}
