"""Tiny models of each architecture, and a driver of one sequence over a shuffled pool."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.llama import LlamaConfig
from transformers.models.mistral import MistralConfig
from transformers.models.qwen2 import Qwen2Config
from transformers.models.qwen3 import Qwen3Config

from services.core.sampling import SamplingParams
from services.engine.device.torch_runner import TorchRunner
from services.engine.runner import Row, Sample
from services.model.files import open_model

GREEDY = SamplingParams(max_tokens=100, temperature=0)
SIZES: dict[str, Any] = {
    "vocab_size": 199,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama3-rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3_ROPE),
    "linear-rope": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
    ),
    "mistral": lambda: MistralConfig(**SIZES, sliding_window=21),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=16),
}


def random_model(name: str) -> PreTrainedModel:
    return randomized(CONFIGS[name]())


def randomized(config: Any) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms start as zeros and ones
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def open_runner(path: Path, blocks: int = 64, block_size: int = 8, dtype: str = "float32") -> TorchRunner:
    files = open_model(path)
    return TorchRunner(files, files.config.pool_geometry(blocks, block_size, dtype), None, threads=1)


def open_torch(path: Path, blocks: int = 64, block_size: int = 8) -> TorchRunner:
    """What `open_runner` opens where there is no compiler: torch computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_HOME", str(path))  # no kernels are here
        patch.setenv("CXX", "no-such-compiler")
        return open_runner(path, blocks, block_size)


# What computes in float32.
OPENERS = {"kernels": open_runner, "torch": open_torch}


class Driver:
    """Drives one sequence through a runner, over blocks of its own in a shuffled order."""

    def __init__(self, runner: TorchRunner, blocks: Sequence[int] = range(64), seed: int = 3) -> None:
        self.runner = runner
        self.table = random.Random(seed).sample(list(blocks), len(blocks))

    def row(self, tokens: Sequence[int], start: int, params: SamplingParams | None = GREEDY) -> Row:
        samples = [] if params is None else [Sample(params, list(tokens), [])]
        end = -(-(start + len(tokens)) // self.runner.pool.shape[4])
        return Row(tokens, start, self.table[:end], samples)

    def logits(self, tokens: Sequence[int], chunks: Sequence[int]) -> torch.Tensor:
        """The logits after each chunk. The chunks' sizes sum to the number of tokens."""
        assert sum(chunks) == len(tokens)
        starts = [sum(chunks[:index]) for index in range(len(chunks))]
        rows = [self.row(tokens[at : at + size], at) for at, size in zip(starts, chunks, strict=True)]
        return torch.cat([self.runner.logits([row]) for row in rows])
