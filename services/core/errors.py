"""Every error an operator or a client can meet, in one tree.

    DiptychError
    ├── BadRequest          the client's input is wrong; `param` names the field
    │   ├── UnknownModel    the client named a model that is not served
    │   ├── UnknownResponse the client named an answer that is not kept, or not for it
    │   └── Unanswerable    what the request allows leaves its answer no next token
    ├── InvalidKey          no API key came with a request, or one that nobody has (any more)
    ├── NotAllowed          the API key is good, but not for this
    ├── RateLimited         the API key has used up a limit; try again after `retry_after_s`
    ├── Overloaded          no room now; try again after `retry_after_s`
    ├── NoWorker            no live worker can take the request
    ├── WorkerLost          a worker or the connection to it died
    ├── PeerRefused         a worker does not take the caller, or the caller not it, for one of its cluster
    ├── Draining            a worker is about to stop and sends its work elsewhere
    ├── RoleChanged         a worker no longer does this kind of work
    ├── StoreUnavailable    Redis does not answer; index and membership are blind for now
    │   └── StoreFull       Redis answers, but has no memory for more
    ├── PullerLost          the decode side of a KV transfer never came
    ├── KvSourceLost        the prefill side of a KV transfer died or refused
    ├── KvLinkLost          the connection to the prefill side broke in a KV transfer
    ├── KvCorrupt           a KV payload failed its checksum
    ├── KvStale             a KV block was reused while a transfer still read it
    ├── LeaseExpired        the KV was read after its lease had ended
    ├── TransportUnavailable  a KV transport is not installed or does not work on this machine
    ├── Incompatible        two workers disagree on model, layout or wire version
    ├── DeadlineExceeded    the request's time is over
    ├── RequestCancelled    the client is gone, or the gateway gave up
    ├── ModelFileError      a model file is missing, truncated or unsupported
    ├── ConfigError         a configuration value is unknown or wrong
    ├── EngineFailed        the engine process died or broke an invariant
    └── EngineStalled       the engine process is overdue; it may go on, or be ended

`FACTS` gives each leaf its HTTP status, gRPC code, whether another attempt may help, and its
counter label. To add an error: add the class, and its row; a test proves that every leaf has one.
"""

from dataclasses import dataclass


class DiptychError(Exception):
    """An operating error. The message is written for the person who meets it."""

    param: str | None = None

    @property
    def message(self) -> str:
        return str(self)


class BadRequest(DiptychError):
    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code  # OpenAI's, where its clients look for one, such as "context_length_exceeded"


class UnknownModel(BadRequest):
    pass


class UnknownResponse(BadRequest):
    pass


class Unanswerable(BadRequest):
    def __init__(self, message: str) -> None:
        super().__init__(message, code="unanswerable")


class InvalidKey(DiptychError):
    pass


class NotAllowed(DiptychError):
    pass


class RateLimited(DiptychError):
    def __init__(self, message: str, limit: str = "requests", retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.limit = limit  # requests, tokens or concurrent
        self.retry_after_s = retry_after_s


class Overloaded(DiptychError):
    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NoWorker(DiptychError):
    retry_after_s = 1.0


class WorkerLost(DiptychError):
    pass


class PeerRefused(DiptychError):
    pass


class Draining(DiptychError):
    pass


class RoleChanged(DiptychError):
    pass


class StoreUnavailable(DiptychError):
    pass


class StoreFull(StoreUnavailable):
    pass


class PullerLost(DiptychError):
    pass


class KvSourceLost(DiptychError):
    pass


class KvLinkLost(DiptychError):
    pass


class KvCorrupt(DiptychError):
    pass


class KvStale(DiptychError):
    pass


class LeaseExpired(DiptychError):
    pass


class TransportUnavailable(DiptychError):
    pass


class Incompatible(DiptychError):
    pass


class DeadlineExceeded(DiptychError):
    pass


class RequestCancelled(DiptychError):
    pass


class ModelFileError(DiptychError):
    pass


class ConfigError(DiptychError):
    pass


class EngineFailed(DiptychError):
    pass


class EngineStalled(DiptychError):
    pass


@dataclass(frozen=True, slots=True)
class Facts:
    """What the edges need to know about an error."""

    http_status: int
    grpc_code: str  # a name in grpc.StatusCode; this package does not know grpc
    retryable: bool  # another attempt, elsewhere or later, may succeed
    label: str  # the `error` label of counters and the `code` of wire messages


FACTS: dict[type[DiptychError], Facts] = {
    BadRequest: Facts(400, "INVALID_ARGUMENT", False, "bad_request"),
    UnknownModel: Facts(404, "NOT_FOUND", False, "unknown_model"),
    UnknownResponse: Facts(404, "NOT_FOUND", False, "unknown_response"),
    Unanswerable: Facts(400, "INVALID_ARGUMENT", False, "unanswerable"),
    InvalidKey: Facts(401, "UNAUTHENTICATED", False, "invalid_api_key"),
    NotAllowed: Facts(403, "PERMISSION_DENIED", False, "not_allowed"),
    RateLimited: Facts(429, "RESOURCE_EXHAUSTED", False, "rate_limit_exceeded"),
    Overloaded: Facts(429, "RESOURCE_EXHAUSTED", True, "overloaded"),
    NoWorker: Facts(503, "UNAVAILABLE", True, "no_worker"),
    WorkerLost: Facts(503, "UNAVAILABLE", True, "worker_lost"),
    PeerRefused: Facts(503, "UNAUTHENTICATED", True, "peer_refused"),
    Draining: Facts(503, "UNAVAILABLE", True, "draining"),
    RoleChanged: Facts(503, "UNAVAILABLE", True, "role_changed"),
    StoreUnavailable: Facts(503, "UNAVAILABLE", True, "store_unavailable"),
    StoreFull: Facts(503, "UNAVAILABLE", True, "store_full"),
    PullerLost: Facts(503, "ABORTED", True, "puller_lost"),
    KvSourceLost: Facts(503, "ABORTED", True, "kv_source_lost"),
    KvLinkLost: Facts(503, "ABORTED", True, "kv_link_lost"),
    KvCorrupt: Facts(503, "DATA_LOSS", True, "kv_corrupt"),
    KvStale: Facts(503, "ABORTED", True, "kv_stale"),
    LeaseExpired: Facts(503, "ABORTED", True, "lease_expired"),
    TransportUnavailable: Facts(503, "UNAVAILABLE", False, "transport_unavailable"),
    Incompatible: Facts(500, "FAILED_PRECONDITION", True, "incompatible"),
    DeadlineExceeded: Facts(504, "DEADLINE_EXCEEDED", False, "deadline_exceeded"),
    RequestCancelled: Facts(499, "CANCELLED", False, "cancelled"),
    ModelFileError: Facts(500, "FAILED_PRECONDITION", False, "model_file"),
    ConfigError: Facts(500, "FAILED_PRECONDITION", False, "config"),
    EngineFailed: Facts(503, "INTERNAL", True, "engine_failed"),
    EngineStalled: Facts(503, "UNAVAILABLE", True, "engine_stalled"),
}

BY_LABEL: dict[str, type[DiptychError]] = {facts.label: kind for kind, facts in FACTS.items()}


def facts(error: DiptychError) -> Facts:
    return FACTS[type(error)]


def from_label(label: str, message: str) -> DiptychError:
    """The error a peer reported by its label; an unknown label (a newer peer) is a WorkerLost."""
    return BY_LABEL.get(label, WorkerLost)(message)
