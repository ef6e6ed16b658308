"""`diptych keys`: makes, shows and withdraws API keys. Gateways notice within a second."""

import argparse
import asyncio
import json
import os
import re
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
from rich.console import Console
from rich.table import Table

from services.core.config import load_config
from services.core.errors import ConfigError
from services.gateway.config import GatewayConfig
from services.keys import changes
from services.keys.api_key import ApiKey, KeyLimits, KeyPriority
from services.keys.open_keys import open_keys
from services.keys.protocol import KeyStore
from services.launch.cluster_state import read_state

T = TypeVar("T")

_LIMITS = ("requests_per_minute", "tokens_per_minute", "concurrent")
_UNITS = {"m": "minutes", "h": "hours", "d": "days"}


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("keys", help="make, show and withdraw API keys", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key and print it, this one time")
    create.add_argument("name", metavar="NAME", help="whose it is: in metrics, logs and lists")
    create.add_argument("--cache-group", metavar="NAME", help="keys of one group share cached prompts")
    listing = actions.add_parser("list", help="show the keys' records, never the keys")
    listing.add_argument("--json", action="store_true", help="print all that is kept but digests and salts")
    setting = actions.add_parser("set", help="change what a key may do")
    revoke = actions.add_parser("revoke", help="refuse a key from now on; its running answers finish")
    rotate = actions.add_parser("rotate", help="make a new key for a record; the old one is refused")
    for action in (setting, revoke, rotate):
        action.add_argument("name", metavar="NAME", help="the key's name or id")
    for action in (create, setting):
        _add_permissions(action)
    for action, run in (
        *((create, run_create), (listing, run_list), (setting, run_set)),
        *((revoke, run_revoke), (rotate, run_rotate)),
    ):
        _add_store_flags(action)
        action.set_defaults(run=run)


def _add_permissions(parser: argparse.ArgumentParser) -> None:
    for limit in _LIMITS:
        flag = "--" + limit.replace("_", "-")
        help_text = "limit at all gateways together; 0: none"
        parser.add_argument(flag, type=_limit, metavar="N", default=argparse.SUPPRESS, help=help_text)
    parser.add_argument(
        "--priority",
        default=argparse.SUPPRESS,
        choices=get_args(KeyPriority),
        help="of its requests, which may ask for less (default: normal)",
    )
    parser.add_argument(
        "--expires",
        type=_moment,
        default=argparse.SUPPRESS,
        metavar="WHEN",
        help="90d, 12h, 30m, a date, or never",
    )
    parser.add_argument(
        "--admin",
        action=argparse.BooleanOptionalAction,
        default=argparse.SUPPRESS,
        help="may ask about the cluster itself (/v1/cluster)",
    )


def _add_store_flags(parser: argparse.ArgumentParser) -> None:
    """As the gateway's own, from the same sources."""
    parser.add_argument("--keys", metavar="STORE", help="file:PATH or redis, as the gateway's --keys")
    parser.add_argument("--redis", metavar="URL", help="default: of the cluster that `diptych up` runs here")
    parser.add_argument("--config", type=Path, help="TOML file with a [gateway] section that names them")


def run_create(arguments: argparse.Namespace) -> int:
    given = _given(arguments)
    limits = KeyLimits(**given.pop("limits"))
    key, secret = _run(
        arguments,
        lambda store, now: changes.create(
            store, arguments.name, now, limits=limits, cache_group=arguments.cache_group, **given
        ),
    )
    _show_secret(key, secret)
    return 0


def run_rotate(arguments: argparse.Namespace) -> int:
    key, secret = _run(arguments, lambda store, now: changes.rotate(store, arguments.name, now))
    _show_secret(key, secret)
    return 0


def run_set(arguments: argparse.Namespace) -> int:
    given = _given(arguments)
    key = _run(arguments, lambda store, now: changes.change(store, arguments.name, now, **given))
    Console().print(table([key]))
    return 0


def run_revoke(arguments: argparse.Namespace) -> int:
    key = _run(arguments, lambda store, now: changes.revoke(store, arguments.name, now))
    print(f"{key.name} ({key.id}) is revoked")
    return 0


def run_list(arguments: argparse.Namespace) -> int:
    async def read(store: KeyStore, now: datetime) -> tuple[ApiKey, ...]:
        kept = await store.read()
        return kept.keys if kept is not None else ()

    keys = _run(arguments, read)
    if arguments.json:
        print(json.dumps([_shown(key) for key in keys], indent=2))
    elif keys:
        Console().print(table(keys))
    else:
        print("no keys")
    return 0


def table(keys: "list[ApiKey] | tuple[ApiKey, ...]") -> Table:
    result = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("name", "id", "state"):
        result.add_column(heading, no_wrap=True)
    for heading in ("req/min", "tok/min", "concurrent"):
        result.add_column(heading, justify="right", no_wrap=True)
    for heading in ("priority", "created"):
        result.add_column(heading, no_wrap=True)
    now = datetime.now(UTC)
    for key in keys:
        limits = (getattr(key.limits, limit) for limit in _LIMITS)
        state = key.ended(now) or ("admin" if key.admin else "ok")
        shown = ("-" if limit is None else str(limit) for limit in limits)
        result.add_row(key.name, key.id, state, *shown, key.priority, f"{key.created:%Y-%m-%d}")
    return result


def _shown(key: ApiKey) -> dict[str, Any]:
    record: dict[str, Any] = msgspec.to_builtins(key)
    return {name: value for name, value in record.items() if name not in ("digest", "salt")}


def _show_secret(key: ApiKey, secret: str) -> None:
    """The key alone on stdout, for scripts."""
    print(f"the key of {key.name} ({key.id}); it is shown this one time:", file=sys.stderr)
    print(secret)


def _run(arguments: argparse.Namespace, work: Callable[[KeyStore, datetime], Awaitable[T]]) -> T:
    async def run() -> T:
        store = _open_store(arguments)
        try:
            return await work(store, datetime.now(UTC))
        finally:
            await store.close()

    return asyncio.run(run())


def _open_store(arguments: argparse.Namespace) -> KeyStore:
    flags = {name: vars(arguments)[name] for name in ("keys", "redis") if vars(arguments)[name] is not None}
    config = load_config(GatewayConfig, "gateway", file=arguments.config, environ=os.environ, flags=flags)
    if not config.keys:
        raise ConfigError("say where the keys are: --keys file:PATH, or --keys redis (with --redis URL)")
    running = read_state() if config.keys == "redis" and not config.redis else None
    return open_keys(config.keys, config.redis or (running.redis_url if running else ""))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags say, as fields of a record."""
    given = vars(arguments)
    limits = {limit: given[limit] for limit in _LIMITS if limit in given}
    fields: dict[str, Any] = {name: given[name] for name in ("priority", "admin", "expires") if name in given}
    return fields | {"limits": limits}


def _moment(text: str) -> datetime | None:
    """From now on, or a date (its beginning, in UTC if it names no zone); None: never."""
    if text == "never":
        return None
    if spelled := re.fullmatch(r"(\d{1,6})([mhd])", text):
        return datetime.now(UTC).replace(microsecond=0) + timedelta(
            **{_UNITS[spelled.group(2)]: int(spelled.group(1))}
        )
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither 90d, 12h or 30m nor a date") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _limit(text: str) -> int | None:
    if not text.isdecimal() or int(text) > 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number")
    return int(text) or None
