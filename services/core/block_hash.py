"""The identity of a KV block: a keyed BLAKE2b-128 chain.

A block's hash covers its parent's hash, its own token ids and, through the root, everything that
changes the numbers in it: model, weights revision, quantisation, KV dtype, block size and the
tenant's salt. Two blocks with the same hash hold the same KV, on any worker of any cluster.

    root  = H(model, revision, quantization, kv_dtype, block_size, salt)
    hash0 = H(key=root, tokens 0..15)      hash1 = H(key=hash0, tokens 16..31)   ...

Only full blocks have a hash.
"""

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import NamedTuple

import msgspec

HASH_BYTES = 16


class ChainLink(NamedTuple):
    """A block's hash and that of the block before it."""

    hash: bytes
    parent: bytes  # empty: the block is the first of its chain


class Compatibility(msgspec.Struct, frozen=True, kw_only=True):
    """What two workers must share before KV may move between them. Never a software version."""

    model: str
    revision: str  # digest of the weights
    quantization: str = "none"
    kv_dtype: str = "float32"
    block_size: int = 16  # tokens
    layout: str  # e.g. "block-major/30x2x3x64": layers x (k,v) x kv heads x head dim
    wire_version: int = 2

    def differences(self, other: "Compatibility") -> list[str]:
        """'name: ours != theirs' for every field that keeps KV from moving between the two. Block sizes
        may differ: the receiver re-cuts."""
        return [
            f"{name}: {getattr(self, name)} != {getattr(other, name)}"
            for name in self.__struct_fields__
            if name != "block_size" and getattr(self, name) != getattr(other, name)
        ]

    @property
    def transferable(self) -> "Compatibility":
        """The same for all workers that KV may move between."""
        return msgspec.structs.replace(self, block_size=0)


def chain_root(compatibility: Compatibility, salt: str = "") -> bytes:
    """The parent of every first block. `salt` separates tenants: different salts share nothing."""
    c = compatibility
    identity = [c.model, c.revision, c.quantization, c.kv_dtype, str(c.block_size), c.layout, salt]
    encoded = b"".join(len(part.encode()).to_bytes(4, "little") + part.encode() for part in identity)
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES, person=b"diptych-root").digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The hash of one full block of token ids, given its parent's hash (or the root)."""
    ids = array("i", tokens)  # little-endian int32 on every platform we support
    return hashlib.blake2b(ids.tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def chain_hashes(tokens: Sequence[int], block_size: int, root: bytes) -> list[bytes]:
    """The hashes of all full blocks of `tokens`, in order."""
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parent = block_hash(parent, tokens[start : start + block_size])
        hashes.append(parent)
    return hashes


def shared_blocks(one: Sequence[bytes], other: Sequence[bytes]) -> int:
    """How many leading blocks two chains have in common. Equal hashes have equal ones before them."""
    blocks = range(min(len(one), len(other)))
    return bisect_left(blocks, True, key=lambda block: one[block] != other[block])
