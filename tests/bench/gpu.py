"""Steps of the torch path on a GPU, as it is and with `--compile`, side by side.

    python -m tests.bench.gpu [--dtype bfloat16] [--rounds N]

The models have the shapes of real ones and random weights: speed depends on nothing else.
"""

import argparse
import gc
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from services.core.sampling import SamplingParams
from services.engine.device.description import describe_device
from services.engine.device.torch_runner import TorchRunner
from services.engine.runner import Row, Sample
from services.model.files import open_model
from tests.bench.kernels import best_times

CONTEXT, BLOCK_SIZE, BLOCKS = 1024, 16, 64 * 70
GREEDY = Sample(SamplingParams(max_tokens=1, temperature=0), [], [])
# Layers, hidden size, intermediate size, heads, kv heads, vocabulary.
SHAPES = {
    "135M": (30, 576, 1536, 9, 3, 49_152),
    "1B": (16, 2048, 8192, 32, 8, 128_256),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(
        f"{describe_device('cuda')}; {options.dtype}, {CONTEXT} tokens of context, best of {options.rounds}"
    )
    for name in SHAPES:
        _compare(name, options.dtype, options.rounds)


def _compare(name: str, dtype: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        _save(name, Path(folder))
        started_s = time.perf_counter()
        sides = [_runner(Path(folder), dtype, compiled) for compiled in (False, True)]
        print(f"\n{name}, both loaded in {time.perf_counter() - started_s:.0f} s")
    print(f"{'step':24s}{'as it is':>12s}{'--compile':>12s}{'ratio':>8s}{'tokens/s':>12s}")
    for step, rows in _steps():
        plain, compiled = best_times([partial(side.run, rows) for side in sides], rounds)
        tokens = sum(len(row.tokens) for row in rows)
        print(
            f"{step:24s}{plain * 1e3:9.2f} ms{compiled * 1e3:9.2f} ms{plain / compiled:7.2f}x"
            f"{tokens / min(plain, compiled):12,.0f}"
        )
    del sides
    gc.collect()
    torch.cuda.empty_cache()


def _save(name: str, folder: Path) -> None:
    layers, hidden, intermediate, heads, kv_heads, vocab = SHAPES[name]
    config = LlamaConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def _runner(folder: Path, dtype: str, compiled: bool) -> TorchRunner:
    files = open_model(folder)
    geometry = files.config.pool_geometry(BLOCKS, BLOCK_SIZE, dtype)
    return TorchRunner(files, geometry, None, threads=1, device="cuda", compiled=compiled)


def _steps() -> Iterator[tuple[str, Sequence[Row]]]:
    for count in (1, 8, 64):
        yield f"{count} decoding", [Row([5], CONTEXT - 1, table, [GREEDY]) for table in _tables(count)]
    for tokens in (256, CONTEXT):
        yield f"prompt of {tokens}", [Row([7] * tokens, 0, _tables(1)[0], [GREEDY])]


def _tables(count: int) -> list[list[int]]:
    """Of blocks that lie anywhere."""
    blocks = random.Random(1).sample(range(BLOCKS), BLOCKS)
    each = CONTEXT // BLOCK_SIZE
    return [blocks[at * each : (at + 1) * each] for at in range(count)]


if __name__ == "__main__":
    main()
