"""Only who has the cluster's certificate, or its token, is served; what is wrong is said on both sides."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import pytest

from services.core.clock import ManualClock
from services.core.errors import ConfigError, KvLinkLost, KvSourceLost, PeerRefused, WorkerLost
from services.launch.authority import Authority, create_authority
from services.transfer.protocol import KvSource
from services.wire.certificates import CLUSTER_NAME
from services.wire.channel import TCP, Network, from_rpc_error, new_server
from services.wire.cluster_lock import ClusterLock, TokenCheck, check_reachable, lock_network
from tests.support.certificates import lock_of, node
from tests.support.in_process_workers import DecodeWorker, PrefillWorker, running_pair
from tests.unit.decode.test_disaggregated_pair import PROMPT, Session, alone, sequence

EXPIRED_DAYS = -0.01
TOKEN, OTHER_TOKEN = "t" * 32, "u" * 32


@pytest.fixture
def ca(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "ca")


@pytest.fixture
def strangers(tmp_path: Path) -> Authority:
    return create_authority(tmp_path / "strangers")


class Echo(grpc.GenericRpcHandler):
    """Answers every unary call, and keeps what it was asked."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def service(self, details: object) -> "grpc.RpcMethodHandler[bytes, bytes]":
        async def answer(request: bytes, context: object) -> bytes:
            self.heard.append(request)
            await self.may_answer.wait()
            return request

        return grpc.unary_unary_rpc_method_handler(answer)


@asynccontextmanager
async def serving(lock: ClusterLock, port: int = 0) -> AsyncIterator[tuple[str, Echo]]:
    network, echo = lock_network(lock), Echo()
    server = network.new_server()
    server.add_generic_rpc_handlers((echo,))
    port = network.listen(server, "127.0.0.1", port)
    await server.start()
    try:
        yield f"127.0.0.1:{port}", echo
    finally:
        await server.stop(0)


async def ask(network: Network, address: str) -> bytes:
    """Raises what a caller of ours would see."""
    async with network.open_channel(address) as channel:
        try:
            answer: bytes = await channel.unary_unary("/any/method")(b"hello", timeout=5)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error, "peer") from None
        return answer


def with_certificates(ca: Authority) -> ClusterLock:
    return node(ca, "worker")


def with_token(ca: Authority) -> ClusterLock:
    return ClusterLock(token=TOKEN)


def with_both(ca: Authority) -> ClusterLock:
    return replace(node(ca, "worker"), token=TOKEN)


@pytest.mark.parametrize("lock", [with_certificates, with_token, with_both])
async def test_workers_of_one_cluster_answer_as_without_a_lock(
    ca: Authority, lock: Callable[[Authority], ClusterLock]
) -> None:
    network = lock_network(lock(ca))
    workers = PrefillWorker(network=network), DecodeWorker(network=network)
    async with running_pair(*workers, gateway=network) as pair:
        session = Session(pair)
        prefill = pair.run_prefill(sequence())
        await session.submit(sequence(), pair.source())
        reply = await prefill
        assert [reply.firsts[0].token, *await session.tokens()] == await alone(sequence())
        assert pair.decode.received[0].bytes > 0
        await session.close()
        await pair.idle()


@pytest.mark.parametrize("lock", [with_certificates, with_token])
async def test_a_worker_without_the_lock_cannot_read_kv(
    ca: Authority, lock: Callable[[Authority], ClusterLock]
) -> None:
    network = lock_network(lock(ca))
    async with running_pair(PrefillWorker(network=network), DecodeWorker(), gateway=network) as pair:
        stranger, source = pair.decode.kv.transport, KvSource("p", pair.prefill_address, 11)
        with pytest.raises((KvSourceLost, KvLinkLost)):
            await stranger.lend(source, "r/0/prefix", PROMPT, "")
        with pytest.raises((KvSourceLost, KvLinkLost)):
            await anext(stranger.messages(source, "r/0", 0))
        assert not pair.prefill.leases.open_leases
        assert not pair.prefill.leases.knows("r/0")


def nothing(ca: Authority, strangers: Authority) -> Network:
    return TCP


