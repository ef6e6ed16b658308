"""A model in a Hugging Face folder: config.json, *.safetensors, tokenizer.json and what goes with them."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec
import tokenizers

from services.core.errors import ModelFileError
from services.model.chat_template import ChatTemplate
from services.model.config import ModelConfig
from services.model.hf_config import hf_config, read_json
from services.model.home import diptych_home
from services.model.revision import weights_revision
from services.model.tokenizer import Tokenizer

_INDEX = "model.safetensors.index.json"
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class _IndexJson(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]  # tensor -> file


class _EndTokens(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


@dataclass(frozen=True)
class HfFolder:
    """A ModelFiles over a folder; `weight_files` exist and are whole."""

    path: Path
    config: ModelConfig
    weight_files: list[Path]
    kind: Literal["gguf", "folder"] = "folder"

    @cached_property
    def name(self) -> str:
        """The folder's name; in the Hugging Face cache (models--ORG--NAME/snapshots/HASH) the NAME."""
        folder = self.path.resolve()
        if folder.parent.name == "snapshots":
            return folder.parent.parent.name.rpartition("--")[2]
        return folder.name

    def tokenizer(self) -> Tokenizer:
        """Raises ModelFileError if tokenizer.json is missing or broken."""
        file = self.path / "tokenizer.json"
        if not file.is_file():
            raise ModelFileError(
                f"{file} is missing. Download the model's whole folder again; if the model has only a "
                "tokenizer.model, save it once with transformers' AutoTokenizer(...).save_pretrained."
            )
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the Rust side raises bare Exception
            raise ModelFileError(
                f"{file} does not parse ({error}). Delete it and download it again."
            ) from error
        special, template = self._special_tokens(), self._templates()
        return Tokenizer(backend, self._end_token_ids(backend, special), ChatTemplate(template, special))

    def revision(self) -> str:
        # config.json counts: with another RoPE base the same weights give another KV.
        files = [self.path / "config.json", *self.weight_files]
        return weights_revision(files, diptych_home() / "revisions.json")

    @cached_property
    def _tokenizer_config(self) -> dict[str, Any]:
        file = self.path / "tokenizer_config.json"
        return read_json(file, dict[str, Any]) if file.is_file() else {}

    def _special_tokens(self) -> dict[str, str]:
        """Each is written as text, or as an object with its `content`."""
        found = {name: self._tokenizer_config.get(name) for name in _SPECIAL_TOKENS}
        texts = {
            name: token.get("content") if isinstance(token, dict) else token for name, token in found.items()
        }
        return {name: text for name, text in texts.items() if isinstance(text, str)}

    def _templates(self) -> dict[str, str]:
        """A chat_template.jinja wins over tokenizer_config.json, which has one template or named ones."""
        file = self.path / "chat_template.jinja"
        if file.is_file():
            return {"default": file.read_text(encoding="utf-8")}
        given = self._tokenizer_config.get("chat_template")
        if isinstance(given, str):
            return {"default": given}
        try:
            return {entry["name"]: entry["template"] for entry in given or []}
        except (TypeError, KeyError) as error:
            raise ModelFileError(
                f"{self.path / 'tokenizer_config.json'}: chat_template must be a text or a list of "
                "{name, template}. Download it again."
            ) from error

    def _end_token_ids(self, backend: tokenizers.Tokenizer, special: dict[str, str]) -> frozenset[int]:
        """generation_config.json's, or else config.json's; and the tokenizer's own EOS, which is where a
        fine-tune for chat states its end of turn."""
        generation = self.path / "generation_config.json"
        stated = read_json(generation, _EndTokens).eos_token_id if generation.is_file() else None
        if stated is None:
            stated = read_json(self.path / "config.json", _EndTokens).eos_token_id
        ids: set[int | None] = set(stated) if isinstance(stated, list) else {stated}
        ids.add(backend.token_to_id(special.get("eos_token", "")))
        return frozenset(token for token in ids if token is not None)


def open_folder(path: Path) -> HfFolder:
    """Raises ModelFileError for a file that is missing or cut short, or an unsupported model."""
    config = hf_config(path / "config.json")
    files = _weight_files(path)
    for file in files:
        _check_whole(file)
    return HfFolder(path, config, files)


def _weight_files(path: Path) -> list[Path]:
    """The index's files, or model.safetensors alone, or all *.safetensors; sorted by name."""
    index, single = path / _INDEX, path / "model.safetensors"
    if index.is_file():
        return [path / name for name in sorted(set(read_json(index, _IndexJson).weight_map.values()))]
    files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
    if not files:
        raise ModelFileError(
            f"{single} is missing and {path} has no other *.safetensors. Download the model's whole folder "
            "again; weights in another format must be saved as safetensors first."
        )
    return files


def _check_whole(file: Path) -> None:
    """A safetensors file is: 8 bytes header length, a JSON header with each tensor's range, the data."""
    try:
        with file.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            size = file.stat().st_size
            if header_bytes > size:
                raise ValueError("its header is cut short")
            header = json.loads(stream.read(header_bytes))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        promised = 8 + header_bytes + max(ends, default=0)
        if size != promised:
            raise ValueError(f"it has {size:,} bytes where its header promises {promised:,}")
    except FileNotFoundError as error:
        raise ModelFileError(f"{file} is missing. Download the model's whole folder again.") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ModelFileError(
            f"{file} is damaged or incomplete: {error}. Delete it and download it again."
        ) from error
    except OSError as error:
        raise ModelFileError(f"{file} cannot be read ({error}). Check its permissions.") from error
