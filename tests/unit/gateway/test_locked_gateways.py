"""Two gateway processes, one Valkey, keys made by `diptych keys`, and OpenAI's own client."""

import asyncio
import json
import sys

import httpx
import openai
import pytest

from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault, MemoryWorkerClient
from services.keys.protocol import LEASE_S
from services.launch.cli import main
from services.membership.redis_membership import RedisMembership
from tests.support.redis_servers import client_of
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL, until
from tests.unit.gateway.scripted_worker_server import ScriptedWorkerServer, report
from tests.unit.gateway.test_main import PROGRAM, free_port, until_ready

BODY = {"model": MODEL, "prompt": "France", "max_tokens": 100}


class Gateways:
    """They take keys from Redis."""

    def __init__(self, redis_url: str, workers: MemoryWorkerClient) -> None:
        self.redis_url, self.workers = redis_url, workers
        self.processes: list[asyncio.subprocess.Process] = []
        self.urls: list[str] = []

    async def start(self, count: int, **config) -> None:
        for _ in range(count):
            port = free_port()
            settings = json.dumps({"port": port, "redis": self.redis_url, "keys": "redis", **config})
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, settings)
            self.processes.append(process)
            self.urls.append(f"http://127.0.0.1:{port}")
        for url, process in zip(self.urls, self.processes, strict=True):
            async with httpx.AsyncClient(base_url=url) as http:
                await until_ready(http, process)

    async def command(self, *arguments: str) -> None:
        where = ["--keys", "redis", "--redis", self.redis_url]
        assert await asyncio.to_thread(main, ["keys", *arguments, *where]) == 0

    def client(self, number: int, key: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.urls[number]}/v1", api_key=key, max_retries=0)

    async def ask(self, number: int, key: str) -> str:
        """The answer, or the code of the error."""
        async with self.client(number, key) as client:
            try:
                return (await client.completions.create(**BODY)).choices[0].text
            except openai.APIStatusError as error:
                return str(error.code)

    async def until_asked(self, number: int, key: str, expected: str) -> None:
        async with asyncio.timeout(10):
            while await self.ask(number, key) != expected:
                await asyncio.sleep(0.05)

    async def stop(self) -> None:
        for process in self.processes:
            if process.returncode is None:
                process.kill()
                await process.wait()


@pytest.fixture
async def gateways(valkey_url, default_model, tokenizer):
    ids = [*tokenizer.encode(ANSWER, add_special_tokens=False), min(tokenizer.end_token_ids)]
    workers = MemoryWorkerClient(lambda prompt: ids)
    server, membership = ScriptedWorkerServer(workers), RedisMembership(valkey_url, ttl_s=60)
    await server.start()
    reports = [report(f"locked-{role}", role, address=server.address) for role in ("prefill", "decode")]
    for worker in reports:
        await membership.announce(worker)
    gateways = Gateways(valkey_url, workers)
    try:
        await gateways.start(2, model=str(default_model), route_split="always")
        yield gateways
    finally:
        await gateways.stop()
        for worker in reports:
            await membership.leave(worker.key)
        await membership.close()
        await server.stop()


async def pass_time(redis_url: str, seconds: float) -> None:
    """Leases in Redis are so much older."""
    async with client_of(redis_url, "valkey") as redis:
        async for key in redis.scan_iter("*:limits:*:running"):
            for lease in await redis.zrange(key, 0, -1):
                await redis.zincrby(key, -seconds * 1000, lease)


async def test_keys_are_made_shared_limited_and_withdrawn_while_gateways_run(gateways, capsys) -> None:
    await gateways.command("create", "openai-client", "--requests-per-minute", "4", "--concurrent", "1")
    key = capsys.readouterr().out.strip()
    for number in (0, 1):
        await gateways.until_asked(number, key, ANSWER)
        assert await gateways.ask(number, key[:-1] + "!") == "invalid_api_key"
        assert await gateways.ask(number, "none") == "invalid_api_key"
    answers = [await gateways.ask(number % 2, key) for number in range(4)]
    assert sorted(answers) == sorted([ANSWER] * 2 + ["rate_limit_exceeded"] * 2)

    await gateways.command("set", "openai-client", "--requests-per-minute", "0")
    for number in (0, 1):
        await gateways.until_asked(number, key, ANSWER)
    gateways.workers.script(ANY_WORKER, "decode", Fault(after_tokens=3))
    holding = asyncio.create_task(gateways.ask(0, key))
    await until(lambda: any(call.kind == "decode" for call in gateways.workers.running))
    assert await gateways.ask(1, key) == "rate_limit_exceeded"
    gateways.processes[0].kill()
    with pytest.raises(openai.APIConnectionError):
        await holding
    assert await gateways.ask(1, key) == "rate_limit_exceeded"
    await pass_time(gateways.redis_url, LEASE_S)
    await gateways.until_asked(1, key, ANSWER)

    await gateways.command("revoke", "openai-client")
    await gateways.until_asked(1, key, "invalid_api_key")
