"""A mixed load from clients of all kinds, some of whom hang up.

    python -m loadtest.mixed --url http://127.0.0.1:8000 --requests 500 --cancel 0.2

A fixed number of clients ask one request after the other. The exit code is 0 if none failed.
"""

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator

import httpx

from loadtest.call import Outcome, perform
from loadtest.summary import Summary
from loadtest.workload import Call, mixed_calls

REQUEST_TIMEOUT_S = 300.0


async def run(url: str, requests: int, cancel_share: float, concurrency: int, seed: int) -> Summary:
    """Raises httpx.HTTPError if there is no server at `url` that says which model it has."""
    limits = httpx.Limits(max_connections=concurrency)
    root = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=root, timeout=REQUEST_TIMEOUT_S, limits=limits) as http:
        models = (await http.get("/v1/models")).raise_for_status().json()
        calls = mixed_calls(models["data"][0]["id"], requests, cancel_share, seed)
        outcomes: list[Outcome] = []
        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as clients:
            for _ in range(concurrency):
                clients.create_task(_client(http, calls, outcomes))
        return Summary.of(outcomes, time.perf_counter() - started_s)


async def _client(http: httpx.AsyncClient, calls: Iterator[Call], outcomes: list[Outcome]) -> None:
    """Take the next call whenever the last one has ended."""
    for call in calls:
        outcomes.append(await perform(http, call))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.mixed", description=__doc__.split("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    parser.add_argument("--requests", type=int, default=500, help="how many (default: %(default)s)")
    parser.add_argument("--cancel", type=float, default=0.2, metavar="SHARE", help="of clients that hang up")
    parser.add_argument("--concurrency", type=int, default=16, help="clients at once (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other requests")
    given = parser.parse_args()
    try:
        summary = asyncio.run(run(given.url, given.requests, given.cancel, given.concurrency, given.seed))
    except httpx.HTTPError as error:
        print(f"no OpenAI-style server answers at {given.url}: {error}", file=sys.stderr)
        return 2
    print(summary)
    return 1 if summary.failed else 0


if __name__ == "__main__":
    sys.exit(main())
