"""The gateway process: real HTTP, real Redis, real gRPC to scripted workers, real signals."""

import asyncio
import json
import signal
import socket
import sys

import httpx
import psutil
import pytest

from services.core.errors import ConfigError
from services.gateway.config import GatewayConfig
from services.gateway.main import serve
from services.gateway.workers.memory_worker_client import Fault, MemoryWorkerClient
from services.membership.redis_membership import RedisMembership
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL
from tests.unit.gateway.scripted_worker_server import ScriptedWorkerServer, report

PROGRAM = """
import json, sys
from services.gateway.config import GatewayConfig
from services.gateway.main import run
from services.wire.cluster_lock import ClusterLock
run(GatewayConfig(**json.loads(sys.argv[1])), ClusterLock())
"""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def until_ready(http: httpx.AsyncClient, process: asyncio.subprocess.Process) -> None:
    async with asyncio.timeout(60):
        while process.returncode is None:
            try:
                if (await http.get("/health/ready")).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.05)
    raise AssertionError(f"the gateway ended with {process.returncode}")


async def until_refused(http: httpx.AsyncClient) -> None:
    """Until the gateway takes no connection any more: it is draining."""
    async with asyncio.timeout(30):
        while True:
            try:
                await http.get("/health/live", headers={"Connection": "close"})
            except httpx.TransportError:
                return
            await asyncio.sleep(0.02)


@pytest.fixture
def drain_delay_s() -> float:
    return 0.0


@pytest.fixture
def settings() -> dict:
    """Further ones of the gateway."""
    return {}


@pytest.fixture
async def gateway_process(valkey_url, default_model, tokenizer, drain_delay_s, settings):
    """(process, HTTP client, scripted workers): one worker of each role behind a real gateway."""
    ids = [*tokenizer.encode(ANSWER, add_special_tokens=False), min(tokenizer.end_token_ids)]
    workers = MemoryWorkerClient(lambda prompt: ids)
    server, membership = ScriptedWorkerServer(workers), RedisMembership(valkey_url, ttl_s=60)
    await server.start()
    reports = [report(f"main-{role}", role, address=server.address) for role in ("prefill", "decode")]
    for worker in reports:
        await membership.announce(worker)
    port = free_port()
    config = {"port": port, "redis": valkey_url, "model": str(default_model), "route_split": "always"}
    config |= {"drain_delay_s": drain_delay_s, **settings}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROGRAM, json.dumps(config))
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            await until_ready(http, process)
            yield process, http, workers
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        for worker in reports:
            await membership.leave(worker.key)
        await membership.close()
        await server.stop()


async def test_a_signal_lets_running_answers_finish_and_the_process_end_well(gateway_process) -> None:
    process, http, workers = gateway_process
    body = {"model": MODEL, "prompt": "France", "max_tokens": 100}
    whole = (await http.post("/v1/completions", json=body)).json()
    assert whole["choices"][0]["text"] == ANSWER

    pause, text = Fault(after_tokens=3), ""
    workers.script("w", "decode", pause)
    async with http.stream("POST", "/v1/completions", json=body | {"stream": True}) as answered:
        async for line in answered.aiter_lines():
            if not text:
                process.send_signal(signal.SIGTERM)
                await until_refused(http)
                pause.end.set()
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    assert text == ANSWER
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert workers.running == []


@pytest.mark.parametrize("drain_delay_s", [1.5])
async def test_a_draining_gateway_is_unready_before_it_takes_no_more_requests(gateway_process) -> None:
    process, http, _ = gateway_process
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(1.0):
        while (ready := await http.get("/health/ready")).status_code == 200:
            await asyncio.sleep(0.01)
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    late = await http.post("/v1/completions", json={"model": MODEL, "prompt": "late", "max_tokens": 100})
    assert late.json()["choices"][0]["text"] == ANSWER
    await until_refused(http)
    async with asyncio.timeout(30):
        assert await process.wait() == 0


@pytest.mark.parametrize("settings", [{"trust_request_chat_template": True, "template_timeout_s": 0.2}])
async def test_templates_run_in_processes_that_end_with_the_gateway(gateway_process) -> None:
    process, http, _ = gateway_process
    children = psutil.Process(process.pid).children()
    assert len(children) == 1, "of the model's template"
    chat = {"model": MODEL, "messages": [{"role": "user", "content": "France"}]}
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    refused = await http.post("/v1/chat/completions", json={**chat, "chat_template": endless}, timeout=30)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "chat_template")
    own = await http.post("/v1/chat/completions", json={**chat, "chat_template": "{{ messages[0].content }}"})
    assert own.json()["usage"]["prompt_tokens"] == 1
    assert (await http.post("/v1/chat/completions", json=chat)).status_code == 200
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert len(children) == 2
    assert not any(child.is_running() for child in children)


async def test_without_redis_the_gateway_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="--redis"):
        await serve(GatewayConfig(port=0))


async def test_a_port_in_use_is_a_configuration_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"{port}.*another --port"):
            await serve(GatewayConfig(port=port, redis="redis://127.0.0.1:1"))
