"""Fields that nobody knows: ignored with one warning, or refused by a strict gateway, at every depth."""

import pytest

from services.gateway.api import fields
from tests.unit.gateway.in_memory_cluster import MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
NESTED = [
    ({"brand_new": 1}, "brand_new"),
    ({"stream": True, "stream_options": {"include_usage": True, "often": 1}}, "stream_options.often"),
    ({"messages": [*CHAT["messages"], {"role": "user", "content": "a", "mood": "ill"}]}, "messages[1].mood"),
    (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "loud": True}]}]},
        "messages[0].content[0].loud",
    ),
]
KNOWN = [
    {"metadata": {"a": "b"}, "store": False, "safety_identifier": "me"},
    {"messages": [{"role": "assistant", "content": "a", "refusal": None, "annotations": [], "audio": None}]},
    {"logit_bias": {}, "echo": False, "tools": []},
]


@pytest.fixture
def network() -> bool:
    return False


@pytest.fixture(autouse=True)
def nobody_was_warned(monkeypatch) -> None:
    monkeypatch.setattr(fields, "_warned", set())


async def ask(cluster, **changes):
    return await cluster.http.post("/v1/chat/completions", json=CHAT | changes)


@pytest.mark.parametrize(("change", "param"), NESTED, ids=[param for _, param in NESTED])
async def test_they_are_ignored_with_one_warning_for_each_name(cluster, caplog, change, param) -> None:
    for _ in range(2):
        assert (await ask(cluster, **change)).status_code == 200
    assert len([record for record in caplog.records if "unknown request field" in record.message]) == 1
    assert param.split(".")[-1] in caplog.text


@pytest.mark.parametrize(("change", "param"), NESTED, ids=[param for _, param in NESTED])
async def test_a_strict_gateway_refuses_them_by_name(start_cluster, change, param) -> None:
    cluster = await start_cluster(strict=True)
    answered = await ask(cluster, **change)
    error = answered.json()["error"]
    assert (answered.status_code, error["param"], error["code"]) == (400, param, "unknown_parameter")
    assert cluster.workers.calls == []


@pytest.mark.parametrize("known", KNOWN, ids=str)
async def test_a_strict_gateway_accepts_what_is_known_to_do_nothing(start_cluster, caplog, known) -> None:
    cluster = await start_cluster(strict=True)
    assert (await ask(cluster, **known)).status_code == 200
    assert "unknown request field" not in caplog.text


async def test_warnings_take_bounded_memory(cluster, caplog) -> None:
    for number in range(3):
        await ask(cluster, **{f"new_{number}_{n}": 1 for n in range(500)})
    assert len(fields._warned) == 1000
    assert len([record for record in caplog.records if "unknown request field" in record.message]) == 1000


@pytest.mark.parametrize("part", ["body", "messages"])
async def test_very_many_are_refused_at_once(cluster, part) -> None:
    many = {f"x{number}": number for number in range(3000)}
    message = {"role": "user", "content": "hi", **(many if part == "messages" else {})}
    body = {"model": MODEL, "messages": [message], **(many if part == "body" else {})}
    assert (await cluster.http.post("/v1/chat/completions", json=body)).status_code == 400
