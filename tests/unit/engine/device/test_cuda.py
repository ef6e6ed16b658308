"""On a GPU torch computes what it computes on a CPU. Machines without one skip these."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from services.core.sampling import SamplingParams
from services.engine.device.description import describe_device
from services.engine.device.sampler import sample_tokens
from services.engine.device.torch_runner import TorchRunner
from services.engine.runner import Row, Sample, Targets
from services.model.files import open_model
from tests.unit.engine.device.tiny_models import CONFIGS, GREEDY, Driver, open_torch, random_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")


def open_cuda(path: Path, dtype: str = "float32", compiled: bool = False) -> TorchRunner:
    files = open_model(path)
    geometry = files.config.pool_geometry(64, 8, dtype)
    return TorchRunner(files, geometry, None, threads=1, device="cuda", compiled=compiled)


@pytest.fixture
def _compiler_as_new() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CONFIGS)
def test_prompts_in_chunks_and_decoding_equal_those_of_the_cpu(name: str, tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path)
    tokens, chunks = torch.randint(0, 199, (60,)).tolist(), [37, 1, 3, *[1] * 19]
    on_gpu, on_cpu = (Driver(runner) for runner in (open_cuda(tmp_path), open_torch(tmp_path)))
    assert torch.allclose(on_gpu.logits(tokens, chunks).cpu(), on_cpu.logits(tokens, chunks), atol=1e-3)
    assert torch.allclose(on_gpu.runner.pool.cpu(), on_cpu.runner.pool, atol=1e-3)


def test_a_mixed_batch_computes_what_each_row_computes_alone(tmp_path: Path) -> None:
    random_model("qwen3").save_pretrained(tmp_path)
    runner = open_cuda(tmp_path)
    rows = [
        Driver(runner, range(8 * at, 8 * at + 8)).row(torch.randint(0, 199, (1 + 9 * at,)).tolist(), 0)
        for at in range(6)
    ]
    alone = torch.cat([runner.logits([row]) for row in rows])
    assert torch.allclose(runner.logits(rows), alone, atol=1e-4)


def test_the_same_logits_give_the_same_tokens_as_on_the_cpu() -> None:
    def samples() -> list[Sample]:
        params = [
            SamplingParams(max_tokens=9, temperature=0, min_tokens=9, end_token_ids=(0, 7)),
            SamplingParams(max_tokens=9, temperature=1.0, seed=1),
            SamplingParams(max_tokens=9, temperature=0.8, seed=2, top_k=20, top_p=0.9),
            SamplingParams(max_tokens=9, temperature=1.2, seed=3, min_p=0.05, repetition_penalty=1.2),
            SamplingParams(max_tokens=9, temperature=1.0, seed=4, frequency_penalty=0.5, logit_bias={7: 3.0}),
        ]
        return [Sample(p, [1, 2, 3], [4] * index) for p in params for index in range(40)]

    logits = torch.randn(len(samples()), 5000) * 2
    assert sample_tokens(logits.cuda(), samples()) == sample_tokens(logits, samples())


def test_prompt_logprobs_equal_those_of_the_cpu(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tokens = torch.randint(0, 199, (30,)).tolist()
    row = Row(tokens, 0, [3, 1, 2, 0], [Sample(GREEDY, tokens, [])], Targets(1, tokens[1:], 2))
    (on_gpu,), (on_cpu,) = (runner.run([row]) for runner in (open_cuda(tmp_path), open_torch(tmp_path)))
    assert on_gpu.tokens == on_cpu.tokens
    assert on_gpu.scored is not None
    assert on_cpu.scored is not None
    values = [np.frombuffer(outcome.scored.logprobs, dtype=np.float32) for outcome in (on_gpu, on_cpu)]
    assert np.allclose(*values, atol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(dtype: str, tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    tokens, chunks = torch.randint(0, 199, (40,)).tolist(), [32, *[1] * 8]
    near = Driver(open_cuda(tmp_path, dtype)).logits(tokens, chunks).cpu().float().log_softmax(-1)
    exact = Driver(open_torch(tmp_path)).logits(tokens, chunks).log_softmax(-1)
    assert (near.exp() - exact.exp()).abs().max() < 0.05


def test_copied_blocks_have_the_same_keys_and_values(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path)
    runner = open_cuda(tmp_path)
    runner.run([Driver(runner, [0]).row(list(range(8)), 0)])
    runner.copy_blocks([(0, 5)])
    assert runner.pool[5].abs().sum() > 0
    assert torch.equal(runner.pool[5], runner.pool[0])


@pytest.mark.usefixtures("_compiler_as_new")
def test_what_is_compiled_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    random_model("qwen3").save_pretrained(tmp_path)
    compiled, plain = open_cuda(tmp_path, compiled=True), open_cuda(tmp_path)
    torch.compiler.set_stance("fail_on_recompile")
    tokens, chunks = torch.randint(0, 199, (60,)).tolist(), [40, 1, 3, *[1] * 16]
    of_compiled, of_plain = (Driver(runner).logits(tokens, chunks) for runner in (compiled, plain))
    assert torch.allclose(of_compiled, of_plain, atol=1e-3)


def test_the_device_is_described() -> None:
    assert "GiB, torch" in describe_device("cuda")
