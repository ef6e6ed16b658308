"""Settings of one gateway process."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from router.state import Policy
from services.gateway.door.tenant import CacheSharing
from services.gateway.text.tool_calls.family import ToolParserName


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "HTTP port (0: a free one)", "range": (0, 65535)})
    tls_cert: Path | None = field(
        default=None,
        metadata={"help": "certificate for clients (PEM, with intermediate ones): the API speaks https"},
    )
    tls_key: Path | None = field(default=None, metadata={"help": "its private key (PEM)"})
    connections_max: int = field(
        default=4096,
        metadata={"help": "connections of clients at the same time; more get 503", "range": (1, 1_000_000)},
    )
    redis: str = field(default="", metadata={"help": "URL of the Redis that the cluster shares"})
    keys: str = field(
        default="",
        metadata={
            "help": "API keys that are let in: file:PATH, or redis for those in --redis (see "
            "`diptych keys`); none: anybody, so the gateway listens to this machine only"
        },
    )
    open: bool = field(
        default=False,
        metadata={
            "help": "without API keys, listen to other machines too: something in front checks who asks"
        },
    )
    model: str = field(
        default="", metadata={"help": "GGUF file or Hugging Face folder (default: the default model)"}
    )
    served_model_name: str = field(
        default="", metadata={"help": "name that clients use (default: from the file)"}
    )
    route_split: Literal["auto", "always", "never"] = field(
        default="auto",
        metadata={"help": "prefill and decode on two workers: by cost, whenever possible, or never"},
    )
    policy: Policy = field(
        default="cost",
        metadata={"help": "how workers are chosen: by predicted milliseconds, or as simpler routers do"},
    )
    prefix_fetch: bool = field(
        default=True,
        metadata={"help": "workers fetch cached prefixes from each other when that beats computing them"},
    )
    cache_sharing: CacheSharing = field(
        default="key",
        metadata={
            "help": "cached prompts are shared between requests of one API key, or of the whole cluster; "
            "the request's cache_salt separates further"
        },
    )
    inflight_max: int = field(
        default=1024,
        metadata={
            "help": "requests in this gateway at the same time, those that wait included; more get 429"
        },
    )
    queue_length_max: int = field(
        default=512, metadata={"help": "answers that may wait for a worker; more requests get 429"}
    )
    queue_tokens_max: int = field(
        default=1 << 20,
        metadata={
            "help": "tokens that those who wait want computed, expected answers included; more get 429"
        },
    )
    queue_tenant_share: float = field(
        default=0.5, metadata={"help": "of both, the most for one API key (or for all without one)"}
    )
    queue_decode_pools_max: float = field(
        default=16.0,
        metadata={
            "help": "KV that all answers will need, running and waiting, in multiples of what the decode "
            "workers hold; more get 429"
        },
    )
    ttft_max_s: float = field(
        default=120.0,
        metadata={
            "help": "a request whose first token would come later gets 429; a request may ask for another "
            "time (ttft_max_s in its body)"
        },
    )
    worker_queue_ms_max: float = field(
        default=300.0,
        metadata={
            "help": "a worker gets no further prompt while those it has take longer to compute: they wait in "
            "the gateway, in fair order"
        },
    )
    decode_share: float = field(
        default=1.0,
        metadata={
            "help": "of a decode worker's KV blocks, how much answers may be expected to need; above 1 more "
            "run at once, and some are preempted"
        },
    )
    request_timeout_s: float = field(
        default=600.0, metadata={"help": "a request that takes longer ends with an error"}
    )
    admission_timeout_s: float = field(
        default=120.0,
        metadata={
            "help": "how long a request may wait for a worker with room; also an answer that has begun"
        },
    )
    no_worker_timeout_s: float = field(
        default=15.0, metadata={"help": "how long a request may wait when no worker is alive at all"}
    )
    attempts_max: int = field(
        default=4,
        metadata={"help": "attempts of a request that may fail in a row; waiting for room is not counted"},
    )
    attempts_total_max: int = field(
        default=16, metadata={"help": "the same over the whole request, tokens between them or not"}
    )
    choices_max: int = field(
        default=128, metadata={"help": "the largest n: answers to one prompt", "range": (1, 128)}
    )
    tool_parser: ToolParserName = field(
        default="auto",
        metadata={"help": "how the model writes tool calls: as its chat template tells, or by name"},
    )
    trust_request_chat_template: bool = field(
        default=False, metadata={"help": "take chat templates, which are programs, from requests"}
    )
    template_timeout_s: float = field(
        default=2.0,
        metadata={"help": "processor time that a chat template may take for one prompt", "range": (0.01, 60)},
    )
    answers_max: int = field(
        default=256,
        metadata={"help": "answers in one request: its prompts times n", "range": (1, 2048)},
    )
    # JSON is read on the event loop: 2 MiB of very many small values take 40 to 70 ms.
    body_bytes_max: int = field(
        default=2 << 20,
        metadata={"help": "larger request bodies get 413; raise it for contexts beyond 100,000 tokens"},
    )
    strict: bool = field(
        default=False,
        metadata={"help": "requests with fields that nobody knows get 400; else they are ignored"},
    )
    bodies_bytes_max: int = field(
        default=256 << 20, metadata={"help": "of all requests in this gateway together; more get 429"}
    )
    responses_ttl_s: float = field(
        default=3600.0,
        metadata={"help": "how long answers of /v1/responses are kept, for requests that go on from them"},
    )
    responses_bytes_max: int = field(
        default=1 << 20,
        metadata={"help": "the most that one of them, with the conversation before it, may take in Redis"},
    )
    membership_poll_s: float = field(
        default=0.1, metadata={"help": "how often to read which workers there are"}
    )
    drain_delay_s: float = field(
        default=0.0,
        metadata={
            "help": "how long to go on accepting requests after SIGTERM, with /health/ready at 503, so that "
            "load balancers notice (behind Kubernetes: 5)"
        },
    )
    drain_grace_s: float = field(
        default=10.0, metadata={"help": "how long running answers may finish after SIGTERM"}
    )
    seed: int = field(
        default=0,
        metadata={"help": "of equal routes, waiting times and seeds that clients leave out (0: from the OS)"},
    )
    log_level: str = field(default="INFO", metadata={"help": "DEBUG, INFO, WARNING or ERROR"})
