"""`diptych role`: changes what a running worker does. What it has begun it finishes; no request fails.

The role lasts until the worker's process ends: a restarted worker has the role it was started with.
"""

import argparse
import asyncio
import sys
from collections.abc import Sequence
from typing import get_args

from services.core.errors import NoWorker
from services.core.worker_report import Role, WorkerReport, has_part
from services.launch.cluster_state import read_state
from services.launch.lock import add_lock_flags, load_lock, lock_from_state
from services.launch.reports import add_source_flags, read_reports
from services.wire.cluster_lock import ClusterLock, lock_network
from services.wire.control import set_role

ANSWER_TIMEOUT_SECONDS = 5.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("role", help="change the role of a running worker", description=__doc__)
    parser.add_argument("worker", metavar="WORKER", help="its name, as `diptych status` shows it")
    parser.add_argument("role", choices=get_args(Role), help="what it is to do from now on")
    add_source_flags(parser)
    add_lock_flags(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    reports = read_reports(arguments)
    worker = find(reports, arguments.worker)
    role: Role = arguments.role
    previous = asyncio.run(_set_role(_lock(arguments), worker, role))
    print(f"{worker.worker_id}: {previous} -> {role}")
    if not decodes_without(reports, worker, role):
        print("warning: no worker decodes now; requests wait for one", file=sys.stderr)
    return 0


async def _set_role(lock: ClusterLock, worker: WorkerReport, role: Role) -> str:
    network = lock_network(lock)
    return await set_role(network, worker.address, worker.worker_id, role, ANSWER_TIMEOUT_SECONDS)


def _lock(arguments: argparse.Namespace) -> ClusterLock:
    """What was given, or else what the cluster of `diptych up` is known to ask for."""
    given, state = load_lock(arguments), read_state()
    if given.is_locked or arguments.redis or arguments.url or state is None:
        return given
    return lock_from_state(state.lock)


def find(reports: Sequence[WorkerReport], worker_id: str) -> WorkerReport:
    """Raises NoWorker, with the names there are."""
    for report in reports:
        if report.worker_id == worker_id:
            return report
    names = ", ".join(report.worker_id for report in reports) or "none"
    raise NoWorker(f"no worker is called {worker_id!r}; alive: {names}")


def decodes_without(reports: Sequence[WorkerReport], worker: WorkerReport, role: Role) -> bool:
    """Whether anybody still decodes when `worker` has `role`."""
    others = [report for report in reports if report.worker_id != worker.worker_id]
    return has_part(role, "decode") or any(other.decodes and other.state == "ready" for other in others)
