"""The record: a value that says what it is. Owns the bytes of the header; does no I/O and never evaluates anything.

    0      8        12     16             24        56           88               104        4092   4096
    | magic | version | codec | payload_bytes | page key | fingerprint | payload digest | zeros | CRC32 | payload ...

Integers are little-endian. Every bit of the header follows from the key and the payload, so a record is good exactly if
its header equals the one that would be written now: nothing that was read is interpreted before it is trusted.
The digest finds accidents (power loss, bad disks, bugs). It does not stop somebody who may write to the storage.
"""

from __future__ import annotations

import hashlib
import struct
import zlib

import xxhash

from jaxcache.storage.base import FORMAT_VERSION, PAGE_KEY_BYTES, ObjectKey

HEADER_BYTES = 4096
MAGIC = b"jaxcache"
CODEC_RAW = 0

_CLAIM = struct.Struct(f"<8sIIQ{PAGE_KEY_BYTES}s32s")  # everything but the payload digest
_CRC = struct.Struct("<I")
_CRC_AT = HEADER_BYTES - _CRC.size
_PAYLOAD_BYTES = struct.Struct("<Q")
_PAYLOAD_BYTES_AT = 16


def pack_header(key: ObjectKey, payload: memoryview) -> bytes:
    """The header of `payload` (flat bytes) under `key`: HEADER_BYTES bytes."""
    body = (_claim(key, payload.nbytes) + xxhash.xxh3_128_digest(payload)).ljust(_CRC_AT, b"\0")
    return body + _CRC.pack(zlib.crc32(body))


def check(header: bytes | bytearray, key: ObjectKey, payload: memoryview) -> bool:
    """Whether `header` and `payload` (flat bytes) are, bit for bit, what was written under `key`."""
    return header == pack_header(key, payload)


def claimed_bytes(header: bytes | bytearray, key: ObjectKey) -> int | None:
    """The payload bytes that an intact header of `key` speaks of; None if damaged, or of another key or version."""
    if len(header) != HEADER_BYTES or header[_CRC_AT:] != _CRC.pack(zlib.crc32(memoryview(header)[:_CRC_AT])):
        return None
    (payload_bytes,) = _PAYLOAD_BYTES.unpack_from(header, _PAYLOAD_BYTES_AT)
    return payload_bytes if header.startswith(_claim(key, payload_bytes)) else None


def _claim(key: ObjectKey, payload_bytes: int) -> bytes:
    return _CLAIM.pack(MAGIC, FORMAT_VERSION, CODEC_RAW, payload_bytes, key.page_key, _fingerprint(key))


def _fingerprint(key: ObjectKey) -> bytes:
    """32 bytes that stand for the component and the cell, whose names have no fixed length."""
    component = key.component.encode()
    return hashlib.blake2b(
        len(component).to_bytes(4, "little") + component + key.cell.encode(), digest_size=32
    ).digest()
