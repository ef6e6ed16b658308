"""`diptych keys` changes what gateways read, and shows a key once."""

import asyncio
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.keys.api_key import ApiKey, KeyLimits
from services.keys.open_keys import open_keys
from services.launch.cli import main


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DIPTYCH_GATEWAY__KEYS", f"file:{tmp_path}/keys.jsonl")
    return f"file:{tmp_path}/keys.jsonl"


def kept(store: str, redis: str = "") -> tuple[ApiKey, ...]:
    async def read() -> tuple[ApiKey, ...]:
        keys = open_keys(store, redis)
        found = await keys.read()
        await keys.close()
        assert found is not None
        return found.keys

    return asyncio.run(read())


def create(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["keys", "create", *arguments]) == 0
    return capsys.readouterr().out.strip()


def test_a_created_key_is_all_that_stdout_shows_and_its_record_is_kept(store, capsys) -> None:
    flags = ["--requests-per-minute", "60", "--tokens-per-minute", "1000", "--concurrent", "3"]
    secret = create(capsys, "alice", *flags, "--priority", "high", "--expires", "2d", "--admin")
    (key,) = kept(store)
    assert key.is_of(secret.encode())
    assert (key.name, key.limits, key.priority, key.admin) == ("alice", KeyLimits(60, 1000, 3), "high", True)
    assert key.expires is not None
    assert abs(key.expires - datetime.now(UTC) - timedelta(days=2)) < timedelta(minutes=1)


def test_redis_keeps_keys_too(valkey_url, capsys) -> None:
    where = ["--keys", "redis", "--redis", valkey_url]
    secret = create(capsys, "of-redis", *where)
    key = next(key for key in kept("redis", valkey_url) if key.name == "of-redis")
    assert key.is_of(secret.encode())
    assert main(["keys", "revoke", "of-redis", *where]) == 0


def test_the_list_shows_no_key_digest_or_salt(store, capsys) -> None:
    secret = create(capsys, "alice", "--requests-per-minute", "7")
    (key,) = kept(store)
    for flags in ([], ["--json"]):
        assert main(["keys", "list", *flags]) == 0
        shown = capsys.readouterr().out
        assert "alice" in shown
        assert key.id in shown
        assert not any(hidden in shown for hidden in (secret, secret[16:], key.digest, key.salt))
    assert json.loads(shown)[0]["limits"] == {"requests_per_minute": 7}


def test_an_empty_list_says_so(store, capsys) -> None:
    assert main(["keys", "list"]) == 0
    assert capsys.readouterr().out == "no keys\n"


def test_a_rotated_key_is_another_one_and_a_revoked_one_is_shown_as_such(store, capsys) -> None:
    old = create(capsys, "alice")
    assert main(["keys", "rotate", "alice"]) == 0
    new = capsys.readouterr().out.strip()
    (key,) = kept(store)
    assert (key.is_of(new.encode()), key.is_of(old.encode())) == (True, False)
    assert main(["keys", "revoke", "alice"]) == 0
    assert main(["keys", "list"]) == 0
    assert "revoked" in capsys.readouterr().out


def test_set_changes_only_what_is_given_and_zero_and_never_lift_a_limit(store, capsys) -> None:
    flags = ["--requests-per-minute", "60", "--concurrent", "3", "--expires", "2099-01-01", "--admin"]
    create(capsys, "alice", *flags)
    assert main(["keys", "set", "alice", "--requests-per-minute", "0", "--tokens-per-minute", "5"]) == 0
    (key,) = kept(store)
    assert (key.limits, key.admin) == (KeyLimits(None, 5, 3), True)
    assert key.expires == datetime(2099, 1, 1, tzinfo=UTC)
    assert main(["keys", "set", "alice", "--expires", "never", "--no-admin", "--priority", "low"]) == 0
    (key,) = kept(store)
    assert (key.limits, key.admin, key.expires, key.priority) == (KeyLimits(None, 5, 3), False, None, "low")


@pytest.mark.parametrize(
    "arguments",
    [
        ["revoke", "nobody"],
        ["rotate", "nobody"],
        ["set", "nobody", "--admin"],
        ["create", "a b"],
        ["create", "alice", "--cache-group", "a b"],
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(store, capsys, arguments) -> None:
    assert main(["keys", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diptych: ")


@pytest.mark.parametrize(
    "flag", ["--expires=soon", "--requests-per-minute=-1", "--concurrent=x", "--priority=max"]
)
def test_a_wrong_value_is_refused(store, flag) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["keys", "create", "alice", flag])
    assert ended.value.code == 2


def test_without_a_store_it_says_how_to_name_one(capsys) -> None:
    assert main(["keys", "list"]) == 2
    assert "--keys file:PATH" in capsys.readouterr().err


def test_an_open_cluster_for_others_is_refused_before_anything_starts(capsys) -> None:
    assert main(["up", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "--open" in capsys.readouterr().err
