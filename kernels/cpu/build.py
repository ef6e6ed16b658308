"""The C++ kernels as a shared library, built by this machine's compiler when it is first needed.

The file's name has a digest of what it is made from: sources, flags and the level of the processor, and $CXX
where that is set. Which compiler was found otherwise does not count: what was built where there was one is
used where there is none. Of processes that start at once one builds, the others wait for it; a finished file
takes its name in one step.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCES = Path(__file__).parent / "source"

# What a processor must have for a level (as in /proc/cpuinfo), and the flags that let the compiler use it.
# The first one that fits is chosen. Processors of another kind than x86-64 have "plain" alone.
LEVELS: dict[str, tuple[frozenset[str], tuple[str, ...]]] = {
    "avx512_vnni": (
        frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "fma"}),
        ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mfma"),
    ),
    "avx_vnni": (
        frozenset({"avx2", "fma", "f16c", "avx_vnni"}),
        ("-mavx2", "-mfma", "-mf16c", "-mavxvnni"),
    ),
    "avx2": (frozenset({"avx2", "fma", "f16c"}), ("-mavx2", "-mfma", "-mf16c")),
    "plain": (frozenset(), ()),
}
_FLAGS = ("-std=c++20", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-Wno-psabi")
COMPILERS = ("c++", "g++", "clang++")
_BUILD_S_MAX = 300.0  # it takes 5 to 10 seconds on one core that nobody else uses
_POLL_S = 0.1


class KernelsUnavailable(Exception):
    """The library cannot be built or loaded here; the message says why and what to do."""


def processor_level() -> str:
    """The best level that this processor has."""
    features = processor_features()
    return next(name for name, (needed, _) in LEVELS.items() if needed <= features)


def build(folder: Path, level: str, on_build: Callable[[], object] = lambda: None) -> Path:
    """The library for `level` in `folder`, built if it is not there: `on_build` is called before that.

    Raises KernelsUnavailable.
    """
    flags = (*_FLAGS, *LEVELS[level][1])
    path = folder / f"diptych-{level}-{_digest(flags)}.so"
    if not path.exists():
        _build_once(compiler(), flags, path, on_build)
    return path


def processor_features() -> frozenset[str]:
    if platform.machine() != "x86_64":
        return frozenset()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return frozenset(flags.partition(":")[2].split())


def compiler() -> str:
    """The path of the C++ compiler: $CXX, or the first that is found. Raises KernelsUnavailable."""
    chosen = os.environ.get("CXX")
    names = (chosen,) if chosen else COMPILERS
    for name in names:
        if path := shutil.which(name):
            return path
    raise KernelsUnavailable(
        f"there is no C++ compiler ({', '.join(names)}). Install one (apt install g++, dnf install gcc-c++), "
        "or set CXX to one"
    )


def _digest(flags: tuple[str, ...]) -> str:
    facts = [os.environ.get("CXX", ""), *flags, platform.machine()]
    for source in sorted(SOURCES.iterdir()):
        facts += [source.name, source.read_text()]
    return hashlib.blake2b("\0".join(facts).encode(), digest_size=8).hexdigest()


def _build_once(program: str, flags: tuple[str, ...], path: Path, on_build: Callable[[], object]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path.parent):
            if not path.exists():
                on_build()
                _compile(program, flags, path)
    except OSError as error:
        raise KernelsUnavailable(
            f"{path} cannot be written ({error}). Make room, or set DIPTYCH_HOME"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While another process builds there, wait for it, but not longer than a build may take."""
    with (folder / ".lock").open("w") as lock:
        deadline = time.monotonic() + _BUILD_S_MAX
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_POLL_S)
        yield


def _compile(program: str, flags: tuple[str, ...], path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as scratch:
        built = Path(scratch) / path.name
        _run([program, *flags, str(SOURCES / "library.cpp"), "-o", str(built)])
        built.replace(path)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_S_MAX)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(
            f"{command[0]} failed ({error}). Install another C++ compiler, or set CXX"
        ) from error
    if done.returncode != 0:
        reason = next(iter(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
        raise KernelsUnavailable(
            f"{command[0]} failed ({reason}). It must know C++20: install a newer one, or set CXX"
        )
