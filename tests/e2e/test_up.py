"""`diptych up` as a person meets it: one command, a real model, an answer, a clean end."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest
from redis import Redis
from redis.exceptions import AuthenticationError

from kernels.cpu.core_slots import SLOT_BYTES
from services.core.errors import PeerRefused
from services.core.worker_report import WorkerReport
from services.launch.cluster_state import ClusterState, read_state
from services.membership.redis_membership import RedisMembership
from services.wire.channel import TCP
from services.wire.control import set_role
from tests.support.kernels import share_kernels


class Up:
    """A running `diptych up`."""

    def __init__(self, home: Path, model: Path) -> None:
        self.environment = {**os.environ, "DIPTYCH_HOME": str(home)}
        command = [*self.diptych(), "up", "--port", "0", "--blocks", "200", "--model", str(model)]
        self.errors = home / "stderr"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=self.environment
            )
        assert self.process.stdout is not None
        self.ready_line = self.process.stdout.readline()

    @staticmethod
    def diptych() -> list[str]:
        return [sys.executable, "-m", "services.launch.cli"]

    def run(self, *arguments: str, question: str | None = None) -> str:
        command = [*self.diptych(), *arguments]
        finished = subprocess.run(
            command, input=question, capture_output=True, text=True, env=self.environment, timeout=120
        )
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def children(self) -> dict[str, psutil.Process]:
        """By what they are: prefill, decode, gateway, valkey."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            line = " ".join(child.cmdline())
            for name in (
                "--role prefill",
                "--role decode",
                "diptych gateway",
                "cli gateway",
                "valkey-server",
            ):
                if name in line:
                    found[name.split()[-1].removesuffix("-server")] = child
        return found


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true within 60 s"
        time.sleep(0.05)


def runs(process: psutil.Process) -> bool:
    """An ended process that its new parent has not collected yet does not run."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("home")
    share_kernels(home)
    return home


@pytest.fixture(scope="module")
def up(home: Path, default_model: Path) -> Iterator[Up]:
    running = Up(home, default_model)
    yield running
    running.process.kill()
    running.process.communicate()


def state(home: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterState | None:
    monkeypatch.setenv("DIPTYCH_HOME", str(home))
    return read_state()


def test_the_one_line_on_stdout_is_the_api(up: Up, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = state(home, monkeypatch)
    assert found is not None
    assert up.ready_line == f"ready {found.gateway_url}/v1\n"
    assert set(up.children()) == {"prefill", "decode", "gateway", "valkey"}


def test_workers_have_places_of_their_own_among_the_cores_that_they_share(up: Up) -> None:
    children = up.children()
    places = [children[role].cmdline() for role in ("prefill", "decode")]
    (file,) = {place[place.index("--core-slots") + 1] for place in places}
    assert [place[place.index("--core-slot") + 1] for place in places] == ["0", "1"]
    slots = Path(file).read_bytes()
    assert len(slots) == 2 * SLOT_BYTES
    up.run("chat", "Hello", "--max-tokens", "4")
    assert slots != Path(file).read_bytes()


def test_chat_answers_an_argument_and_standard_input(up: Up) -> None:
    assert "Paris" in up.run("chat", "Name the capital of France.", "--max-tokens", "32")
    assert up.run("chat", "--max-tokens", "8", question="Say hello.").strip()


def test_status_shows_both_workers_from_redis_and_from_the_gateway(up: Up) -> None:
    url = up.ready_line.split()[1]
    for source in ([], ["--url", url]):
        table = up.run("status", *source)
        assert "prefill-0" in table
        assert "decode-0" in table


def test_other_users_of_the_machine_find_locked_ports_and_no_secret_on_command_lines(
    up: Up, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = state(home, monkeypatch)
    assert found is not None
    secrets = [found.lock["token"], urlsplit(found.redis_url).password]
    assert all(secrets)
    with pytest.raises(AuthenticationError):
        Redis.from_url(found.redis_url.replace(f":{secrets[1]}@", "")).ping()
    (address,) = {report.address for report in read_reports_of(found) if report.worker_id == "prefill-0"}
    with pytest.raises(PeerRefused):
        asyncio.run(set_role(TCP, address, "prefill-0", "prefill", timeout_s=5.0))
    assert up.run("role", "prefill-0", "prefill") == "prefill-0: prefill -> prefill\n"
    for process in psutil.Process(up.process.pid).children(recursive=True):
        assert not [secret for secret in secrets if secret in " ".join(process.cmdline())]


def read_reports_of(state: ClusterState) -> list[WorkerReport]:
    async def read() -> list[WorkerReport]:
        membership = RedisMembership(state.redis_url)
        try:
            return await membership.workers()
        finally:
            await membership.close()

    return asyncio.run(read())


@pytest.mark.parametrize("part", ["prefill", "decode", "valkey", "gateway"])
def test_a_killed_part_comes_back(up: Up, part: str) -> None:
    victim = up.children()[part]
    lines = up.errors.read_text().count("is ready again")
    victim.kill()
    until(lambda: up.errors.read_text().count("is ready again") > lines)
    assert "exited with code -9; restarting" in up.errors.read_text()
    assert up.children()[part].pid != victim.pid
    assert up.run("chat", "Hello", "--max-tokens", "4").strip()


def test_ctrl_c_stops_everything_and_exits_0(up: Up, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = psutil.Process(up.process.pid).children(recursive=True)
    up.process.send_signal(signal.SIGINT)
    assert up.process.wait(timeout=60) == 0
    assert [process for process in family if runs(process)] == []
    assert state(home, monkeypatch) is None


def test_nothing_survives_the_kill_of_up(tmp_path: Path, default_model: Path) -> None:
    share_kernels(tmp_path)
    up = Up(tmp_path, default_model)
    family = psutil.Process(up.process.pid).children(recursive=True)
    assert len(family) >= 4
    up.process.kill()
    up.process.communicate()
    until(lambda: not any(map(runs, family)))
