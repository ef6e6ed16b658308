"""CRC32C of any buffer."""

import ctypes

import google_crc32c
import numpy as np


def crc32c(buffer: bytes | memoryview) -> int:
    """Without a copy: google_crc32c takes no views, but it takes a ctypes array at the same address."""
    if isinstance(buffer, bytes) or not len(buffer):
        return int(google_crc32c.value(bytes(buffer)))
    address = np.frombuffer(buffer, np.uint8).ctypes.data
    return int(google_crc32c.value((ctypes.c_char * len(buffer)).from_address(address)))
