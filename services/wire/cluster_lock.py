"""What the parts of one cluster ask of each other before they serve: certificates, a token, or both.

The settings are one section for all parts, [cluster]; `lock_network` makes of them the Network that every
gRPC channel and server of the process goes through:

    certificates   mutual TLS: each side sees that the cluster's authority signed the other (certificates.py)
    token          one secret of the cluster, sent with every call and compared in constant time

The token says who belongs to the cluster, it does not hide what is said: on a network that others can
listen to, certificates do that.
"""

import hmac
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from services.core.clock import Clock, SystemClock
from services.core.errors import ConfigError, PeerRefused
from services.core.loopback import is_loopback
from services.wire.certificates import CLUSTER_NAME, CertificateFiles, Certificates, RenewedCertificates
from services.wire.channel import TCP, Network, abort, channel_options, listen, new_server
from services.wire.locked_channel import TOKEN_KEY, RenewedChannel, TokenChannel

TOKEN_CHARACTERS_MIN = 16
_WARN_EVERY_S = 10.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ClusterLock:
    """Section [cluster], the same for gateways, workers and operators' commands."""

    cert: Path | None = field(
        default=None, metadata={"help": "this node's certificate (PEM), signed by the cluster's authority"}
    )
    key: Path | None = field(default=None, metadata={"help": "its private key (PEM)"})
    ca: Path | None = field(default=None, metadata={"help": "the authority's certificate (PEM)"})
    token: str = field(
        default="", repr=False, metadata={"help": "secret that the cluster's parts share", "secret": True}
    )
    token_file: Path | None = field(
        default=None,
        metadata={
            "help": "file with the secret that the cluster's parts share; while it changes: the new one, and "
            "those that are still accepted, one a line"
        },
    )
    insecure: bool = field(
        default=False,
        metadata={"help": "let whoever reaches this worker read KV and prompts: no certificate, no token"},
    )

    @property
    def is_locked(self) -> bool:
        return bool(self.cert or self.token or self.token_file)


def check_reachable(lock: ClusterLock, host: str) -> None:
    """Raises ConfigError where strangers could reach a worker that asks for nothing."""
    if lock.is_locked or lock.insecure or is_loopback(host):
        return
    raise ConfigError(
        f"on {host} anybody on the network could read this worker's KV and prompts. Give the cluster "
        "certificates (--cluster-cert, --cluster-key, --cluster-ca; `diptych certs create` makes some), or a "
        "token (--cluster-token-file, or DIPTYCH_CLUSTER__TOKEN), the same at every gateway and worker; or "
        "say --cluster-insecure if the network keeps strangers out"
    )


def lock_network(lock: ClusterLock) -> Network:
    """Raises ConfigError for settings, files and certificates that cannot work."""
    files, tokens = _certificate_files(lock), _tokens(lock)
    network = TCP
    if files is not None:
        network = _with_certificates(RenewedCertificates(files))
    return _with_token(network, tokens) if tokens else network


def _certificate_files(lock: ClusterLock) -> CertificateFiles | None:
    if lock.cert and lock.key and lock.ca:
        return CertificateFiles(lock.cert, lock.key, lock.ca)
    missing = [name for name in ("cert", "key", "ca") if getattr(lock, name) is None]
    if len(missing) < 3:
        raise ConfigError(f"[cluster] cert, key and ca belong together; missing: {', '.join(missing)}")
    return None


def _tokens(lock: ClusterLock) -> list[str]:
    """The first is sent, each is accepted."""
    if lock.token and lock.token_file:
        raise ConfigError("[cluster] has token and token_file: one of them is enough")
    if lock.token_file is None:
        tokens = [lock.token] if lock.token else []
    else:
        tokens = _read_tokens(lock.token_file)
    for token in tokens:
        # What a gRPC header can carry, and nobody can guess.
        if len(token) < TOKEN_CHARACTERS_MIN or not (token.isascii() and token.isprintable()):
            raise ConfigError(
                f"a cluster token has at least {TOKEN_CHARACTERS_MIN} characters of ASCII; "
                "`openssl rand -hex 32` makes one"
            )
    return tokens


def _read_tokens(file: Path) -> list[str]:
    try:
        tokens = file.read_text().split()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the cluster token in {file}: {error}") from error
    if not tokens:
        raise ConfigError(f"{file} holds no cluster token")
    return tokens


def _with_certificates(certificates: RenewedCertificates) -> Network:
    """Names and addresses of peers are not looked at: all nodes have one name."""
    options = [*channel_options(), ("grpc.ssl_target_name_override", CLUSTER_NAME)]

    def open_channel(address: str) -> grpc.aio.Channel:
        def open_with(now: Certificates) -> grpc.aio.Channel:
            credentials = grpc.ssl_channel_credentials(now.ca, now.key, now.cert)
            return grpc.aio.secure_channel(address, credentials, options=options)

        return RenewedChannel(certificates.current, open_with)

    def listen_secured(server: grpc.aio.Server, host: str, port: int) -> int:
        credentials = grpc.dynamic_ssl_server_credentials(
            _for_server(certificates.current()),
            lambda: _for_server(certificates.current()),  # asked at every handshake
            require_client_authentication=True,
        )
        return listen(server, host, port, credentials)

    return Network(open_channel, new_server, listen_secured, direct=True)


def _for_server(now: Certificates) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(now.key, now.cert)], root_certificates=now.ca)


def _with_token(network: Network, tokens: Sequence[str]) -> Network:
    return Network(
        lambda address: TokenChannel(network.open_channel(address), tokens[0]),
        partial(new_server, interceptors=[TokenCheck(tokens)]),
        network.listen,
        direct=network.direct,
    )


class TokenCheck(grpc.aio.ServerInterceptor):
    """Refuses calls without one of the tokens, before anything of their messages is read."""

    def __init__(self, tokens: Sequence[str], clock: Clock | None = None) -> None:
        self._tokens = [token.encode() for token in tokens]
        self._clock = clock or SystemClock()
        self._warned_s = -math.inf
        self._refused = 0
        self._refusal: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(self._refuse)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        given = [value for key, value in handler_call_details.invocation_metadata if key == TOKEN_KEY]
        if len(given) == 1 and self._accepts(given[0]):
            return await continuation(handler_call_details)
        return self._refusal

    def _accepts(self, given: str | bytes) -> bool:
        """In the same time for every wrong token of a length."""
        value = given.encode() if isinstance(given, str) else given
        return any(hmac.compare_digest(value, token) for token in self._tokens)

    async def _refuse(self, requests: Any, context: "grpc.aio.ServicerContext[Any, Any]") -> None:
        self._refused += 1
        now_s = self._clock.now()
        if now_s - self._warned_s >= _WARN_EVERY_S:
            logger.warning(
                "refused %d calls without the cluster's token, the last from %s",
                self._refused,
                context.peer(),
            )
            self._warned_s, self._refused = now_s, 0
        await abort(context, PeerRefused("the worker asks for its cluster's token, which the caller lacks"))
