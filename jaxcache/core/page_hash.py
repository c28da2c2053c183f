"""Namespaces and chained page keys.

A page key is a content address: sha256 over (key of the page before it, the page's tokens), and the chain starts at
the namespace digest. Equal keys mean the same namespace and the same tokens from the start. 256-bit and
cryptographic, because a collision would hand one tenant's pages to another.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxcache.core.prefix_cache import PrefixCache

PUBLIC_FIELDS = ("adapter", "model", "page_layout", "weights_version")


class Namespace:
    """What a token sequence means: model, weights version, dtype and page layout, adapter, tenant salt, extra keys.

    Two namespaces never share a page on any tier. Made by `new_namespace`, valid only in the cache that made it.

    private: the fields that are not in PUBLIC_FIELDS: who may know that a page is there (tenant, tenant_salt, any key
             that was invented). Their values are never printed, and two namespaces that differ in one of them learn
             nothing of each other.
    """

    __slots__ = ("checksum", "digest", "fields", "owner", "private", "retired")

    def __init__(self, owner: PrefixCache, fields: Mapping[str, str]):
        self.owner = owner
        self.fields = dict(sorted(fields.items()))
        self.digest = namespace_digest(self.fields)
        self.checksum = int.from_bytes(self.digest[:8], "little")  # for the digest of decisions
        self.private = {name: value for name, value in self.fields.items() if name not in PUBLIC_FIELDS}
        self.retired = False

    def __repr__(self) -> str:
        """Of private fields only the names. Nothing of the digest either, which tells whether a guessed salt is right:
        12 hex digits are enough to try out a dictionary of salts far from the cache.
        """
        parts = [f"{name}=..." if name in self.private else f"{name}={value!r}" for name, value in self.fields.items()]
        return f"Namespace({', '.join(parts)})"


def namespace_digest(fields: Mapping[str, str]) -> bytes:
    """32 bytes that differ whenever any field does: names and values are length-prefixed."""
    digest = sha256(b"jaxcache namespace 1")
    for name, value in sorted(fields.items()):
        for part in (name.encode(), value.encode()):
            digest.update(len(part).to_bytes(8, "little"))
            digest.update(part)
    return digest.digest()


def chain(parent_key: bytes, token_bytes, page_bytes: int) -> list[bytes]:
    """Keys of consecutive whole pages (int32 token bytes) that follow `parent_key`."""
    view = memoryview(token_bytes)
    keys = []
    key = parent_key
    for start in range(0, len(view) - page_bytes + 1, page_bytes):
        digest = sha256(key)
        digest.update(view[start : start + page_bytes])
        key = digest.digest()
        keys.append(key)
    return keys
