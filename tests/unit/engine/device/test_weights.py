"""Loading: both formats give the same tensors, and errors name the tensor and the file."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file, save_file

from services.core.errors import ModelFileError
from services.engine.device.gguf_weights import GgufSource
from services.engine.device.weights import TORCH_PACKING, load_weights
from services.model.files import open_model
from tests.unit.engine.device.tiny_gguf import write_gguf
from tests.unit.engine.device.tiny_models import Driver, open_runner, random_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "architecture"),
    [("llama", "llama"), ("llama-tied", "llama"), ("qwen2", "qwen2"), ("qwen3", "qwen3")],
)
def test_a_gguf_file_computes_the_same_as_the_folder_it_was_made_from(
    name: str, architecture: str, tmp_path: Path
) -> None:
    random_model(name).save_pretrained(tmp_path / "folder")
    path = write_gguf(tmp_path / "folder", tmp_path / "model.gguf", architecture)
    tokens = torch.randint(0, 199, (20,)).tolist()
    logits = [Driver(open_runner(source)).logits(tokens, [19, 1]) for source in (tmp_path / "folder", path)]
    assert torch.equal(*logits)


def test_sharded_folders_load_like_whole_ones(tmp_path: Path) -> None:
    model = random_model("llama")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    assert len(open_model(tmp_path / "sharded").weight_files) > 2
    tokens = torch.randint(0, 199, (9,)).tolist()
    logits = [Driver(open_runner(tmp_path / kind)).logits(tokens, [9]) for kind in ("whole", "sharded")]
    assert torch.equal(*logits)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0", "BF16", "F16", "F32"])
def test_quantised_tensors_are_read_as_their_format_defines_them(kind: str, tmp_path: Path) -> None:
    quantization = gguf.GGMLQuantizationType[kind]
    values = np.random.default_rng(0).standard_normal((96, 64)).astype(np.float32)
    stored = quantize(values, quantization)
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "qwen2")
    writer.add_tensor("blk.0.ffn_down.weight", stored, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "tiny.gguf", head_dim=8)
    tensor = source.read("model.layers.0.mlp.down_proj.weight", (96, 64))
    assert tensor.dtype == torch.float32
    assert np.array_equal(tensor.numpy(), dequantize(stored, quantization))


def resave(folder: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(folder / "model.safetensors") | change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (None, "has no tensor"),
        (torch.zeros(48, 71), r"shape \[48, 71\].*asks for \[48, 72\]"),
        (torch.zeros(48, 72, dtype=torch.int8), "stored as torch.int8"),
    ],
)
def test_a_bad_safetensors_tensor_is_named_with_its_file(
    tensor: torch.Tensor | None, problem: str, tmp_path: Path
) -> None:
    random_model("llama").save_pretrained(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    resave(tmp_path, {name: tensor})
    with pytest.raises(ModelFileError, match=problem) as caught:
        load_weights(open_model(tmp_path), torch.float32, CPU, TORCH_PACKING)
    assert name in caught.value.message
    assert str(tmp_path) in caught.value.message


@pytest.mark.parametrize(
    ("tensor", "problem"), [(None, "has no tensor"), (torch.zeros(48, 8), r"shape \[48, 8\]")]
)
def test_a_bad_gguf_tensor_is_named_with_its_file(
    tensor: torch.Tensor | None, problem: str, tmp_path: Path
) -> None:
    random_model("qwen2").save_pretrained(tmp_path)
    config_of_whole = open_model(tmp_path)
    resave(tmp_path, {"model.layers.2.self_attn.o_proj.weight": tensor})
    path = write_gguf(tmp_path, tmp_path / "model.gguf", "qwen2")
    assert config_of_whole.config.layers == open_model(path).config.layers
    with pytest.raises(ModelFileError, match=problem) as caught:
        load_weights(open_model(path), torch.float32, CPU, TORCH_PACKING)
    assert "blk.2.attn_output.weight" in caught.value.message
    assert str(path) in caught.value.message
