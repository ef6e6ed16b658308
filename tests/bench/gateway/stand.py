"""The processes of one run: Valkey, a gateway, the token sources, the clients."""

import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil

from services.core.parent_death import dying_with_parent
from services.gateway.served_model import ServedModel
from services.gateway.text.detokenizer import Detokenizer
from services.store.embedded import EmbeddedValkey, free_port
from tests.bench.gateway.load import ClientOrder, ClientReport, Load, Served, SourceOrder, Window

ROOT = Path(__file__).resolve().parents[3]
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
SPREAD_S = 3.0  # the clients' processes begin, and connect
ANSWER = (
    'The "KV cache" keeps the keys & values of all tokens:\n\n1. computed once,\n2. read at every step. '
    "Größe, naïve, 日本語 and 👍 are text, too; a\tcolumn \\ backslash ends it. "
)


@dataclass(frozen=True)
class Taken:
    """What one run showed, and what the gateway's process took for it in the measured window."""

    load: Load
    window: Window
    clients: ClientReport
    served: dict[str, Served]
    gateway_cpu_s: float
    source_cpu_s: float
    idle_bytes: int  # resident memory before the first request
    loaded_bytes: int  # in the middle


def answer_of(model: ServedModel, tokens_max: int) -> tuple[list[int], list[int]]:
    """The token ids of every answer, which repeat, and how many characters are complete after each."""
    ids = model.tokenizer.encode(ANSWER, add_special_tokens=False)
    detokenizer, characters, seen = Detokenizer(model.token_bytes), [], 0
    for index in range(tokens_max):
        seen += len(detokenizer.feed(ids[index % len(ids)]))
        characters.append(seen)
    return ids, characters


class Stand:
    """Everything but the load. `gateway`: the module that runs one, with the arguments of the command."""

    def __init__(self, model: ServedModel, prefills: int, decodes: int, gateway: str) -> None:
        self._model, self._prefills, self._decodes = model, prefills, decodes
        self._gateway = gateway

    def run(self, load: Load, warm_up_s: float, seconds: float, log: Path) -> Taken:
        """A gateway of its own under `load`. `log`: where its processes' output goes."""
        with tempfile.TemporaryDirectory() as folder, EmbeddedValkey() as valkey:
            port, served_at, seen_at = free_port(), Path(folder) / "served", Path(folder) / "seen"
            ids, characters = answer_of(self._model, load.answer_tokens * 2)
            source = SourceOrder(
                load=load,
                redis=valkey.url,
                served_model=self._model.name,
                prefills=self._prefills,
                decodes=self._decodes,
                token_ids=ids,
            )
            with (
                _python(self._gateway, *_flags(valkey.url, port), log=log) as gateway,
                _python("tests.bench.gateway.source", _json(source), str(served_at), log=log) as sources,
            ):
                _wait_until_ready(port, log)
                begins_at = time.monotonic() + SPREAD_S
                window = Window(begins_at, begins_at + warm_up_s, begins_at + warm_up_s + seconds)
                idle_bytes = _memory(gateway)
                client = ClientOrder(
                    load=load,
                    window=window,
                    port=port,
                    model=self._model.name,
                    answer_characters=characters,
                )
                with _python("tests.bench.gateway.client", _json(client), str(seen_at), log=log) as clients:
                    cpu_s, loaded_bytes = _over(window, gateway, sources)
                    if clients.wait(STOP_TIMEOUT_S):
                        raise RuntimeError(f"the clients failed:\n{log.read_text(errors='replace')}")
                _stop(sources)
            return Taken(
                load,
                window,
                msgspec.msgpack.decode(seen_at.read_bytes(), type=ClientReport),
                msgspec.msgpack.decode(served_at.read_bytes(), type=dict[str, Served]),
                *cpu_s,
                idle_bytes,
                loaded_bytes,
            )


def _over(window: Window, *processes: "subprocess.Popen[bytes]") -> tuple[tuple[float, ...], int]:
    """CPU seconds of the processes in the window, and the first one's memory in its middle."""
    time.sleep(window.measured_from - time.monotonic())
    before = [_cpu_s(process) for process in processes]
    time.sleep(max(0.0, window.measured_from + window.seconds / 2 - time.monotonic()))
    memory = _memory(processes[0])
    time.sleep(max(0.0, window.ends_at - time.monotonic()))
    return tuple(_cpu_s(process) - was for process, was in zip(processes, before, strict=True)), memory


def _flags(redis: str, port: int) -> list[str]:
    return [
        *("gateway", "--redis", redis, "--port", str(port), "--route-split", "always"),
        *("--inflight-max", "4096"),
    ]


@contextmanager
def _python(module: str, *arguments: str, log: Path) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", module, *arguments]
    with log.open("ab") as output:
        process = subprocess.Popen(
            dying_with_parent(command, signal.SIGKILL),
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_ready(port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health/ready", timeout=1.0):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.05)
    raise TimeoutError(f"the gateway did not get ready:\n{log.read_text(errors='replace')}")


def _cpu_s(process: "subprocess.Popen[bytes]") -> float:
    times = psutil.Process(process.pid).cpu_times()
    return times.user + times.system


def _memory(process: "subprocess.Popen[bytes]") -> int:
    return psutil.Process(process.pid).memory_info().rss


def _json(order: msgspec.Struct) -> str:
    return msgspec.json.encode(order).decode()
