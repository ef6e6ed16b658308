"""`diptych up`: a whole cluster on this machine, until Ctrl-C."""

import argparse
import asyncio
import os
from pathlib import Path
from typing import get_args

from router.state import Policy
from services.core.config import load_config
from services.core.usable_cores import usable_cores
from services.gateway.config import GatewayConfig
from services.gateway.door.exposure import check_exposure
from services.launch.cluster import ClusterPlan, LocalCluster, claim_port
from services.launch.cluster_state import ClusterState, remove_state, write_state
from services.launch.cores import describe_shares
from services.launch.display import Display
from services.launch.lock import load_lock, lock_of_its_own, lock_to_state
from services.launch.model import resolve_model
from services.launch.signals import run_until_signal
from services.model.home import diptych_home
from services.worker.config import WorkerConfig
from services.worker.quantization import BUILDING, choose_kv_dtype, choose_quantization

WORKER_FLAGS = ("dtype", "quantization", "kv_cache_dtype", "compile")  # of `up`, the same as a worker's


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("up", help="start a cluster on this machine", description=__doc__)
    parser.add_argument("--prefill", type=count, default=1, metavar="N", help="prefill workers (default: 1)")
    parser.add_argument("--decode", type=positive, default=1, metavar="N", help="decode workers (default: 1)")
    parser.add_argument("--host", default="127.0.0.1", help="the gateway's address (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="the gateway's port, 0: any (default: 8000)")
    parser.add_argument(
        "--model", default="", help="GGUF file or Hugging Face folder (default: SmolLM2-135M)"
    )
    _add_worker_flags(parser)
    parser.add_argument(
        "--redis",
        default="",
        metavar="URL",
        help="a Redis to use (default: start a Valkey); others can read command lines, so a URL with a "
        "password belongs into DIPTYCH_UP__REDIS",
    )
    parser.add_argument(
        "--threads",
        type=positive,
        default=0,
        metavar="N",
        help="per worker, always (default: an equal share of the cores, and with 8-bit weights what the "
        "other workers leave idle)",
    )
    parser.add_argument("--blocks", type=positive, default=0, metavar="N", help="KV blocks per worker")
    parser.add_argument(
        "--policy", default="", choices=get_args(Policy), help="how the gateway routes (default: cost)"
    )
    parser.add_argument(
        "--keys", default="", metavar="STORE", help="API keys that are let in: file:PATH (see `diptych keys`)"
    )
    parser.add_argument(
        "--open", action="store_true", help="without API keys, listen to other machines all the same"
    )
    parser.add_argument(
        "--config", type=Path, help="TOML file with [gateway], [worker] and [cluster] settings"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="show the parts' logs instead of writing files"
    )
    parser.set_defaults(run=run)


def _add_worker_flags(parser: argparse.ArgumentParser) -> None:
    """Those of WORKER_FLAGS; what is not given is what the workers' settings say."""
    parser.add_argument(
        "--dtype",
        default=argparse.SUPPRESS,
        choices=["float32", "bfloat16", "float16"],
        help="type of weights and activations (default: float32)",
    )
    parser.add_argument(
        "--quantization",
        default=argparse.SUPPRESS,
        choices=["auto", "int8", "none"],
        help="of the weights; int8: on a CPU, 2 to 6 times as fast, needs a C++ compiler once; auto: int8 "
        "where that is possible and --dtype is float32 (default: auto)",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default=argparse.SUPPRESS,
        choices=["auto", "float32", "int8"],
        help="type of KV; auto: int8 beside --quantization int8, else that of --dtype (default: auto)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        default=argparse.SUPPRESS,
        help="have torch compile the model's layers (see `diptych worker --help`)",
    )


def run(arguments: argparse.Namespace) -> int:
    display = Display()
    settings = gateway_settings(arguments)
    check_exposure(settings)
    chosen_port = claim_port(arguments.host, arguments.port)
    model = resolve_model(arguments.model, display)
    worker = worker_settings(arguments)
    plan = ClusterPlan(
        prefill=arguments.prefill,
        decode=arguments.decode,
        host=arguments.host,
        port=chosen_port,
        model=model,
        dtype=worker.dtype,
        quantization=decide_quantization(worker, display),
        compile=worker.compile,
        kv_cache_dtype=worker.kv_cache_dtype,
        logs=None if arguments.verbose else diptych_home() / "logs",
        redis=arguments.redis or os.environ.get("DIPTYCH_UP__REDIS", ""),
        threads=arguments.threads,
        blocks=arguments.blocks,
        config=arguments.config,
        policy=arguments.policy,
        lock=lock_of_its_own(load_lock(arguments)),
        keys=arguments.keys,
        open=arguments.open,
        tls_cert=settings.tls_cert,
    )
    display.line(describe_threads(plan, usable_cores()))
    try:
        run_until_signal(serve(plan, display))
    except asyncio.CancelledError:
        display.line("stopped")
    return 0


async def serve(plan: ClusterPlan, display: Display) -> None:
    """Run the cluster until cancelled."""
    cluster = LocalCluster(plan, display)
    state: ClusterState | None = None
    try:
        await cluster.start()
        cert = str(plan.tls_cert.absolute()) if plan.tls_cert else ""
        state = ClusterState(plan.gateway_url, cluster.redis_url, os.getpid(), lock_to_state(plan.lock), cert)
        write_state(state)
        host = f"[{plan.host}]" if ":" in plan.host else plan.host
        scheme = plan.gateway_url.partition("://")[0]
        print(f"ready {scheme}://{host}:{plan.port}/v1", flush=True)
        await asyncio.Event().wait()
    finally:
        display.line("stopping")
        if state is not None:
            remove_state(state)
        await cluster.stop()


def gateway_settings(arguments: argparse.Namespace) -> GatewayConfig:
    """What the gateway will read by itself, and from us. Raises ConfigError."""
    flags: dict[str, object] = {"host": arguments.host}
    flags |= {"keys": arguments.keys} if arguments.keys else {}
    flags |= {"open": True} if arguments.open else {}
    return load_config(GatewayConfig, "gateway", file=arguments.config, environ=os.environ, flags=flags)


def worker_settings(arguments: argparse.Namespace) -> WorkerConfig:
    """What all workers will read by themselves, and from us. Raises ConfigError."""
    given = vars(arguments)
    flags = {name: given[name] for name in WORKER_FLAGS if name in given}
    return load_config(WorkerConfig, "worker", file=given.get("config"), environ=os.environ, flags=flags)


def decide_quantization(worker: WorkerConfig, display: Display) -> str:
    """What `auto` is, for all workers alike; if kernels are needed, one process builds them.

    Raises ConfigError, also if the KV cannot have the type that is demanded.
    """
    chosen = choose_quantization(worker, lambda: display.line(BUILDING))
    display.line(str(chosen))
    choose_kv_dtype(worker, chosen.name)
    return chosen.name


def describe_threads(plan: ClusterPlan, cores: int) -> str:
    workers = plan.prefill + plan.decode
    if plan.threads:
        return f"threads: {plan.threads} per worker (--threads)"
    return f"threads: {describe_shares(cores, workers)}"


def count(text: str) -> int:
    return _int_between(text, 0, 1000)


def positive(text: str) -> int:
    return _int_between(text, 1, 1 << 31)


def port(text: str) -> int:
    return _int_between(text, 0, 65535)


def _int_between(text: str, least: int, most: int) -> int:
    if not text.isdecimal() or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from {least} to {most}")
    return int(text)
