"""`diptych demo`: one prefill and one decode worker, a two-turn conversation, and where its time went."""

import argparse
import asyncio
import sys
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from services.core.errors import WorkerLost
from services.core.usable_cores import usable_cores
from services.launch.cluster import ClusterPlan, LocalCluster, claim_port
from services.launch.display import Display
from services.launch.lock import load_lock, lock_of_its_own
from services.launch.model import resolve_model
from services.launch.openai_client import Message, OpenAiClient, text_of
from services.launch.signals import run_until_signal
from services.launch.up import decide_quantization, describe_threads, worker_settings
from services.model.home import diptych_home

QUESTIONS = ("Name the capital of France.", "Name the capital of Italy.")
MAX_TOKENS = 64
# (label, key of the response's `timings`, unit), in the order in which a request lives through them.
STAGES = (
    ("tokenize", "tokenize", "ms"),
    ("route", "route", "ms"),
    ("queue", "queue", "ms"),
    ("prefill", "prefill", "ms"),
    ("KV transfer", "transfer", "ms"),
    ("  not hidden behind prefill", "exposed_transfer", "ms"),
    ("first token after", "first_token", "ms"),
    ("decode", "decode", "ms"),
    ("total", "total", "ms"),
    ("decode speed", "tokens_per_second", "tokens/s"),
    ("prefill worker", "prefill_worker", ""),
    ("decode worker", "decode_worker", ""),
    ("cached on the prefill worker", "cached_tokens_prefill", "tokens"),
    ("cached on the decode worker", "cached_tokens_decode", "tokens"),
)


@dataclass(frozen=True, slots=True)
class Turn:
    answer: str
    timings: dict[str, Any]  # the gateway's; times in ms


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("demo", help="see a request go through a cluster", description=__doc__)
    parser.add_argument("--model", default="", help="GGUF file or Hugging Face folder")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    display = Display()
    model = resolve_model(arguments.model, display)
    worker = worker_settings(arguments)
    plan = ClusterPlan(
        prefill=1,
        decode=1,
        host="127.0.0.1",
        port=claim_port("127.0.0.1", 0),
        model=model,
        dtype=worker.dtype,
        quantization=decide_quantization(worker, display),
        kv_cache_dtype=worker.kv_cache_dtype,
        logs=diptych_home() / "logs" / "demo",
        # Such a short prompt would go to the decode worker alone; here both shall be seen at work.
        route_split="always",
        lock=lock_of_its_own(load_lock(arguments)),
    )
    display.line(describe_threads(plan, usable_cores()))
    try:
        run_until_signal(_demonstrate(plan, display))
    except asyncio.CancelledError:
        return 130
    return 0


async def _demonstrate(plan: ClusterPlan, display: Display) -> None:
    cluster = LocalCluster(plan, display)
    try:
        await cluster.start()
        # In a thread: the loop goes on watching the processes while the answer streams.
        turns = await asyncio.to_thread(_converse, f"{plan.gateway_url}/v1")
    finally:
        display.line("stopping")
        await cluster.stop()
    Console().print(timings_table(turns))
    check(turns)


def _converse(url: str) -> list[Turn]:
    messages: list[Message] = []
    turns: list[Turn] = []
    with OpenAiClient(url) as client:
        model = client.served_model()
        for question in QUESTIONS:
            print(f"\n> {question}")
            messages.append({"role": "user", "content": question})
            turns.append(_ask(client, model, messages))
            messages.append({"role": "assistant", "content": turns[-1].answer})
    return turns


def _ask(client: OpenAiClient, model: str, messages: list[Message]) -> Turn:
    """Print the answer as it streams. Greedy, so that each run of the demo says the same."""
    answer = ""
    timings: dict[str, Any] = {}
    options = {"model": model, "max_tokens": MAX_TOKENS, "temperature": 0, "timings": True}
    for chunk in client.stream_chat(messages, **options):
        answer += text_of(chunk)
        sys.stdout.write(text_of(chunk))
        sys.stdout.flush()
        timings = chunk.get("timings") or timings
    print("\n")
    return Turn(answer, timings)


def timings_table(turns: list[Turn]) -> Table:
    """A row per stage, a column per turn."""
    table = Table("stage", title="where the time went")
    for number in range(len(turns)):
        table.add_column(f"turn {number + 1}", justify="right")
    for label, key, unit in STAGES:
        table.add_row(label, *(_figure(turn.timings.get(key), unit) for turn in turns))
    return table


def check(turns: list[Turn]) -> None:
    """Raise WorkerLost unless the turns show what the demo is about."""
    for number, turn in enumerate(turns, 1):
        prefill, decode = turn.timings.get("prefill_worker"), turn.timings.get("decode_worker")
        if not turn.answer.strip():
            raise WorkerLost(
                f"turn {number} brought no answer; see the logs in {diptych_home() / 'logs/demo'}"
            )
        if not prefill or not decode or prefill == decode:
            raise WorkerLost(f"turn {number} did not go from a prefill to a decode worker: {turn.timings}")
    last = turns[-1].timings
    if not last.get("cached_tokens_prefill") and not last.get("cached_tokens_decode"):
        raise WorkerLost(f"the second turn found nothing of the first in the prefix cache: {last}")


def _figure(value: object, unit: str) -> str:
    if value is None:
        return "-"
    text = f"{value:.1f}" if isinstance(value, float) else str(value)
    return f"{text} {unit}".strip()
