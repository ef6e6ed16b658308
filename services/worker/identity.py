"""What a worker is before it runs: its model, its KV pool's shape, its name and incarnation."""

import logging
import secrets
from dataclasses import dataclass
from pathlib import Path

from services.core.block_hash import Compatibility
from services.core.errors import ConfigError
from services.core.usable_cores import usable_cores
from services.core.worker_report import WorkerKey
from services.engine.incarnation import random_epoch
from services.engine.messages import SharedCores
from services.model.files import ModelFiles, open_model
from services.model.pool_geometry import PoolGeometry
from services.model.pull import ensure_default_model
from services.worker.config import WorkerConfig
from services.worker.quantization import BUILDING, choose_kv_dtype, choose_quantization
from services.worker.transports import parse_transports

_BLOCK_SIZE_MAX = 512
# The scheme that an option stands for: another scheme gives other numbers, so it needs another name.
_QUANTIZATIONS = {"none": "none", "int8": "w4w8a8-g32"}  # weights of 4 or 8 bits, groups of 32: kernels/cpu
_KV_INT8 = "int8-spread"  # 8 bits, one scale per token and head, keys spread: kernels/cpu/source/pool.h

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    key: WorkerKey
    files: ModelFiles
    served_model: str
    geometry: PoolGeometry
    compatibility: Compatibility
    context_tokens_max: int
    threads: int
    cores: SharedCores | None = None  # with other workers of this machine


def identify(config: WorkerConfig) -> WorkerIdentity:
    """Read the model's header and size the pool; build the kernels that are needed.

    Raises ModelFileError or ConfigError.
    """
    _check(config)
    quantization = _quantization(config)
    files = open_model(Path(config.model) if config.model else ensure_default_model())
    geometry = _pool_geometry(config, files, choose_kv_dtype(config, quantization))
    served_model = config.served_model_name or files.name
    return WorkerIdentity(
        key=WorkerKey(config.worker_id or f"{config.role}-{secrets.token_hex(3)}", random_epoch()),
        files=files,
        served_model=served_model,
        geometry=geometry,
        compatibility=Compatibility(
            model=served_model,
            revision=files.revision(),
            quantization=_QUANTIZATIONS[quantization],
            kv_dtype=_KV_INT8 if geometry.dtype == "int8" else geometry.dtype,
            block_size=config.block_size,
            layout=geometry.layout,
        ),
        context_tokens_max=min(files.config.context_tokens_max, geometry.blocks * config.block_size),
        threads=config.threads or usable_cores(),
        cores=_shared_cores(config),
    )


def _shared_cores(config: WorkerConfig) -> SharedCores | None:
    if not config.core_slots:
        return None
    return SharedCores(config.core_slots, config.core_slot, usable_cores())


def _quantization(config: WorkerConfig) -> str:
    chosen = choose_quantization(config, lambda: logger.info(BUILDING))
    logger.log(logging.WARNING if chosen.slower else logging.INFO, "%s", chosen)
    return chosen.name


def _pool_geometry(config: WorkerConfig, files: ModelFiles, dtype: str) -> PoolGeometry:
    one = files.config.pool_geometry(1, config.block_size, dtype)
    blocks = config.blocks or int(config.kv_gib * 2**30) // one.block_bytes
    if blocks < 1:
        raise ConfigError(f"--kv-gib {config.kv_gib} holds no KV block: one takes {one.block_bytes} bytes")
    return files.config.pool_geometry(blocks, config.block_size, dtype)


def _check(config: WorkerConfig) -> None:
    if not config.redis:
        raise ConfigError(
            "--redis is needed: the URL of the Redis that the cluster shares (`diptych up` starts one)"
        )
    if not 1 <= config.block_size <= _BLOCK_SIZE_MAX:
        raise ConfigError(f"--block-size must be 1 to {_BLOCK_SIZE_MAX}, not {config.block_size}")
    parse_transports(config.transports)
    positive = (
        "sequences_max",
        "waiting_max",
        "chunk_tokens_max",
        "step_ms_target",
        "step_overdue_s",
        "step_stalled_s",
        "lease_ttl_s",
        "pull_wait_s",
    )
    for name in positive:
        if getattr(config, name) <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0")
