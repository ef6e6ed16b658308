"""What fetching a cached prefix from another worker saves against computing it, side by side.

    python -m tests.bench.prefix_fetch [--rounds N]

Two prefill workers of a real cluster with the default model. For each length one worker computes a
prefix; then the other one gets a prompt of that prefix and 16 tokens of its own, twice: once it computes
everything, once it is told who has the prefix. Every round uses a salt of its own, so nothing else is
cached. Times are from the call to its first token, the medians of all rounds; `fetch` is the part in
which the sequence waited for KV, and MB/s what moved in it.
"""

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from services.core.sampling import SamplingParams
from services.core.worker_report import WorkerReport
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.gateway.workers.worker_client import PrefixSource, Sequence
from services.model.files import open_model
from services.model.pull import ensure_default_model
from tests.support.cluster import ClusterSpec, RunningCluster
from tests.support.prompts import build_prompts

LENGTHS = (128, 512, 1024)
TAIL = 16
KV_TOKEN_BYTES = 30 * 2 * 3 * 64 * 4  # of the default model: layers, k and v, KV heads, head size, float32


@dataclass(slots=True)
class Times:
    """Of all rounds, in milliseconds."""

    computing: list[float]
    fetching: list[float]
    fetch: list[float]

    def line(self, length: int) -> str:
        computing, fetching, fetch = map(median, (self.computing, self.fetching, self.fetch))
        megabytes_per_s = length * KV_TOKEN_BYTES / 1e6 / (fetch / 1e3)
        return (
            f"{length:6d} {computing:14.0f} ms {fetching:14.0f} ms {computing / fetching:8.1f} x"
            f" {fetch:8.1f} ms {megabytes_per_s:8.0f}"
        )


class Bench:
    def __init__(self, client: GrpcWorkerClient, warm: WorkerReport, cold: WorkerReport) -> None:
        self._client, self._warm, self._cold = client, warm, cold
        self._asked = 0

    async def measure(self, prompt: list[int], rounds: int) -> Times:
        times = Times([], [], [])
        for _ in range(rounds):
            salt = f"round {self._asked}"
            await self._ask(self._cold, prompt, f"{salt}, computed", None, times.computing)
            await self._ask(self._warm, prompt[:-TAIL], salt, None, [])
            prefix = PrefixSource(self._warm, len(prompt) - TAIL)
            times.fetch.append(await self._ask(self._cold, prompt, salt, prefix, times.fetching))
        return times

    async def _ask(
        self,
        worker: WorkerReport,
        prompt: list[int],
        salt: str,
        prefix: PrefixSource | None,
        times_ms: list[float],
    ) -> float:
        """Time a prefill; the milliseconds it waited for a fetch, which must have brought all."""
        self._asked += 1
        sequence = Sequence(
            request_id=f"bench-{self._asked}",
            attempt=0,
            prompt_ids=prompt,
            output_ids=[],
            sampling=SamplingParams(max_tokens=1, temperature=0.0),
            salt=salt,
            prefix=prefix,
        )
        started_s = time.perf_counter()
        result = await self._client.prefill(worker, sequence, expect_pull=False)
        times_ms.append((time.perf_counter() - started_s) * 1e3)
        assert result.cached_tokens == 0, "the prompt was cached already"
        assert result.fetched_tokens == (prefix.tokens if prefix else 0), "a fetch broke off: run it again"
        return result.fetch_ms


async def run(cluster: RunningCluster, prompts: list[list[int]], rounds: int) -> None:
    warm, cold = [report for report in await cluster.reports() if report.role == "prefill"]
    client = GrpcWorkerClient()
    bench = Bench(client, warm, cold)
    await bench.measure(prompts[0], 1)  # the first steps of a process are slower
    print(f"{'prefix':>6} {'computing':>17} {'fetching':>17} {'ratio':>10} {'fetch':>11} {'MB/s':>8}")
    for prompt in prompts:
        print((await bench.measure(prompt, rounds)).line(len(prompt) - TAIL), flush=True)
    await client.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.prefix_fetch", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each length (default: 5)")
    rounds = parser.parse_args().rounds
    model = ensure_default_model()
    longest = max(build_prompts(open_model(model).tokenizer()), key=len)
    with tempfile.TemporaryDirectory() as folder:
        spec = ClusterSpec(prefill=2, decode=1, split="always", blocks=(2 * rounds + 4) * 80)
        cluster = RunningCluster(spec, model, Path(folder) / "home")
        try:
            asyncio.run(run(cluster, [longest[: length + TAIL] for length in LENGTHS], rounds))
        finally:
            cluster.stop()


if __name__ == "__main__":
    main()
