"""`diptych doctor`: whether this machine can run Diptych, and how fast KV moves here.

Exit code 1 if something is broken that serving needs; a warning names what only some need.
"""

import argparse
import json
from collections.abc import Callable, Iterable

import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.launch import checks
from services.launch.checks import Finding
from services.launch.display import Display
from services.launch.transport_check import check_transports
from services.launch.up import port

_COLOURS = {"ok": "green", "warning": "yellow", "broken": "red"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "doctor", help="check what this machine can do", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--redis", default="", metavar="URL", help="the Redis to check (default: a Valkey)")
    parser.add_argument(
        "--model", default="", help="GGUF file or Hugging Face folder (default: SmolLM2-135M)"
    )
    parser.add_argument("--device", default="cpu", help="torch device of workers (default: cpu)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, default=8000, help="the gateway's port (default: 8000)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    findings: list[Finding] = []
    for name, check in _checks(arguments):
        with Display().doing(f"checking {name}"):
            found = check()
            findings += [found] if isinstance(found, Finding) else found
    if arguments.json:
        print(json.dumps(msgspec.to_builtins(findings), indent=2))
    else:
        Console().print(table(findings))
    return 1 if any(finding.state == "broken" for finding in findings) else 0


def table(findings: list[Finding]) -> Table:
    result = Table(box=None, padding=(0, 2, 0, 0))
    result.add_column("check", no_wrap=True)
    result.add_column("state", no_wrap=True)
    result.add_column("found", overflow="fold")
    for finding in findings:
        colour = _COLOURS[finding.state]
        result.add_row(finding.check, f"[{colour}]{finding.state}[/]", escape(finding.detail))
    return result


def _checks(given: argparse.Namespace) -> list[tuple[str, Callable[[], Finding | Iterable[Finding]]]]:
    """The quick ones first."""
    return [
        ("python", checks.check_python),
        ("packages", checks.check_packages),
        ("ports", lambda: checks.check_ports(given.host, given.port)),
        ("redis", lambda: checks.check_redis(given.redis)),
        ("model", lambda: checks.check_model(given.model)),
        ("cores", checks.check_cores),
        ("kernels (builds them once)", lambda: checks.check_kernels(given.device)),
        ("device", lambda: checks.check_device(given.device)),
        ("transports", check_transports),
    ]
