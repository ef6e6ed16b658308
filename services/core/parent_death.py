"""Child processes that die with their parent, even when the parent is killed by SIGKILL."""

import os
import signal
import sys

# The child itself asks the kernel for the signal and then becomes the real program, keeping its pid.
# A preexec_fn could do the same but may deadlock when the parent has threads. PR_SET_PDEATHSIG is 1
# and survives exec. The parent may have died before the request, hence the second look.
_DIE_WITH_PARENT_THEN_EXEC = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
if os.getppid() != int(sys.argv[2]):
    sys.exit("the parent is gone")
os.execvp(sys.argv[3], sys.argv[3:])
"""


def dying_with_parent(command: list[str], death_signal: signal.Signals) -> list[str]:
    """`command`, wrapped so that the kernel sends it `death_signal` when this process ends.

    The kernel watches the thread that starts the child: start it from the main thread. Only Linux
    can do this; elsewhere the command is returned as it is.
    """
    if sys.platform != "linux":
        return command
    starter = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT_THEN_EXEC]
    return [*starter, str(int(death_signal)), str(os.getpid()), *command]
