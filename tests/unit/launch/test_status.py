"""`diptych status` shows what the workers report."""

import asyncio
import json
from io import StringIO

import msgspec
import pytest
from rich.console import Console

from services.core.block_hash import Compatibility
from services.core.errors import StoreUnavailable
from services.core.worker_report import WorkerReport
from services.launch.cli import main
from services.launch.status import shares, table
from services.membership.redis_membership import RedisMembership

REPORT = WorkerReport(
    worker_id="decode-7",
    epoch=1,
    role="decode",
    state="ready",
    address="127.0.0.1:5",
    served_model="tiny",
    compatibility=Compatibility(model="tiny", revision="r", layout="l"),
    context_tokens_max=100,
    blocks_total=100,
    blocks_free=60,
    blocks_cached=30,
    running=3,
    prompt_tokens=400,
    prefix_hit_tokens=100,
)


def test_shares_follow_from_the_report() -> None:
    assert shares(REPORT) == {"blocks_used": 10, "prefix_hit_rate": 0.25}


def test_a_worker_without_requests_has_no_hit_rate() -> None:
    idle = WorkerReport(
        worker_id="w",
        epoch=1,
        role="both",
        state="ready",
        address="a",
        served_model="m",
        compatibility=REPORT.compatibility,
        context_tokens_max=1,
    )
    assert shares(idle)["prefix_hit_rate"] is None


def test_the_table_has_a_row_per_worker() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(table([REPORT]))
    assert isinstance(console.file, StringIO)
    row = next(line for line in console.file.getvalue().splitlines() if "decode-7" in line)
    assert row.split() == ["decode-7", "decode", "ready", "3", "0", "0", "10", "30", "100", "25%"]


def test_a_worker_s_name_is_shown_as_it_is() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(table([msgspec.structs.replace(REPORT, worker_id="gpu[a]")]))
    assert isinstance(console.file, StringIO)
    assert "gpu[a]" in console.file.getvalue()


async def announce(url: str, *reports: WorkerReport) -> None:
    membership = RedisMembership(url, ttl_s=60)
    for report in reports:
        await membership.announce(report)
    await membership.close()


def test_json_has_all_that_is_in_redis(valkey_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    asyncio.run(announce(valkey_url, REPORT))
    assert main(["status", "--redis", valkey_url, "--json"]) == 0
    workers = {worker["worker_id"]: worker for worker in json.loads(capsys.readouterr().out)}
    assert workers["decode-7"]["blocks_used"] == 10
    assert workers["decode-7"]["served_model"] == "tiny"


def test_workers_that_cannot_share_requests_are_told_of_with_the_reason(
    valkey_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quantised = Compatibility(model="tiny", revision="r", layout="l", quantization="w4w8a8-g32")
    alone = msgspec.structs.replace(REPORT, worker_id="prefill-7", role="prefill", compatibility=quantised)
    asyncio.run(announce(valkey_url, REPORT, alone))
    assert main(["status", "--redis", valkey_url]) == 0
    said = " ".join(capsys.readouterr().out.split())
    why = "no KV can move between it and decode-7: quantization: w4w8a8-g32 != none"
    assert f"prefill-7 shares no request with another worker: {why}" in said


def test_an_absent_redis_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--redis", "redis://127.0.0.1:1"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diptych: ")
    assert StoreUnavailable.__name__ not in line
