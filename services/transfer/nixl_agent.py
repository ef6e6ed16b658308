"""One NIXL agent with the UCX backend, over one piece of registered memory.

The Python class of the nixl package fixes the progress thread's pause at zero, which keeps a core busy
for nothing (measured: 100 % of a core per idle agent, against 0.3 % with a pause of 10 ms; the thread
also wakes whenever UCX has something for it). So this class stands on the bindings below it. nixl is
imported here alone, when the first agent is made. UCX's environment is the user's, but for one default.
"""

import ctypes
import importlib
import os
import secrets
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType
from typing import Any, NamedTuple

from services.core.errors import KvLinkLost, TransportUnavailable

# On a CPU every build of nixl serves. The package `nixl` itself would import torch to choose one.
_BUILDS = ("nixl_cu13", "nixl_cu12")
_BACKEND = "UCX"
_PROGRESS_PAUSE_US = 10_000


class Range(NamedTuple):
    """Consecutive bytes of the source's memory and where they go in ours, as offsets."""

    remote: int
    local: int
    bytes: int

    @property
    def remote_end(self) -> int:
        return self.remote + self.bytes

    @property
    def local_end(self) -> int:
        return self.local + self.bytes


class NixlAgent:
    """Not thread-safe, and its calls may take milliseconds: keep it on one thread of its own."""

    def __init__(self, owner: str, memory: memoryview) -> None:
        """Register `memory`. Raises TransportUnavailable if nixl is not here or does not work."""
        self._nixl = load_bindings()
        self.name = f"{owner}/{secrets.token_hex(8)}"
        self._pin = ctypes.c_char.from_buffer(memory)  # keeps the mapping from being closed
        self.address = ctypes.addressof(self._pin)
        self.bytes = memory.nbytes
        try:
            self._native, self._backend = self._start()
        except self._nixl_errors as error:
            raise TransportUnavailable(f"NIXL does not start: {error}") from error

    def metadata(self) -> bytes:
        """What a peer needs to reach this agent's memory."""
        return bytes(self._native.getLocalMD())

    def add_peer(self, metadata: bytes) -> str:
        """The peer's name. Raises KvLinkLost if its memory cannot be reached from here."""
        try:
            name: bytes = self._native.loadRemoteMD(metadata)
        except self._nixl_errors as error:
            raise KvLinkLost(f"NIXL cannot reach the source: {error}") from error
        return name.decode()

    def remove_peer(self, name: str) -> None:
        """Never while a read from it is in flight: its bytes would still land, unseen (measured)."""
        with suppress(*self._nixl_errors):  # it may be gone already
            self._native.invalidateRemoteMD(name)

    def post_read(self, peer: str, peer_address: int, ranges: Sequence[Range]) -> int:
        """Start to read; the handle. Between processes of one machine the bytes are often here when this
        returns. Raises KvLinkLost; then some of the bytes may still be on their way."""
        local = [(self.address + r.local, r.bytes, 0) for r in ranges]
        remote = [(peer_address + r.remote, r.bytes, 0) for r in ranges]
        nixl = self._nixl
        try:
            handle: int = self._native.createXferReq(
                nixl.NIXL_READ,
                nixl.nixlXferDList(nixl.DRAM_SEG, local),
                nixl.nixlXferDList(nixl.DRAM_SEG, remote),
                peer,
                "",
                [self._backend],
            )
            self._check(self._native.postXferReq(handle, ""))
        except self._nixl_errors as error:
            raise _read_failed(error) from error
        return handle

    def is_done(self, handle: int) -> bool:
        """Whether all bytes are in place; the handle is used up then. Raises KvLinkLost like `post_read`."""
        try:
            done = self._check(self._native.getXferStatus(handle))
            if done:
                self._native.releaseXferReq(handle)
        except self._nixl_errors as error:
            raise _read_failed(error) from error
        return done

    def close(self) -> None:
        """Destroy the agent with its connections: afterwards nothing is read into its memory any more."""
        self._native = None

    def _start(self) -> tuple[Any, int]:
        nixl = self._nixl
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.syncMode = nixl.NIXL_THREAD_SYNC_NONE
        config.pthrDelay = _PROGRESS_PAUSE_US
        native = nixl.nixlAgent(self.name, config)
        backend = native.createBackend(_BACKEND, {})
        native.registerMem(nixl.nixlRegDList(nixl.DRAM_SEG, [(self.address, self.bytes, 0, "")]), [backend])
        return native, backend

    def _check(self, status: Any) -> bool:
        if status not in (self._nixl.NIXL_SUCCESS, self._nixl.NIXL_IN_PROG):
            raise KvLinkLost(f"a NIXL read ended with {status}")
        return bool(status == self._nixl.NIXL_SUCCESS)

    @property
    def _nixl_errors(self) -> tuple[type[Exception], ...]:
        """The bindings' exceptions have no common base."""
        return tuple(
            kind
            for name, kind in vars(self._nixl).items()
            if name.startswith("nixl") and name.endswith("Error")
        )


def load_bindings() -> ModuleType:
    """Raises TransportUnavailable, saying what to install."""
    # Else UCX catches SIGHUP for its own debugging, and a worker outlives the terminal it was started in.
    os.environ.setdefault("UCX_DEBUG_SIGNO", "0")
    reason = "the package nixl is not installed (pip install 'diptych[nixl]')"
    for build in _BUILDS:
        try:
            return importlib.import_module(f"{build}._bindings")
        except ModuleNotFoundError as error:
            if error.name != build:
                reason = f"{build} does not load: {error}"
        except ImportError as error:
            reason = f"{build} does not load: {error}"
    raise TransportUnavailable(reason)


def _read_failed(error: Exception) -> KvLinkLost:
    return KvLinkLost(f"a NIXL read failed: {error}")
