"""The gateway process: composes the real parts, serves until a signal, drains and goes."""

import asyncio
import gc
import logging
import signal
import socket
from functools import partial
from pathlib import Path

import uvicorn
import uvloop

from services.core.child_tasks import ChildTasks
from services.core.clock import SystemClock
from services.core.errors import ConfigError
from services.core.log import setup_logging
from services.gateway.api.app import build_app
from services.gateway.config import GatewayConfig
from services.gateway.door.door import Locks
from services.gateway.door.exposure import check_exposure, described
from services.gateway.gateway import Gateway
from services.gateway.http_server import Server, allow_connections, server_config
from services.gateway.https import HttpsContext, open_https
from services.gateway.served_model import ServedModel
from services.gateway.text.chat import ChatReader
from services.gateway.text.chat_renderer import ProcessRenderer
from services.gateway.text.grammars import Grammars, ProcessTrial
from services.gateway.text.template_process import Limits
from services.gateway.text.tool_calls.family import family_of
from services.gateway.workers.grpc_worker_client import GrpcWorkerClient
from services.history.redis_history import RedisHistory
from services.index.redis_index import RedisPrefixIndex
from services.keys.open_keys import open_keys
from services.keys.redis_limits import RedisLimits
from services.membership.redis_membership import RedisMembership
from services.model.chat_template import ChatTemplate
from services.model.files import open_model
from services.model.pull import ensure_default_model
from services.wire.channel import TCP, Network
from services.wire.cluster_lock import ClusterLock, lock_network

logger = logging.getLogger(__name__)

# Allocations less deallocations that make the collector look at new objects (700 by default), and how often
# that makes it look at older ones. Streams make hardly any cycles, but it took a seventh of their time.
COLLECTOR_THRESHOLDS = (20_000, 20, 20)


def run(config: GatewayConfig, lock: ClusterLock) -> None:
    """Serve until SIGTERM or SIGINT. Raises ConfigError and ModelFileError before anything listens."""
    setup_logging("gateway", level=config.log_level)
    uvloop.run(serve(config, lock_network(lock)))


async def serve(config: GatewayConfig, network: Network = TCP) -> None:
    """Run one gateway in the present event loop; see `run`."""
    if not config.redis:
        raise ConfigError("the gateway needs --redis URL: the Redis that the workers announce themselves in")
    check_exposure(config)
    https, locks = open_https(config.tls_cert, config.tls_key), _locks(config)
    with _listening_socket(config.host, config.port) as listener:
        model = await asyncio.to_thread(_load_model, config)
        membership, index = RedisMembership(config.redis), RedisPrefixIndex(config.redis)
        history = RedisHistory(config.redis, ttl_s=config.responses_ttl_s)
        workers, grammars = GrpcWorkerClient(network), Grammars(ProcessTrial(model.tokenizer))
        try:
            gateway = Gateway(
                config, model, membership, index, workers, history, SystemClock(), locks, grammars
            )
            try:
                await model.chats.renderer.start()
                await gateway.door.open()
                await _serve(gateway, listener, https)
            finally:
                await gateway.door.close()
        finally:
            await model.chats.renderer.close()
            await grammars.close()
            await workers.close()
            await history.close()
            await index.close()
            await membership.close()


async def _serve(gateway: Gateway, listener: socket.socket, https: HttpsContext | None) -> None:
    await gateway.view.refresh()
    _relieve_collector()
    server = Server(_server_config(gateway, https))
    _drain_on_signals(gateway, server)
    async with ChildTasks() as tasks:
        following = tasks.start(gateway.view.follow(gateway.config.membership_poll_s))
        watching = tasks.start(gateway.door.watch())
        serving = tasks.start(server.serve(sockets=[listener]))
        if https is not None:
            tasks.start(https.renew_forever(gateway.clock))
        host, port = listener.getsockname()[:2]
        scheme, who = "https" if https else "http", described(gateway.config)
        logger.info("serving %s on %s://%s:%d/v1; %s", gateway.model.name, scheme, host, port, who)
        await asyncio.wait([following, watching, serving], return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, following, watching):
            if task.done():
                task.result()  # a gateway that cannot follow the cluster, or its keys, any more crashes


def _relieve_collector() -> None:
    """What there is by now stays: the collector never looks at it again, and less often at the rest."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECTOR_THRESHOLDS)


def _drain_on_signals(gateway: Gateway, server: Server) -> None:
    """The first signal drains: unready at once, closed to new requests after the delay. The second one
    ends at once."""
    loop = asyncio.get_running_loop()

    def close() -> None:
        server.should_exit = True

    def stop() -> None:
        if gateway.draining:
            server.force_exit = server.should_exit = True
        gateway.draining = True
        loop.call_later(gateway.config.drain_delay_s, close)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


def _server_config(gateway: Gateway, https: HttpsContext | None) -> uvicorn.Config:
    config = gateway.config
    connections_max = allow_connections(config.connections_max)
    if connections_max < config.connections_max:
        logger.warning("this process may open files for %d connections only (ulimit -n)", connections_max)
    tls = https.context if https else None
    return server_config(build_app(gateway), tls, connections_max, config.drain_grace_s)


def _locks(config: GatewayConfig) -> Locks | None:
    """Raises ConfigError for a wrong setting."""
    return Locks(open_keys(config.keys, config.redis), RedisLimits(config.redis)) if config.keys else None


def _load_model(config: GatewayConfig) -> ServedModel:
    path = Path(config.model) if config.model else ensure_default_model()
    return ServedModel.of(open_model(path), config.served_model_name, partial(_chat_reader, config))


def _chat_reader(config: GatewayConfig, template: ChatTemplate) -> ChatReader:
    renderer = ProcessRenderer(template, Limits(config.template_timeout_s))
    family = family_of(template, config.tool_parser)
    return ChatReader(renderer, family, config.trust_request_chat_template)


def _listening_socket(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {host}:{port} ({error.strerror or error}); choose another --port or --host"
        ) from error
