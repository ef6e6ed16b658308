"""How fast a gateway is: what one process can do, and what it adds to every token.

    python -m tests.bench.gateway [--quick] [--workers 2+2] [--only stream ...] [--concurrency 64 ...]
                                  [--gateway watch|probe]

Real are the gateway process, its Valkey and gRPC; workers are token sources in a second process
(source.py), clients are raw sockets in a third one. Loads, each with 1, 64 and 512 requests at any moment:

    stream   decode workers that step at a fixed rate. What is added to the first token: the time the client
             waits less what the prefill worker takes. What is added to the others: from the worker's step to
             the client. Both clocks are one.
    flood    sources that send as fast as the gateway reads: the most tokens/s
    short    whole answers of a few tokens, from the same sources: the most requests/s

CPU is the gateway process's own, all threads; "per core" is what it could do with the whole of one core at
the same CPU per token (of "short": per request).
"""

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from services.gateway.served_model import ServedModel
from services.model.files import open_model
from services.model.pull import ensure_default_model
from tests.bench.gateway.figures import PART_NAMES, Figures, mean_parts
from tests.bench.gateway.load import Load
from tests.bench.gateway.stand import Stand

GATEWAYS = {
    "plain": "services.launch.cli",
    "watch": "tests.bench.gateway.watched",
    "probe": "tests.bench.gateway.probed",
}
CONCURRENCIES = (1, 64, 512)
STEPS_PER_S = 40.0
PREFILL_MS = 10.0
STREAMED_TOKENS = {1: 8, 64: 96}  # short ones show more first tokens; others as many as an answer has
ANSWER_TOKENS = 256
SHORT_TOKENS = 4
TOLD = re.compile(r"callback|^probe:")


def load(name: str, concurrency: int) -> Load:
    if name == "short":
        return Load(name=name, concurrency=concurrency, answer_tokens=SHORT_TOKENS, streamed=False)
    if name == "flood":
        return Load(name=name, concurrency=concurrency, answer_tokens=ANSWER_TOKENS)
    return Load(
        name=name,
        concurrency=concurrency,
        answer_tokens=STREAMED_TOKENS.get(concurrency, ANSWER_TOKENS),
        steps_per_s=STEPS_PER_S,
        prefill_ms=PREFILL_MS,
        timings=True,
    )


HEADER = """
                                      first token:     other tokens:    the gateway's CPU
           at  requests    tokens      added ms         added ms                                CPU of the
load     once        /s        /s      p50     p99      p50     p99   share      each  per core client sources
"""


def row(figures: Figures) -> str:
    load, window = figures.taken.load, figures.taken.window
    if load.name == "short":
        cost = f"{figures.ms_per_request:5.2f} ms {1e3 / figures.ms_per_request:7,.0f}/s"
    else:
        cost = f"{figures.us_per_token:5.0f} us {1e6 / figures.us_per_token:7,.0f}/s"
    shares = f"{figures.taken.clients.cpu_share:6.0%} {figures.taken.source_cpu_s / window.seconds:8.0%}"
    return (
        f"{load.name:7} {load.concurrency:7} {figures.requests_per_s:10,.1f} {figures.tokens_per_s:9,.0f}"
        f"  {figures.first}  {figures.token}   {figures.cpu_share:5.0%}  {cost} {shares}"
    )


def notes(all_figures: Sequence[Figures]) -> str:
    lines = []
    for figures in all_figures:
        load, taken = figures.taken.load, figures.taken
        lines += [
            f"{load.name} {load.concurrency}: {count} failed: {what}"
            for what, count in figures.problems.items()
        ]
        if load.streamed and figures.tokens_per_event > 1.05:
            lines.append(f"{load.name} {load.concurrency}: {figures.tokens_per_event:.1f} tokens in an event")
        if load.name == "stream":
            grown = taken.loaded_bytes - taken.idle_bytes
            lines.append(
                f"{load.name} {load.concurrency}: memory {taken.loaded_bytes >> 20} MiB, {grown >> 20} more"
            )
    return "\n".join(lines)


def first_token_table(all_figures: Sequence[Figures]) -> str:
    """Where the first token's added time goes, in the mean."""
    found = {f.taken.load.concurrency: mean_parts(f.taken) for f in all_figures if f.taken.load.timings}
    columns = {concurrency: means for concurrency, means in found.items() if means}
    lines = ["the first token's added ms, mean " + "".join(f"{f'at {c}':>9}" for c in columns)]
    for number, name in enumerate(PART_NAMES):
        lines.append(f"  {name:30} " + "".join(f"{means[number]:9.2f}" for means in columns.values()))
    lines.append(f"  {'together':30} " + "".join(f"{sum(means):9.2f}" for means in columns.values()))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short runs")
    parser.add_argument("--workers", default="2+2", help="prefill + decode")
    parser.add_argument("--only", nargs="+", choices=("stream", "flood", "short"))
    parser.add_argument("--concurrency", nargs="+", type=int, default=CONCURRENCIES)
    parser.add_argument(
        "--gateway",
        choices=GATEWAYS,
        default="plain",
        help="watch: one that times every callback of its event loop; probe: some parts of a request",
    )
    given = parser.parse_args()
    prefills, decodes = map(int, given.workers.split("+"))
    model = ServedModel.of(open_model(ensure_default_model()))
    stand = Stand(model, prefills, decodes, GATEWAYS[given.gateway])
    warm_up_s, seconds = (3.0, 4.0) if given.quick else (6.0, 12.0)
    tells = given.gateway != "plain"
    names = given.only or (["stream"] if tells else ["stream", "flood", "short"])
    print(HEADER.strip("\n"))
    taken: list[Figures] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            for concurrency in given.concurrency:
                log = Path(folder) / f"{name}-{concurrency}"
                taken.append(Figures.of(stand.run(load(name, concurrency), warm_up_s, seconds, log)))
                print(row(taken[-1]), flush=True)
                if tells:
                    print(*(line for line in log.read_text().splitlines() if TOLD.search(line)), sep="\n")
    print(notes(taken))
    if any(figures.taken.load.timings for figures in taken):
        print(first_token_table(taken))


if __name__ == "__main__":
    main()
