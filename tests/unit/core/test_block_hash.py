"""Block identity: equal content has equal hashes everywhere, anything that changes the KV changes them."""

import pytest

from services.core.block_hash import Compatibility, chain_hashes, chain_root

BASE = {"model": "m", "revision": "r", "layout": "l"}


def chain(tokens: list[int], salt: str = "", **changes: object) -> list[bytes]:
    compatibility = Compatibility(**{**BASE, **changes})  # type: ignore[arg-type]
    return chain_hashes(tokens, 4, chain_root(compatibility, salt))


def test_only_full_blocks_have_a_hash() -> None:
    assert [len(chain(list(range(n)))) for n in (0, 3, 4, 7, 8)] == [0, 0, 1, 1, 2]


def test_a_chain_is_a_prefix_of_the_chain_of_a_longer_prompt() -> None:
    assert chain(list(range(12)))[:2] == chain(list(range(8)))


def test_the_same_block_after_another_prefix_is_another_block() -> None:
    assert chain([1, 2, 3, 4, 9, 9, 9, 9])[1] != chain([4, 3, 2, 1, 9, 9, 9, 9])[1]


@pytest.mark.parametrize(
    "change",
    [
        {"model": "x"},
        {"revision": "x"},
        {"quantization": "int8"},
        {"kv_dtype": "float16"},
        {"block_size": 32},
        {"layout": "x"},
        {"salt": "x"},
    ],
)
def test_whatever_changes_the_kv_changes_the_hash(change: dict[str, object]) -> None:
    assert chain([1, 2, 3, 4], **change) != chain([1, 2, 3, 4])  # type: ignore[arg-type]


def test_the_hash_is_the_same_on_every_machine_and_version() -> None:
    assert chain([1, 2, 3, 4])[0].hex() == "1505fc5ffbc3f7fda3aa944cf2d96189"
