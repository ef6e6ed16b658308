import hashlib
import os

import pytest

from services.core.errors import ModelFileError
from services.model.revision import weights_revision


@pytest.fixture
def shards(tmp_path):
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.write_bytes(file.name.encode() * 1000)
    return files


def test_one_files_revision_is_the_start_of_its_sha256(shards, tmp_path):
    expected = hashlib.sha256(shards[0].read_bytes()).hexdigest()[:32]
    assert weights_revision(shards[:1], tmp_path / "cache.json") == expected


def test_every_files_content_and_their_order_count(shards, tmp_path):
    cache = tmp_path / "cache.json"
    before = weights_revision(shards, cache)
    assert weights_revision(shards[::-1], cache) != before
    shards[1].write_bytes(b"other")
    assert weights_revision(shards, cache) not in (before, weights_revision(shards[:1], cache))


def test_an_unchanged_file_is_not_read_again(shards, tmp_path):
    cache = tmp_path / "cache.json"
    before = weights_revision(shards, cache)
    # Other content behind the same size and time shows that the content was not looked at.
    stat = shards[0].stat()
    shards[0].write_bytes(b"x" * stat.st_size)
    os.utime(shards[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights_revision(shards, cache) == before
    os.utime(shards[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert weights_revision(shards, cache) != before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"x": 3}', b"\xff\xfe", b'{"x": {"size": "1"}}'])
def test_a_corrupt_cache_is_ignored_and_replaced(shards, tmp_path, content):
    cache = tmp_path / "cache.json"
    expected = weights_revision(shards, tmp_path / "other.json")
    cache.write_bytes(content)
    assert weights_revision(shards, cache) == expected
    assert cache.read_bytes() == (tmp_path / "other.json").read_bytes()


def test_entries_of_other_models_stay_in_the_cache(shards, tmp_path):
    cache = tmp_path / "home" / "cache.json"
    weights_revision(shards[:1], cache)
    weights_revision(shards[1:], cache)
    assert [name in cache.read_text() for name in ("a.safetensors", "b.safetensors")] == [True, True]
    assert [file.name for file in cache.parent.iterdir()] == ["cache.json"]


def test_a_cache_that_cannot_be_written_costs_only_time(shards, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    expected = weights_revision(shards, tmp_path / "cache.json")
    assert weights_revision(shards, tmp_path / "file" / "cache.json") == expected
    (tmp_path / "taken.json").mkdir()
    assert weights_revision(shards, tmp_path / "taken.json") == expected
    assert not list(tmp_path.glob("taken.json?*"))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ModelFileError, match=r"absent\.gguf cannot be read"):
        weights_revision([tmp_path / "absent.gguf"], tmp_path / "cache.json")
