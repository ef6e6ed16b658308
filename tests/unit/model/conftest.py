"""Small model files for the tests of this package."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

METADATA: dict[str, Any] = {
    "llama.block_count": 1,
    "llama.context_length": 128,
    "llama.embedding_length": 8,
    "llama.feed_forward_length": 16,
    "llama.attention.head_count": 2,
    "llama.attention.head_count_kv": 1,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.freq_base": 10000.0,
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "</s>"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 3],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
    "tokenizer.ggml.eos_token_id": 4,
}
TENSORS = {"token_embd.weight": (5, 8), "output_norm.weight": (8,), "blk.0.attn_q.weight": (8, 8)}

WriteGguf = Callable[..., Path]


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    """write_gguf(metadata, tensors, architecture) -> a tiny GGUF file with these on top of the usual
    ones. A metadata value of None takes the key away; a tensor is a shape (zeros) or an array."""

    def write(
        metadata: Mapping[str, Any] = {},
        tensors: Mapping[str, Any] = {},
        architecture: str = "llama",
        name: str = "tiny.gguf",
    ) -> Path:
        usual = {key.replace("llama.", f"{architecture}.", 1): value for key, value in METADATA.items()}
        writer = gguf.GGUFWriter(tmp_path / name, architecture)
        for key, value in (usual | dict(metadata)).items():
            if key == "general.alignment":
                writer.add_custom_alignment(value)
            elif value is not None:
                _add(writer, key, value)
        for key, value in (TENSORS | dict(tensors)).items():
            array = np.zeros(value, np.float32) if isinstance(value, tuple) else value
            writer.add_tensor(key, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    return write


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    add[type(value)](key, value)


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[[dict[str, bytes | str]], Path]:
    """write_folder({name: content}) -> a folder with these files."""

    def write(files: dict[str, bytes | str]) -> Path:
        folder = tmp_path / "folder"
        folder.mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    return write
