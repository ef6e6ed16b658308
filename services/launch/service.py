"""`diptych gateway` and `diptych worker`: one process each, in the foreground."""

import argparse
import os
from pathlib import Path

from services.core.config import add_flags, given_flags, load_config
from services.gateway.config import GatewayConfig
from services.launch.lock import add_lock_flags, load_lock
from services.worker.config import WorkerConfig


def add_parsers(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    gateway = commands.add_parser("gateway", help="run one gateway: the OpenAI API in front of workers")
    worker = commands.add_parser("worker", help="run one worker: prefill, decode or both")
    for parser in (gateway, worker):
        parser.add_argument("--config", type=Path, help="TOML file with [gateway], [worker], [cluster]")
        add_lock_flags(parser)
    add_flags(gateway, GatewayConfig)
    add_flags(worker, WorkerConfig)
    gateway.set_defaults(run=run_gateway)
    worker.set_defaults(run=run_worker)


def run_gateway(arguments: argparse.Namespace) -> int:
    flags = given_flags(GatewayConfig, arguments)
    config = load_config(GatewayConfig, "gateway", file=arguments.config, environ=os.environ, flags=flags)
    # Imported here: a gateway must not load torch, nor a worker the web framework.
    from services.gateway.main import run

    run(config, load_lock(arguments))
    return 0


def run_worker(arguments: argparse.Namespace) -> int:
    flags = given_flags(WorkerConfig, arguments)
    config = load_config(WorkerConfig, "worker", file=arguments.config, environ=os.environ, flags=flags)
    from services.worker.main import run

    run(config, load_lock(arguments))
    return 0
