"""Where commands find the workers of a cluster: in its Redis, or at one of its gateways."""

import argparse
import asyncio
from pathlib import Path

import httpx
import msgspec

from services.core.errors import InvalidKey, NoWorker
from services.core.worker_report import WorkerReport
from services.launch.api_key import add_api_key_flag, authorization
from services.launch.cluster_state import read_state
from services.launch.https import add_ca_flag, trusting
from services.membership.redis_membership import RedisMembership

READ_TIMEOUT_SECONDS = 5.0
REFUSED = (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--redis", metavar="URL", help="the cluster that uses this Redis")
    source.add_argument("--url", metavar="URL", help="the cluster of this gateway (http://HOST:PORT)")
    add_api_key_flag(parser)
    add_ca_flag(parser)


def read_reports(arguments: argparse.Namespace) -> list[WorkerReport]:
    """The workers' last reports; without a flag, those of the cluster that `diptych up` runs here.

    Raises NoWorker if there is no such cluster, StoreUnavailable if its Redis does not answer.
    """
    if arguments.url:
        return _from_gateway(arguments.url, arguments.api_key, arguments.ca)
    if arguments.redis:
        return asyncio.run(_from_redis(arguments.redis))
    state = read_state()
    if state is None:
        raise NoWorker(
            "no cluster of `diptych up` runs on this machine; start one, or pass --redis URL or --url URL"
        )
    return asyncio.run(_from_redis(state.redis_url))


async def _from_redis(url: str) -> list[WorkerReport]:
    membership = RedisMembership(url, timeout_s=READ_TIMEOUT_SECONDS)
    try:
        return await membership.workers()
    finally:
        await membership.close()


def _from_gateway(url: str, api_key: str | None, ca: Path | None) -> list[WorkerReport]:
    root = url.rstrip("/").removesuffix("/v1")
    try:
        response = httpx.get(
            f"{root}/v1/cluster",
            headers=authorization(api_key),
            timeout=READ_TIMEOUT_SECONDS,
            verify=trusting(ca),
        )
        if response.status_code in REFUSED:
            raise InvalidKey(f"{root} tells administrators only; pass the --api-key of one, or --redis URL")
        response.raise_for_status()
        return msgspec.json.decode(response.content, type=list[WorkerReport])
    except (httpx.HTTPError, httpx.InvalidURL, msgspec.DecodeError) as error:
        raise NoWorker(f"no gateway of Diptych answers at {root}: {error}") from error
