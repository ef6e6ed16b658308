"""KV keeps its place in the sequence whatever size of blocks it travels in."""

import secrets

import pytest

from services.model.pool_geometry import PoolGeometry
from services.transfer.pool_memory import PoolMemory

TOKENS, FIRST = 26, 12  # of the sequence; the first one that moves, where a block of either size begins


def filled(block_size: int, dtype: str) -> PoolMemory:
    geometry = PoolGeometry(9, layers=2, kv_heads=3, block_size=block_size, head_dim=6, dtype=dtype)
    return PoolMemory(geometry, memoryview(bytearray(secrets.token_bytes(geometry.shared_bytes))))


def of_tokens(memory: PoolMemory, blocks: list[int], start: int, end: int) -> list[bytes]:
    """The bytes of each token."""
    size, tokens = memory.block_size, []
    # A pool of blocks of one token has nothing of any other token between a token's bytes.
    single = filled(1, memory.geometry.dtype)
    for token in range(start, end):
        first = token // size * size
        payload = memory.read([blocks[token // size]])
        single.write_recut([0] * (token + 1), token, token + 1, payload, first, size)
        tokens.append(single.read([0]))
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("theirs", "ours"), [(4, 6), (6, 4), (12, 3), (3, 4)])
def test_each_token_keeps_its_bytes_when_blocks_are_cut_anew(theirs: int, ours: int, dtype: str) -> None:
    source, target = filled(theirs, dtype), filled(ours, dtype)
    source_blocks, target_blocks = [5, 2, 8, 0, 3, 7, 1, 4, 6], [8, 1, 4, 0, 2, 5, 7, 3, 6]
    before = of_tokens(target, target_blocks, 0, FIRST)
    payload = source.read(source_blocks[FIRST // theirs : -(-TOKENS // theirs)])
    target.write_recut(target_blocks, FIRST, TOKENS, payload, FIRST, theirs)
    assert of_tokens(target, target_blocks, FIRST, TOKENS) == of_tokens(source, source_blocks, FIRST, TOKENS)
    assert of_tokens(target, target_blocks, 0, FIRST) == before


def test_a_token_of_8_bits_is_its_codes_and_their_scales() -> None:
    source, single = filled(4, "int8"), filled(1, "int8")
    block = source.read([1])
    single.write_recut([0, 0, 0], 2, 3, block, 0, 4)
    row, width = source.geometry.row_token_bytes * 4, 8
    k = b"".join(block[four * 16 + 2 * 4 : four * 16 + 3 * 4] for four in range(width // 4))
    scale = block[4 * width + 2 * 4 : 4 * width + 3 * 4]
    assert single.read([0])[: width + 4] == k + scale
    v = block[3 * row :][2 * width : 3 * width] + block[3 * row :][4 * width + 8 : 4 * width + 12]
    assert single.read([0])[3 * (width + 4) :][: width + 4] == v
