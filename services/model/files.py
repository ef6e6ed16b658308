"""What every part of the cluster asks of a model on disk, whatever its format."""

from pathlib import Path
from typing import Literal, Protocol

from services.core.errors import ModelFileError
from services.model.config import ModelConfig
from services.model.gguf_file import open_gguf
from services.model.hf_folder import open_folder
from services.model.tokenizer import Tokenizer


class ModelFiles(Protocol):
    @property
    def path(self) -> Path: ...

    @property
    def kind(self) -> Literal["gguf", "folder"]: ...

    @property
    def name(self) -> str:
        """Short, for clients: what the API calls the model unless it is configured."""
        ...

    @property
    def config(self) -> ModelConfig: ...

    @property
    def weight_files(self) -> list[Path]: ...

    def tokenizer(self) -> Tokenizer:
        """A new one at each call, which takes a fraction of a second."""
        ...

    def revision(self) -> str:
        """Digest of the files that determine the model's numbers; see services/model/revision.py."""
        ...


def open_model(path: Path) -> ModelFiles:
    """`path` is a GGUF file or a Hugging Face folder. Reads headers, not weights.

    Raises ModelFileError, naming the file and the remedy, for what is missing, damaged or unsupported.
    """
    if path.is_dir():
        return open_folder(path)
    if not path.exists():
        raise ModelFileError(
            f"{path} does not exist. Give a .gguf file or a Hugging Face model folder, or run "
            "`diptych model pull` for the default model."
        )
    return open_gguf(path)
