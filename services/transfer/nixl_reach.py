"""Between which machines NIXL reads one-sidedly.

UCX reads another process's memory directly with the kernel's help (same machine, same process
namespace) or with RDMA. Without either it would emulate the read over TCP: that takes the source's
processor as gRPC does, is not faster (1.3 GB/s against 1.4), proves nothing about the bytes, and a
source that was stopped while its reader left is ended by UCX ("Fatal: Endpoint timeout") when it goes on.
So there gRPC is used.
"""

import os
from contextlib import suppress
from pathlib import Path

import msgspec

_RDMA_DEVICES = Path("/sys/class/infiniband")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PROCESSES = "/proc/self/ns/pid"


class Reach(msgspec.Struct, frozen=True):
    machine: str  # equal for processes whose memory the kernel copies between; may be empty
    rdma: bool

    def obstacle(self, other: "Reach") -> str:
        """Why neither can read the other one-sidedly, or nothing."""
        if (self.machine and self.machine == other.machine) or (self.rdma and other.rdma):
            return ""
        return "no RDMA on both sides, and not the same machine"


def reach_from_here() -> Reach:
    machine = ""
    with suppress(OSError):
        machine = f"{_BOOT_ID.read_text().strip()}/{os.readlink(_PROCESSES)}"
    return Reach(machine, _RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir()))
