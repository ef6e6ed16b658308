"""A child gets the chosen signal when its parent is killed."""

import signal
import subprocess
import sys

import pytest

CHILD = """
import signal, sys
def tell(number, _):
    print(signal.Signals(number).name, flush=True)
    sys.exit()
for name in ("SIGTERM", "SIGUSR1"):
    signal.signal(signal.Signals[name], tell)
print("started", flush=True)
signal.pause()
"""
PARENT = """
import signal, subprocess, sys
from services.core.parent_death import dying_with_parent
command = [sys.executable, "-c", sys.argv[2]]
subprocess.run(dying_with_parent(command, signal.Signals[sys.argv[1]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
@pytest.mark.parametrize("death_signal", ["SIGTERM", "SIGUSR1"])
def test_the_child_of_a_killed_parent_gets_the_chosen_signal(death_signal: str) -> None:
    command = [sys.executable, "-c", PARENT, death_signal, CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        parent.send_signal(signal.SIGKILL)
        # The pipe ends when the child, which shares it, has ended.
        assert parent.stdout.read() == f"{death_signal}\n"