def no_certificate(ca: Authority, strangers: Authority) -> Network:
    return presenting(grpc.ssl_channel_credentials(ca_of(ca)))


def another_authoritys_certificate(ca: Authority, strangers: Authority) -> Network:
    return presenting(credentials(strangers.issue("stranger", [], 1), ca))


def an_expired_certificate(ca: Authority, strangers: Authority) -> Network:
    return presenting(credentials(ca.issue("old", [], EXPIRED_DAYS), ca))


def ca_of(authority: Authority) -> bytes:
    return (authority.folder / "ca.crt").read_bytes()


def credentials(folder: Path, trusted: Authority) -> grpc.ChannelCredentials:
    """As `lock_network` would not make them: unchecked."""
    key, cert = (folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes()
    return grpc.ssl_channel_credentials(ca_of(trusted), key, cert)


def presenting(credentials: grpc.ChannelCredentials) -> Network:
    options = [("grpc.ssl_target_name_override", CLUSTER_NAME)]
    return Network(lambda address: grpc.aio.secure_channel(address, credentials, options=options))


@pytest.mark.parametrize(
    ("caller", "logged"),
    [
        (nothing, "WRONG_VERSION_NUMBER"),
        (no_certificate, "PEER_DID_NOT_RETURN_A_CERTIFICATE"),
        (another_authoritys_certificate, "unable to get local issuer certificate"),
        (an_expired_certificate, "certificate has expired"),
    ],
)
async def test_a_caller_without_a_good_certificate_is_not_heard(
    ca: Authority,
    strangers: Authority,
    caller: Callable[[Authority, Authority], Network],
    logged: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async with serving(with_certificates(ca)) as (address, echo):
        with pytest.raises(WorkerLost, match="Socket closed"):
            await ask(caller(ca, strangers), address)
        assert not echo.heard
        assert await ask(lock_network(node(ca, "gateway")), address) == b"hello"
    assert logged in capfd.readouterr().err  # gRPC's own line in the log of whoever refused


async def test_a_server_of_another_cluster_is_not_spoken_to(ca: Authority, strangers: Authority) -> None:
    async with serving(node(strangers, "worker")) as (address, echo):
        with pytest.raises(PeerRefused, match="unable to get local issuer certificate"):
            await ask(lock_network(node(ca, "gateway")), address)
        assert not echo.heard


@pytest.mark.parametrize(
    "caller", [ClusterLock(), ClusterLock(token=OTHER_TOKEN), ClusterLock(token=TOKEN[:-1])]
)
async def test_a_caller_without_the_token_is_not_heard(
    caller: ClusterLock, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(ClusterLock(token=TOKEN)) as (address, echo):
        with pytest.raises(PeerRefused, match="cluster's token"):
            await ask(lock_network(caller), address)
        assert not echo.heard
        assert "refused 1 calls without the cluster's token, the last from ipv4:127.0.0.1" in caplog.text
        assert TOKEN[:-1] not in caplog.text


async def test_with_both_a_certificate_alone_is_not_enough(ca: Authority) -> None:
    async with serving(with_both(ca)) as (address, _):
        with pytest.raises(PeerRefused):
            await ask(lock_network(node(ca, "gateway")), address)
        assert await ask(lock_network(replace(node(ca, "gateway"), token=TOKEN)), address) == b"hello"


async def test_while_a_token_changes_both_are_taken_and_the_new_one_is_sent(tmp_path: Path) -> None:
    both = tmp_path / "token"
    both.write_text(f"{TOKEN}\n{OTHER_TOKEN}\n")
    changing = ClusterLock(token_file=both)
    async with serving(changing) as (address, _):
        for token in (TOKEN, OTHER_TOKEN):
            assert await ask(lock_network(ClusterLock(token=token)), address) == b"hello"
    async with serving(ClusterLock(token=TOKEN)) as (address, _):
        assert await ask(lock_network(changing), address) == b"hello"


async def test_refusals_are_logged_together(caplog: pytest.LogCaptureFixture) -> None:
    clock = ManualClock()
    check = TokenCheck([TOKEN], clock)
    network = replace(TCP, new_server=lambda: new_server([check]))
    server = network.new_server()
    port = network.listen(server, "127.0.0.1", 0)
    await server.start()
    for _ in range(3):
        with pytest.raises(PeerRefused):
            await ask(TCP, f"127.0.0.1:{port}")
    clock.advance(60)
    with pytest.raises(PeerRefused):
        await ask(TCP, f"127.0.0.1:{port}")
    await server.stop(0)
    assert [record.args[0] for record in caplog.records if record.args] == [1, 3]  # type: ignore[index]


async def test_renewed_certificates_are_taken_up_by_both_sides(ca: Authority, strangers: Authority) -> None:
    worker, gateway = node(ca, "worker"), node(ca, "gateway")
    async with serving(worker) as (address, _):
        client = lock_network(gateway)
        assert await ask(client, address) == b"hello"
        for renewed in (worker, gateway):  # by a new authority, as after a leak
            renew(renewed, strangers)
        with pytest.raises(PeerRefused):
            await ask(lock_network(lock_of(ca.issue("forgotten", [], 1))), address)
        assert await ask(client, address) == b"hello"


async def test_a_channel_connects_again_with_the_certificate_of_today(
    ca: Authority, strangers: Authority
) -> None:
    lock = node(ca, "node")
    async with serving(lock) as (address, _):
        channel = lock_network(lock).open_channel(address)
        assert await channel.unary_unary("/any/method")(b"hello", timeout=5) == b"hello"
    renew(lock, strangers)
    async with serving(lock, int(address.rpartition(":")[2])):
        assert await channel.unary_unary("/any/method")(b"again", timeout=5) == b"again"
    await channel.close()


async def test_a_call_that_runs_goes_on_when_certificates_are_renewed(ca: Authority) -> None:
    lock = node(ca, "node")
    async with serving(lock) as (address, echo):
        channel = lock_network(lock).open_channel(address)
        echo.may_answer.clear()
        running = asyncio.ensure_future(channel.unary_unary("/any/method")(b"first", timeout=5))
        while not echo.heard:
            await asyncio.sleep(0.001)
        renew(lock, ca)
        echo.may_answer.set()
        assert await channel.unary_unary("/any/method")(b"second", timeout=5) == b"second"
        assert await running == b"first"
        await channel.close()


def renew(lock: ClusterLock, authority: Authority) -> None:
    fresh = authority.issue("fresh", [], 30)
    for path in (lock.key, lock.cert, lock.ca):
        assert path is not None
        path.write_bytes((fresh / path.name).read_bytes())


async def test_a_renewal_that_is_not_good_changes_nothing(
    ca: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    lock = node(ca, "worker")
    assert lock.cert is not None
    async with serving(lock) as (address, _):
        lock.cert.write_bytes(b"half")
        assert await ask(lock_network(node(ca, "gateway")), address) == b"hello"
    assert "renewed certificates are not used" in caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_on_loopback_a_worker_needs_no_lock(host: str) -> None:
    check_reachable(ClusterLock(), host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "worker-7", ""])
def test_where_strangers_reach_a_worker_it_needs_one_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match=r"(?s)--cluster-cert.*--cluster-token-file.*--cluster-insecure"):
        check_reachable(ClusterLock(), host)
    check_reachable(ClusterLock(insecure=True), host)
    check_reachable(ClusterLock(token=TOKEN), host)


@pytest.mark.parametrize(
    ("lock", "complaint"),
    [
        (ClusterLock(cert=Path("c")), "missing: key, ca"),
        (ClusterLock(token="short"), "at least 16"),
        (ClusterLock(token="with\nline ends in it"), "ASCII"),
        (ClusterLock(token=TOKEN, token_file=Path("t")), "one of them"),
        (ClusterLock(token_file=Path("/nowhere/t")), "cannot read the cluster token in /nowhere/t"),
    ],
)
def test_settings_that_cannot_work_are_named(lock: ClusterLock, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        lock_network(lock)


def test_a_token_is_not_shown() -> None:
    assert TOKEN not in repr(ClusterLock(token=TOKEN))
