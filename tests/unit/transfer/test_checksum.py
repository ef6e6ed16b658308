import google_crc32c
import pytest

from services.transfer.checksum import crc32c


@pytest.mark.parametrize("size", [0, 1, 7, 4096, 100_003])
def test_a_view_has_the_checksum_of_its_bytes(size: int) -> None:
    data = bytes(index * 7 % 256 for index in range(size + 3))
    expected = google_crc32c.value(data[3:])
    assert crc32c(data[3:]) == expected
    assert crc32c(memoryview(data)[3:]) == expected
    assert crc32c(memoryview(bytearray(data))[3:]) == expected
