"""Settings of one worker process."""

from dataclasses import dataclass, field
from typing import Literal

from services.core.worker_report import Role


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    role: Role = field(default="both", metadata={"help": "what this worker does: prefill, decode or both"})
    worker_id: str = field(
        default="", metadata={"help": "name in the cluster (default: role and a random suffix)"}
    )
    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    # gRPC itself would take 65536 + n for n.
    port: int = field(default=0, metadata={"help": "gRPC port (0: a free one)", "range": (0, 65535)})
    advertise_host: str = field(
        default="", metadata={"help": "address that others reach this worker by (default: --host)"}
    )
    metrics_port: int = field(
        default=0, metadata={"help": "port of /metrics and /health (0: a free one)", "range": (0, 65535)}
    )
    redis: str = field(default="", metadata={"help": "URL of the Redis that the cluster shares"})
    model: str = field(
        default="", metadata={"help": "GGUF file or Hugging Face folder (default: the default model)"}
    )
    served_model_name: str = field(
        default="", metadata={"help": "name that clients use (default: from the file)"}
    )
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "type of weights and activations"}
    )
    quantization: Literal["auto", "int8", "none"] = field(
        default="auto",
        metadata={
            "help": "of the weights; int8: on a CPU, 2 to 6 times as fast, needs a C++ compiler once; auto: "
            "int8 where that is possible and --dtype is float32"
        },
    )
    kv_cache_dtype: Literal["auto", "float32", "int8"] = field(
        default="auto",
        metadata={"help": "type of KV; auto: int8 beside --quantization int8, else that of --dtype"},
    )
    compile: bool = field(
        default=False,
        metadata={
            "help": "compute with torch, its layers compiled by torch.compile (not for --quantization int8). "
            "It has not paid yet: on a CPU a step takes 1.3 to 1.8 times as long as with the float32 kernels,"
            " on an H100 up to 1.4 times as long as with torch alone, and the first start some 7 s more"
        },
    )
    device: str = field(default="cpu", metadata={"help": "torch device"})
    threads: int = field(
        default=0,
        metadata={"help": "compute threads (0: all cores this process may use)", "range": (0, 1024)},
    )
    core_slots: str = field(
        default="",
        metadata={
            "help": "file by which workers of one machine lend each other idle cores for 8-bit steps; "
            "`diptych up` makes it"
        },
    )
    core_slot: int = field(
        default=0, metadata={"help": "this worker's place in --core-slots", "range": (0, 1023)}
    )
    block_size: int = field(default=16, metadata={"help": "tokens in a KV block"})
    kv_gib: float = field(default=1.0, metadata={"help": "memory for the KV pool, in GiB"})
    blocks: int = field(default=0, metadata={"help": "KV blocks in the pool (0: as many as --kv-gib holds)"})
    index_blocks_max: int = field(
        default=250_000,
        metadata={
            "help": "cached blocks that the cluster is told of; each takes about 70 bytes in Redis",
            "range": (0, 100_000_000),
        },
    )
    sequences_max: int = field(default=64, metadata={"help": "sequences that hold blocks at the same time"})
    waiting_max: int = field(
        default=64, metadata={"help": "sequences that may wait for blocks; more are refused"}
    )
    chunk_tokens_max: int = field(
        default=128, metadata={"help": "prompt tokens that one step computes at most"}
    )
    step_ms_target: float = field(
        default=45.0,
        metadata={"help": "length of a step that mixes decoding with prompt chunks, in milliseconds"},
    )
    lease_ttl_s: float = field(
        default=5.0, metadata={"help": "life of a KV lease after its calls have closed"}
    )
    pull_wait_s: float = field(
        default=5.0, metadata={"help": "how long prefill and pull wait for each other"}
    )
    step_overdue_s: float = field(
        default=2.5,
        metadata={
            "help": "an engine silent for so long (and four times what it expected) gets no work until it is "
            "back; its sequences go on elsewhere"
        },
    )
    step_stalled_s: float = field(
        default=20.0,
        metadata={"help": "an engine silent for so long (and ten times what it expected) is ended"},
    )
    transports: str = field(
        default="nixl,grpc",
        metadata={"help": "how KV may travel, best first; what a pair of workers both have is used"},
    )
    drain_grace_s: float = field(
        default=10.0, metadata={"help": "how long running sequences may finish after SIGTERM"}
    )
    drain_handover_s: float = field(
        default=2.0,
        metadata={"help": "how long before the end of that time they are handed over to other workers"},
    )
