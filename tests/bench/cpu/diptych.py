"""Diptych as its users start it: `diptych up` with a worker of each role, or one worker of role both."""

import json
import os
import sys
from collections.abc import Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from services.model.pull import ensure_default_model
from services.store.embedded import EmbeddedValkey, free_port
from tests.bench.cpu.client import Target
from tests.bench.cpu.contestant import Family, Precision, Setting, bench_home, shown
from tests.bench.cpu.llama_cpp import model_file
from tests.bench.cpu.load import Cell
from tests.bench.cpu.processes import ROOT, await_ready, child, fetch
from tests.bench.cpu.served import Served

DIPTYCH = (sys.executable, "-m", "services.launch.cli")
MODEL_NAME = "SmolLM2-135M-Instruct"
BLOCK_TOKENS = 16
START_TIMEOUT_S = 120.0
AS_IT_COMES = Setting("as it comes")

Layout = Literal["1+1", "both"]
Weights = Literal["Q4_1", "Q8_0", "float32"]  # float32: of the same file, computed in float32 by torch
PRECISIONS: dict[Weights, Precision] = {"Q4_1": "4 bits", "Q8_0": "8 bits", "float32": "float32"}


@dataclass(frozen=True, slots=True)
class Diptych:
    layout: Layout
    weights: Weights
    settings: Sequence[Setting] = (AS_IT_COMES,)
    family: Family = "Diptych"
    starts_slowly: bool = False

    @property
    def name(self) -> str:
        return f"Diptych {self.layout} {'float32' if self.weights == 'float32' else f'int8 {self.weights}'}"

    @property
    def precision(self) -> Precision:
        return PRECISIONS[self.weights]

    def prepare(self) -> None:
        self._model()

    def group(self, cell: Cell) -> Hashable:
        return cell.shape  # so that no cache of another shape's prompts is in its memory

    @contextmanager
    def open(self, setting: Setting, cells: Sequence[Cell], log: Path) -> Iterator[Served]:
        port = free_port()
        model = ["--model", str(self._model())]
        quantization = "none" if self.weights == "float32" else "int8"
        flags = ["--quantization", quantization, "--blocks", str(blocks_for(cells)), *setting.flags]
        serve = {"1+1": _one_and_one, "both": _both}[self.layout]
        with serve(port, model, flags, log) as (pids, command):
            yield Served(Target(port, MODEL_NAME, dict(setting.body)), pids, command)

    def _model(self) -> Path:
        return model_file("Q8_0") if self.weights == "Q8_0" else ensure_default_model()


def blocks_for(cells: Sequence[Cell]) -> int:
    """KV blocks that the largest cell's sequences fill together, and a quarter more."""
    each = [cell.concurrency * -(-cell.shape.tokens // BLOCK_TOKENS) for cell in cells]
    return max(each) * 5 // 4 + 32


@contextmanager
def _one_and_one(port: int, model: list[str], flags: list[str], log: Path) -> Iterator[tuple[list[int], str]]:
    command = [*DIPTYCH, "up", "--prefill", "1", "--decode", "1", "--port", str(port), *model, *flags]
    with child(command, _environment(), log) as up:
        await_ready(up, lambda: _knows(port, workers=2), START_TIMEOUT_S, log)
        yield [up.pid], _typed(command)


@contextmanager
def _both(port: int, model: list[str], flags: list[str], log: Path) -> Iterator[tuple[list[int], str]]:
    worker = [*DIPTYCH, "worker", "--role", "both", *model, *flags]
    gateway = [*DIPTYCH, "gateway", "--port", str(port), *model]
    with ExitStack() as stack:
        valkey = stack.enter_context(EmbeddedValkey())
        environment = _environment() | {
            "DIPTYCH_WORKER__REDIS": valkey.url,
            "DIPTYCH_GATEWAY__REDIS": valkey.url,
        }
        first = stack.enter_context(child(worker, environment, log))
        second = stack.enter_context(child(gateway, environment, log))
        for process in (first, second):
            await_ready(process, lambda: _knows(port, workers=1), START_TIMEOUT_S, log)
        yield [valkey.pid, first.pid, second.pid], f"{_typed(worker)}; {_typed(gateway)}"


def _knows(port: int, workers: int) -> bool:
    """Whether the gateway has all workers in sight."""
    if fetch(f"http://127.0.0.1:{port}/health/ready") is None:
        return False
    cluster = fetch(f"http://127.0.0.1:{port}/v1/cluster")
    return cluster is not None and len(json.loads(cluster)) == workers


def _environment() -> dict[str, str]:
    """A home of its own: a cluster that the user has running stays the one that `diptych status` shows."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "DIPTYCH_HOME": str(bench_home() / "diptych")}


def _typed(command: Sequence[str]) -> str:
    return shown(["diptych", *command[len(DIPTYCH) :]], AS_IT_COMES)
