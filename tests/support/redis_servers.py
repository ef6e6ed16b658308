"""The servers that index and membership run on: Valkey, Redis, and clusters of three nodes of either."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from redis import Redis
from redis import asyncio as redis_asyncio
from redis.exceptions import ResponseError

from services.store.embedded import EmbeddedValkey, free_port
from tests.support.redis_binary import NoRedis, redis_server

SLOTS = 16_384
NODES = 3
JOIN_TIMEOUT_S = 30.0


class RedisCluster:
    """Three primaries that share the slots, without replicas at first."""

    def __init__(self, binary: Path | None = None) -> None:
        self._binary = binary
        # The port of the nodes' own traffic has to be free too, so it is not the usual port + 10,000.
        self._bus_ports = [free_port() for _ in range(NODES)]
        self.nodes = [EmbeddedValkey(binary, _flags(bus_port)) for bus_port in self._bus_ports]

    @property
    def url(self) -> str:
        return self.nodes[0].url

    def __enter__(self) -> "RedisCluster":
        with ExitStack() as started:
            for node in self.nodes:
                started.enter_context(node)
            self._join()
            self.await_joined()
            self._started = started.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def await_joined(self) -> None:
        for node in self.nodes:
            with _client(node) as client:
                _await(lambda client=client: _has_joined(client))

    def fail_over(self, primary: EmbeddedValkey) -> None:
        """Start a replica of `primary`, and let it take its place."""
        replica = self._started.enter_context(EmbeddedValkey(self._binary, _flags(free_port())))
        with _client(primary) as old, _client(replica) as new:
            new.execute_command("CLUSTER MEET", "127.0.0.1", primary.port, self._bus_port(primary))
            _await(lambda: len(new.execute_command("CLUSTER NODES")) == NODES + 1)
            _await(lambda: _accepts(new, "CLUSTER REPLICATE", old.execute_command("CLUSTER MYID")))
            _await(lambda: new.info("replication").get("master_link_status") == "up")
            _await(lambda: _accepts(new, "CLUSTER FAILOVER"))
            _await(lambda: new.info("replication")["role"] == "master")
            _await(lambda: old.info("replication")["role"] == "slave")

    def _join(self) -> None:
        for number, node in enumerate(self.nodes):
            first, after = SLOTS * number // NODES, SLOTS * (number + 1) // NODES
            with _client(node) as client:
                client.execute_command("CLUSTER ADDSLOTSRANGE", first, after - 1)
                client.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
                if number:
                    first_node = self.nodes[0]
                    bus_port = self._bus_port(first_node)
                    client.execute_command("CLUSTER MEET", "127.0.0.1", first_node.port, bus_port)

    def _bus_port(self, node: EmbeddedValkey) -> int:
        return self._bus_ports[self.nodes.index(node)]


def _flags(bus_port: int) -> list[str]:
    return [
        *("--cluster-enabled", "yes", "--cluster-port", str(bus_port)),
        *("--cluster-node-timeout", "1000", "--repl-diskless-sync-delay", "0"),
    ]


class RedisServers:
    """Starts a server of a kind when it is first asked for; ends all with the `with` block."""

    def __init__(self) -> None:
        self._started = ExitStack()
        self._urls: dict[str, str] = {}
        self._missing: dict[str, NoRedis] = {}

    def __enter__(self) -> "RedisServers":
        return self

    def __exit__(self, *_: object) -> None:
        self._started.close()

    def url(self, kind: str) -> str:
        """Of the one server of this kind. Raises NoRedis."""
        if kind in self._missing:
            raise self._missing[kind]  # what could not be fetched is not fetched again for every test
        if kind not in self._urls:
            try:
                self._urls[kind] = self._started.enter_context(KINDS[kind]()).url
            except NoRedis as error:
                self._missing[kind] = error
                raise
        return self._urls[kind]


KINDS: dict[str, Callable[[], EmbeddedValkey | RedisCluster]] = {
    "valkey": EmbeddedValkey,
    "redis": lambda: EmbeddedValkey(redis_server()),
    "valkey cluster": RedisCluster,
    "redis cluster": lambda: RedisCluster(redis_server()),
}


def client_of(url: str, kind: str) -> "redis_asyncio.Redis | redis_asyncio.RedisCluster":
    client = redis_asyncio.RedisCluster if kind.endswith("cluster") else redis_asyncio.Redis
    return client.from_url(url)


def _client(node: EmbeddedValkey) -> Redis:
    return Redis(port=node.port, decode_responses=True, single_connection_client=True)


def _accepts(client: Redis, *command: object) -> bool:
    """Whether the command is possible by now."""
    try:
        client.execute_command(*command)
    except ResponseError:
        return False
    return True


def _has_joined(client: Redis) -> bool:
    info = client.cluster("INFO")
    return info["cluster_state"] == "ok" and int(info["cluster_known_nodes"]) == NODES


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError("the nodes did not form a cluster")
        time.sleep(0.02)
