"""Child processes: seen to end, stopped in order or by force, and never left behind."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from services.launch.child import Child, ChildSpec

FOREVER = "import time; print('started', flush=True); time.sleep(1000)"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + FOREVER
POLITE = """
import signal, sys, time
def end(*_):
    print('drained', flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print('started', flush=True)
time.sleep(1000)
"""
# Starts a grandchild, tells its pid, and waits.
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, '-c', {STUBBORN!r}], stdout=subprocess.DEVNULL)
print('started', child.pid, flush=True)
time.sleep(1000)
"""
# What `diptych up` is to its children, as a process of its own that a test can kill.
SUPERVISOR = """
import sys, time
from services.launch.child import Child, ChildSpec
async def ready(): return True
child = Child(ChildSpec('child', (sys.executable, '-c', 'import time; time.sleep(1000)')), ready)
child.start()
print(child.pid, flush=True)
time.sleep(1000)
"""


async def always_ready() -> bool:
    return True


def python(code: str, log: Path | None = None, **environment: str) -> Child:
    return Child(ChildSpec("child", (sys.executable, "-c", code), environment, log), always_ready)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.02)


async def started(child: Child) -> list[str]:
    """Start it and wait for its first line; the words of that line."""
    child.start()
    await until(lambda: "started" in child.log_tail())
    return child.log_tail().splitlines()[0].split()


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def start_supervisor() -> tuple[subprocess.Popen[str], int]:
    """The supervisor's process, and its child's id."""
    supervisor = subprocess.Popen([sys.executable, "-c", SUPERVISOR], stdout=subprocess.PIPE, text=True)
    assert supervisor.stdout is not None
    return supervisor, int(supervisor.stdout.readline())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "child.log"


async def test_the_exit_code_is_what_the_process_returned() -> None:
    child = python("raise SystemExit(7)")
    child.start()
    assert await child.wait() == 7
    assert child.pid is None


async def test_a_signal_is_a_negative_exit_code(log: Path) -> None:
    child = python(FOREVER, log)
    await started(child)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    assert await child.wait() == -signal.SIGKILL


async def test_a_child_can_be_started_again(log: Path) -> None:
    child = python("print('life')", log)
    for _ in range(2):
        child.start()
        assert await child.wait() == 0
    assert child.log_tail() == "life\nlife"


async def test_the_log_holds_output_and_errors_and_its_tail_is_short(log: Path) -> None:
    child = python("import sys\nfor n in range(100): print(n)\nsys.stdout.flush(); sys.exit('the end')", log)
    child.start()
    assert await child.wait() == 1
    assert child.log_tail(lines=3) == "98\n99\nthe end"


async def test_the_environment_is_ours_plus_its_own(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INHERITED", "yes")
    child = python("import os; print(os.environ['INHERITED'], os.environ['OWN'])", log, OWN="too")
    child.start()
    assert await child.wait() == 0
    assert child.log_tail() == "yes too"


async def test_ps_shows_exactly_the_command(log: Path) -> None:
    child = python(FOREVER, log)
    await started(child)
    assert psutil.Process(child.pid).cmdline() == [sys.executable, "-c", FOREVER]
    child.kill()


async def test_stop_lets_the_child_finish(log: Path) -> None:
    child = python(POLITE, log)
    await started(child)
    await child.stop(grace_s=30)
    assert child.log_tail() == "started\ndrained"
    assert child.pid is None


async def test_stop_kills_a_child_that_does_not_end(log: Path) -> None:
    child = python(STUBBORN, log)
    await started(child)
    pid = child.pid
    assert pid is not None
    await child.stop(grace_s=0.1)
    assert not psutil.pid_exists(pid)


async def test_a_cancelled_stop_kills_at_once(log: Path) -> None:
    child = python(STUBBORN, log)
    await started(child)
    pid = child.pid
    assert pid is not None
    stopping = asyncio.create_task(child.stop(grace_s=1000))
    await asyncio.sleep(0.1)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert not psutil.pid_exists(pid)


async def test_stopping_twice_and_stopping_the_never_started_is_fine(log: Path) -> None:
    child = python(FOREVER, log)
    await child.stop()
    await started(child)
    await child.stop()
    await child.stop()
    assert child.pid is None


@pytest.mark.parametrize("end", ["stop", "crash"])
async def test_what_the_child_started_ends_with_it(end: str, log: Path) -> None:
    child = python(PARENT, log)
    _, grandchild = await started(child)
    assert psutil.pid_exists(int(grandchild))
    if end == "stop":
        await child.stop()
    else:
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await child.wait()
    await until(lambda: is_gone(int(grandchild)))


async def test_no_child_survives_the_kill_of_its_parent() -> None:
    supervisor, child = start_supervisor()
    assert psutil.pid_exists(child)
    supervisor.kill()
    supervisor.communicate()
    await until(lambda: is_gone(child))
