"""What requests are made of: namespaces, and sequences of tokens with their page keys.

A page key is a content address: sha256 over (key of the page before it, the page's tokens), and the chain starts at
the namespace digest. Equal keys mean the same namespace and the same tokens from the start. 256-bit and
cryptographic, because a collision would hand one tenant's pages to another.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from hashlib import sha256
from sys import byteorder as BYTE_ORDER
from typing import Any, Protocol

import numpy as np

from jaxcache.core.decisions import Decisions, checksum
from jaxcache.core.node import Node
from jaxcache.core.serving import RefusedType, RefusedValue, Serving

INT32 = np.dtype(np.int32)
INT32_MAX = 2**31 - 1
MANY_TOKENS = 4096  # a view takes longer than the sum of fewer
PUBLIC_FIELDS = ("adapter", "model", "page_layout", "weights_version")


class Owner(Protocol):
    """The cache that namespaces and sequences belong to."""

    serving: Serving
    decisions: Decisions


class Namespace:
    """What a token sequence means: model, weights version, dtype and page layout, adapter, tenant salt, extra keys.

    Two namespaces never share a page on any tier. Made by `new_namespace`, valid only in the cache that made it.

    private: the fields that are not in PUBLIC_FIELDS: who may know that a page is there (tenant, tenant_salt, any key
             that was invented). Their values are never printed, and two namespaces that differ in one of them learn
             nothing of each other.
    """

    __slots__ = ("checksum", "digest", "fields", "owner", "private", "retired")

    def __init__(self, owner: Owner, fields: Mapping[str, str]):
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


class Sequence:
    """Tokens as int32 bytes in one namespace.

    prompt_tokens: how many there were at the start; what `extend` adds later is generated text
    found, found_end: what agreed the last time; found_limit, found_version: how far, and the tree's version then
                    (RadixTree.find)
    prefix, match:  what core/match.py made of it; None: not asked yet
    lease_id, num_leases: the last lease that it was admitted under, and how many run now
    uses, cuts:     what the profile of reuse says of its points; where nodes should end because it changes
    """

    __slots__ = (
        "cuts",
        "data",
        "decisions",
        "found",
        "found_end",
        "found_limit",
        "found_version",
        "keys",
        "lease_id",
        "match",
        "namespace",
        "num_leases",
        "num_tokens",
        "page_bytes",
        "prefix",
        "prompt_tokens",
        "root",
        "uses",
    )

    def __init__(self, namespace: Namespace, root: Node, tokens: Any, page_tokens: int, decisions: Decisions):
        self.namespace = namespace
        self.root = root
        self.data: bytes | bytearray = token_bytes(tokens)  # a bytearray from the first extend on
        self.num_tokens = self.prompt_tokens = len(self.data) // 4
        if not self.num_tokens:
            raise ValueError("a sequence needs at least one token")
        self.page_bytes = page_tokens * 4
        self.decisions = decisions
        self.lease_id = self.num_leases = 0
        self.keys: list[bytes] = []
        self.found = root
        self.found_end = 0
        self.found_limit = self.found_version = -1
        self.prefix: Any = None
        self.match: Any = None
        self.uses: list[tuple[int, int, int]] = []
        self.cuts: list[int] = []

    def extend(self, tokens: Any) -> None:
        """Appends generated tokens (list, numpy int array, or jax array on the host).

        Raises ValueError while two leases run on it: each would append its own tokens.
        """
        serving = self.namespace.owner.serving
        if serving.ended is not None:
            serving.check()
        if self.num_leases > 1:
            raise ValueError(
                f"{self.num_leases} leases run on this sequence: each needs a sequence of its own to be extended"
            )
        if type(tokens) is list and len(tokens) == 1 and type(tokens[0]) is int and 0 <= tokens[0] <= INT32_MAX:
            new = tokens[0].to_bytes(4, BYTE_ORDER)  # what every request gets in every step
        else:
            new = token_bytes(tokens)
        if type(self.data) is bytes:
            self.data = bytearray(self.data)
        try:
            self.data += new
            self.num_tokens = num_tokens = len(self.data) // 4
            self.decisions.note("extend", self.lease_id, num_tokens, checksum(new))
        except BaseException as error:  # tokens without their number, or in one process's digest only
            serving.end(error, "extend")
            raise

    def checksum(self, start: int, seed: int) -> int:
        """Of all tokens: of those from `start` on, and of a seed with the node that ends there, which stands for those
        before it: ranks whose decisions are the same have the same tokens up to the node of an id."""
        return checksum(self.data if start < MANY_TOKENS else memoryview(self.data)[start * 4 :], seed)

    def edge(self, start: int, stop: int) -> bytes | memoryview:
        """Token bytes of [start, stop) for a node to keep: a view of the prompt where that wastes no memory, or a copy.

        Never a view of a bytearray, which could not grow any more.
        """
        if isinstance(self.data, bytes) and 2 * (stop - start) >= self.num_tokens:
            return memoryview(self.data)[start * 4 : stop * 4]
        return bytes(self.data[start * 4 : stop * 4])

    @property
    def tokens(self) -> np.ndarray:
        """A copy of the tokens: int32[num_tokens]."""
        return np.frombuffer(bytes(self.data), np.int32)

    def page_keys(self, num_pages: int) -> list[bytes]:
        """Chained keys of the first whole pages; computed once."""
        have = len(self.keys)
        if have < num_pages:
            parent = self.keys[-1] if have else self.namespace.digest
            new = bytes(self.data[have * self.page_bytes : num_pages * self.page_bytes])
            self.keys += chain(parent, new, self.page_bytes)
        assert len(self.keys) >= num_pages, f"{num_pages=} of {self.num_tokens} tokens"
        return self.keys[:num_pages]


def extend_all(core: Owner, sequences: list[Sequence] | tuple[Sequence, ...], tokens: Any) -> None:
    """Appends one token to each sequence; one note for all. Refuses before anything changes.

    What comes out of the tokens when they are read (a model step has failed) comes out here, and serving goes on.
    """
    if core.serving.ended is not None:
        core.serving.check()
    if not isinstance(sequences, (list, tuple)) or not set(map(type, sequences)) <= {Sequence}:
        raise RefusedType("sequences must be a list of Sequence")
    new = token_bytes(tokens)
    if len(new) != 4 * len(sequences):
        raise RefusedValue(f"{len(sequences)} sequences, but {len(new) // 4} tokens")
    for sequence in sequences:
        if sequence.num_leases > 1 or sequence.namespace.owner is not core:
            raise RefusedValue(
                "a sequence belongs to another cache"
                if sequence.namespace.owner is not core
                else f"{sequence.num_leases} leases run on a sequence: each needs one of its own to be extended"
            )
    try:
        _append(core, sequences, new)
    except BaseException as error:
        core.serving.end(error, "extend_all")
        raise


def _append(core: Owner, sequences: list[Sequence] | tuple[Sequence, ...], new: bytes) -> None:
    at = 0
    for sequence in sequences:
        data = sequence.data
        if type(data) is bytes:
            sequence.data = data = bytearray(data)
        data += new[at : at + 4]
        sequence.num_tokens += 1
        at += 4
    ids = np.fromiter([sequence.lease_id for sequence in sequences], np.int64, len(sequences))
    core.decisions.note("extend_all", len(sequences), checksum(ids), checksum(new))


def token_bytes(tokens: Any) -> bytes:
    """Token ids as int32 bytes. TypeError for what is not a flat row of ints, ValueError for an id out of range."""
    if isinstance(tokens, (list, tuple)):
        try:
            ids = array("i", tokens)
        except OverflowError:
            raise RefusedValue(f"token ids must be in [0, {INT32_MAX}], not {_out_of_range(tokens)}") from None
        except TypeError:
            raise RefusedType("token ids must be ints in a flat list, tuple or integer array") from None
        values = np.frombuffer(ids, np.int32) if len(ids) > 64 else ids
        if len(ids) and (values.min() if isinstance(values, np.ndarray) else min(values)) < 0:
            raise RefusedValue(f"token ids must be in [0, {INT32_MAX}], not {_out_of_range(tokens)}")
        return ids.tobytes()
    if type(tokens) is np.ndarray and tokens.dtype is INT32 and tokens.ndim == 1 and len(tokens):
        if tokens[tokens.argmin()] < 0:  # argmin takes two thirds of the time of min
            raise RefusedValue(f"token ids must be in [0, {INT32_MAX}], not {_out_of_range(tokens.tolist())}")
        return tokens.tobytes()
    values = tokens if type(tokens) is np.ndarray else np.asarray(tokens)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise RefusedType(
            f"token ids must be a flat row of ints, not {type(tokens).__name__} {values.shape} {values.dtype}"
        )
    is_int32 = values.dtype == INT32
    if len(values) and (np.minimum.reduce(values) < 0 or (not is_int32 and values.max() > INT32_MAX)):
        raise RefusedValue(f"token ids must be in [0, {INT32_MAX}], not {_out_of_range(values.tolist())}")
    return (values if is_int32 else values.astype(INT32)).tobytes()


def _out_of_range(tokens) -> int:
    return next(token for token in tokens if not 0 <= token <= INT32_MAX)
