"""llama.cpp's server, built for this processor from the sources in a pinned sdist of llama-cpp-python.

The same model file as ours (Q4_1), and others made of it by llama.cpp's own tool: Q8_0 and F32 for rows of
equal precision, and Q4_0, which rounds the weights once more but is what its kernels are fastest with.
"""

import os
import shutil
import sys
import tarfile
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.model.pull import ensure_default_model
from services.store.embedded import free_port
from tests.bench.cpu.client import Target
from tests.bench.cpu.contestant import Family, Precision, Setting, bench_home, shown
from tests.bench.cpu.load import Cell
from tests.bench.cpu.processes import PeerFailed, await_ready, child, fetch, run_step
from tests.bench.cpu.served import Served

VERSION = "0.3.36"
REQUIREMENT = f"llama-cpp-python=={VERSION}"
SOURCES = f"llama_cpp_python-{VERSION}/vendor/llama.cpp/"
TARGETS = ("llama-server", "llama-quantize")
# For this processor, and without what would be fetched from elsewhere.
BUILD_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    *("-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF", "-DLLAMA_USE_PREBUILT_UI=OFF"),
    *("-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF"),
)
START_TIMEOUT_S = 120.0
# The greedy token without what else its chain of samplers does with the whole vocabulary.
GREEDY = {"samplers": ["top_k"], "top_k": 1}
SPARE_TOKENS = 16  # of a slot, beyond what a request needs

Weights = Literal["Q4_1", "Q8_0", "F32", "Q4_0"]
PRECISIONS: dict[Weights, Precision] = {
    "Q4_1": "4 bits",
    "Q8_0": "8 bits",
    "F32": "float32",
    "Q4_0": "4 bits rounded again",
}


def _settings() -> list[Setting]:
    cores = str(len(os.sched_getaffinity(0)))
    threads = ("-t", cores, "-tb", cores)
    flash = ("-fa", "on")
    tried = {
        "flash attention": (*threads, *flash),
        "no flash attention": (*threads, "-fa", "off"),
        "small batches": (*threads, *flash, "-b", "256", "-ub", "256"),
        "large batches": (*threads, *flash, "-b", "4096", "-ub", "2048"),
        "one thread decodes": ("-t", "1", "-tb", cores, *flash),
    }
    return [Setting(name, flags, body=GREEDY) for name, flags in tried.items()]


@dataclass(frozen=True)
class LlamaCpp:
    weights: Weights
    family: Family = "llama.cpp"
    starts_slowly: bool = False

    @property
    def name(self) -> str:
        return f"llama.cpp {self.weights}"

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.weights]

    @property
    def settings(self) -> Sequence[Setting]:
        return _settings()

    def prepare(self) -> None:
        build()
        model_file(self.weights)

    def group(self, cell: Cell) -> Hashable:
        return cell  # slots = concurrency, and the context they need

    @contextmanager
    def open(self, setting: Setting, cells: Sequence[Cell], log: Path) -> Iterator[Served]:
        (cell,) = cells
        port = free_port()
        command = [
            str(program("llama-server")),
            *("-m", str(model_file(self.weights)), "--host", "127.0.0.1", "--port", str(port)),
            *("-np", str(cell.concurrency), "-c", str(cell.concurrency * (cell.shape.tokens + SPARE_TOKENS))),
            *("--cache-ram", "0", "--no-webui"),
            *setting.flags,
        ]
        with child(command, {**os.environ, **setting.environment}, log) as server:
            await_ready(
                server, lambda: fetch(f"http://127.0.0.1:{port}/health") is not None, START_TIMEOUT_S, log
            )
            target = Target(port, "default", dict(setting.body))
            yield Served(target, [server.pid], shown([Path(command[0]).name, *command[1:]], setting))


def program(name: str) -> Path:
    return _home() / "build" / "bin" / name


def build() -> None:
    """About ten minutes on two cores, once. Raises PeerFailed."""
    if all(program(name).is_file() for name in TARGETS):
        return
    log = _home() / "build.log"
    print(f"llama.cpp is built in {_home()} (once, about ten minutes on two cores)", file=sys.stderr)
    _unpack(log)
    cmake, ninja = _tool("cmake", log), _tool("ninja", log)
    where = ("-S", str(_home() / "source"), "-B", str(_home() / "build"))
    generator = ("-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}")
    run_step("configure", [cmake, *where, *generator, *BUILD_OPTIONS], log)
    run_step("build", [cmake, "--build", str(_home() / "build"), "--target", *TARGETS], log)


def model_file(weights: Weights) -> Path:
    """Q4_1: ours. Others are made of it, so that all contestants compute one model. Raises PeerFailed."""
    original = ensure_default_model()
    if weights == "Q4_1":
        return original
    made = bench_home() / "models" / f"SmolLM2-135M-Instruct.{weights}.gguf"
    if not made.is_file():
        if not program("llama-quantize").is_file():
            raise PeerFailed(f"{made.name} is made by llama.cpp's tool, which is not built")
        made.parent.mkdir(parents=True, exist_ok=True)
        partial = made.with_suffix(".partial")
        command = [str(program("llama-quantize")), "--allow-requantize", str(original), str(partial), weights]
        run_step(f"make {weights}", command, _home() / "quantize.log")
        partial.replace(made)
    return made


def _home() -> Path:
    return bench_home() / f"llama.cpp-{VERSION}"


def _unpack(log: Path) -> None:
    """The sources; `.whole` says that they are all there."""
    source = _home() / "source"
    if (source / ".whole").exists():
        return
    sdist = bench_home() / "sdist" / f"llama_cpp_python-{VERSION}.tar.gz"
    if not sdist.is_file():
        sdist.parent.mkdir(parents=True, exist_ok=True)
        # With build isolation: pip looks at the package's metadata, which its build backend makes.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", REQUIREMENT]
        run_step("download", [*pip, "-d", str(sdist.parent)], log)
    shutil.rmtree(source, ignore_errors=True)
    with tarfile.open(sdist) as archive:
        for member in archive:
            if member.name.startswith(SOURCES):
                member.name = member.name.removeprefix(SOURCES)
                archive.extract(member, source, filter="data")
    (source / ".whole").touch()


def _tool(name: str, log: Path) -> str:
    """cmake or ninja: the machine's, or from PyPI in a venv of its own."""
    found = shutil.which(name)
    if found:
        return found
    tools = bench_home() / "tools"
    tool = tools / "bin" / name
    if not tool.exists():
        run_step("tools", [sys.executable, "-m", "venv", str(tools)], log)
        run_step("tools", [str(tools / "bin" / "pip"), "install", "--quiet", "cmake", "ninja"], log)
    if not tool.exists():
        raise PeerFailed(f"{name} is missing and pip did not bring it. Install {name}.")
    return str(tool)
