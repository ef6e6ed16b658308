"""A key is recognised by its record, and by nothing else."""

import hmac
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.core.errors import ConfigError
from services.keys import api_key
from services.keys.api_key import ApiKey, KeyLimits, digest_of, id_in, new_id, new_key, new_salt
from services.keys.document import decoded, encoded, without_old

NOW = datetime(2026, 11, 26, tzinfo=UTC)


def record(name: str = "alice", **fields) -> tuple[ApiKey, str]:
    key_id = new_id()
    key = new_key(key_id)
    made = {"id": key_id, "digest": digest_of(key.encode()), "salt": new_salt(), "created": NOW}
    return ApiKey(name=name, **{**made, **fields}), key


def test_keys_are_long_random_and_name_their_record() -> None:
    keys = {new_key("0f3a9c1b2d4e") for _ in range(100)}
    assert len(keys) == 100
    assert {id_in(key.encode()) for key in keys} == {"0f3a9c1b2d4e"}
    assert {len(key) for key in keys} == {len("sk-0f3a9c1b2d4e-") + 43}


@given(st.binary(max_size=80))
def test_what_is_not_a_key_names_no_record(junk) -> None:
    assert id_in(junk) is None


def test_a_record_is_of_its_key_only() -> None:
    one, key = record()
    other, other_key = record()
    assert one.is_of(key.encode())
    assert not one.is_of(other_key.encode())
    assert not other.is_of(key.encode())
    assert not one.is_of(new_key(one.id).encode())


def test_digests_are_compared_in_constant_time(monkeypatch) -> None:
    compared = []
    monkeypatch.setattr(api_key.hmac, "compare_digest", lambda a, b: compared.append((a, b)) or a == b)
    one, key = record()
    assert one.is_of(key.encode())
    assert compared == [(one.digest, one.digest)]
    assert hmac is api_key.hmac


def test_nothing_kept_of_a_key_contains_it() -> None:
    one, key = record()
    secret = key.rpartition(one.id)[2].strip("-")
    assert secret not in encoded((one,)).decode()
    assert secret.encode().hex() not in encoded((one,)).decode()


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"revoked": NOW}, "revoked"),
        ({"expires": NOW}, "expired"),
        ({"expires": NOW + timedelta(seconds=1)}, ""),
    ],
)
def test_a_key_ends_when_it_is_revoked_or_expires(fields, reason) -> None:
    assert record(**fields)[0].ended(NOW) == reason


def test_a_document_is_read_as_it_was_written() -> None:
    keys = (
        record()[0],
        record("bob", limits=KeyLimits(3, 4, 5), priority="low", cache_group="team", admin=True)[0],
        record("carol", expires=NOW, revoked=NOW)[0],
    )
    assert decoded(b"# a comment\n\n" + encoded(keys), "here") == keys


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"\xff",
        b"[]",
        b'{"id": "0f3a9c1b2d4e"}',
        encoded((record()[0],)).replace(b'"name"', b'"nam"'),
        encoded((record()[0],)).replace(b"alice", b"al ice"),
        encoded((record()[0],)).replace(
            b"alice", b'alice","limits":{"requests_per_minute":0},"priority":"low'
        ),
    ],
)
def test_a_broken_line_is_named_and_not_quoted(line) -> None:
    good = encoded((record()[0],))
    with pytest.raises(ConfigError, match=r"keys\.jsonl, line 2") as raised:
        decoded(good + line, "keys.jsonl")
    assert "al ice" not in raised.value.message


def test_two_records_of_one_id_are_an_error() -> None:
    one = record()[0]
    with pytest.raises(ConfigError, match="one id"):
        decoded(encoded((one, one)), "here")


def test_records_go_when_they_have_long_ended() -> None:
    long_ago, lately = NOW - timedelta(days=91), NOW - timedelta(days=89)
    kept = (record(revoked=lately)[0], record(expires=lately)[0], record()[0])
    gone = (record(revoked=long_ago)[0], record(expires=long_ago)[0])
    assert without_old((*gone, *kept), NOW) == kept
