"""The decoder computes what transformers computes."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.unit.engine.device.tiny_models import CONFIGS, GREEDY, OPENERS, Driver, open_runner, random_model

PROMPT_CHUNKS = [[100], [1] * 20 + [80], [33, 1, 7, 59], [64, 36]]


@pytest.mark.parametrize("by", OPENERS)
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_those_of_transformers_however_the_prompt_is_cut(
    name: str, by: str, tmp_path: Path
) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    runner = OPENERS[by](tmp_path)
    tokens = torch.randint(0, 199, (100,)).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor([tokens])).logits[0]
    for chunks in PROMPT_CHUNKS:
        logits = Driver(runner).logits(tokens, chunks)
        ends = torch.tensor(chunks).cumsum(0) - 1
        assert torch.allclose(logits, expected[ends], atol=1e-3)


@pytest.mark.parametrize("by", OPENERS)
def test_default_model_equals_transformers_in_chunks_and_decode(
    by: str, default_model: Path, default_reference: PreTrainedModel
) -> None:
    runner = OPENERS[by](default_model, block_size=16)
    tokens = torch.randint(0, 49152, (75,)).tolist()
    with torch.inference_mode():
        expected = default_reference(torch.tensor([tokens])).logits[0]
    chunks = [37, 1, 23, *[1] * 14]
    logits = Driver(runner).logits(tokens, chunks)
    ends = torch.tensor(chunks).cumsum(0) - 1
    assert torch.allclose(logits, expected[ends], atol=1e-3)


@pytest.mark.parametrize("by", OPENERS)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_a_mixed_batch_computes_what_each_row_computes_alone(name: str, by: str, tmp_path: Path) -> None:
    random_model(name).save_pretrained(tmp_path)
    together, alone = OPENERS[by](tmp_path), OPENERS[by](tmp_path)
    contexts, queries = [9, 60, 33, 34, 35, 3, 40, 60], [9, 1, 1, 20, 1, 1, 3, 1]
    drivers = [[Driver(runner, range(8 * at, 8 * at + 8)) for at in range(8)] for runner in (together, alone)]
    tokens = [torch.randint(0, 199, (context,)).tolist() for context in contexts]
    for mine in drivers:
        for driver, ids, count in zip(mine, tokens, queries, strict=True):
            if len(ids) > count:
                driver.runner.run([driver.row(ids[:-count], 0, None)])
    last = [(ids[-count:], len(ids) - count) for ids, count in zip(tokens, queries, strict=True)]
    rows = [[driver.row(*part, GREEDY) for driver, part in zip(mine, last, strict=True)] for mine in drivers]
    batched = together.logits(rows[0])
    single = torch.cat([alone.logits([row]) for row in rows[1]])
    assert torch.allclose(batched, single, atol=1e-5)
    assert torch.allclose(together.pool, alone.pool, atol=1e-5)


@pytest.mark.parametrize("by", OPENERS)
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
def test_on_a_cpu_a_row_is_bitwise_the_same_in_every_batch(by: str, default_model: Path) -> None:
    runner = OPENERS[by](default_model, block_size=16)
    drivers = [Driver(runner, range(4 * at, 4 * at + 4)) for at in range(9)]
    contexts = [3, 17, 18, 30, 31, 32, 40, 50, 60]
    tokens = [torch.randint(0, 49152, (context,)).tolist() for context in contexts]
    for driver, ids in zip(drivers, tokens, strict=True):
        runner.run([driver.row(ids[:-1], 0, None)])
    rows = [driver.row(ids[-1:], len(ids) - 1) for driver, ids in zip(drivers, tokens, strict=True)]
    alone = torch.cat([runner.logits([row]) for row in rows])
    assert torch.equal(runner.logits(rows), alone)
    assert torch.equal(runner.logits([rows[7], rows[1], rows[4]]), alone[[7, 1, 4]])
    chunk = Driver(runner, range(40, 44)).row(tokens[8][:20], 0)
    assert torch.equal(runner.logits([chunk, *rows])[1:], alone)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_near_float32(dtype: str, tmp_path: Path) -> None:
    random_model("qwen3").save_pretrained(tmp_path)
    tokens = torch.randint(0, 199, (40,)).tolist()
    exact = Driver(open_runner(tmp_path)).logits(tokens, [30, *[1] * 10])
    near = Driver(open_runner(tmp_path, dtype=dtype)).logits(tokens, [30, *[1] * 10])
    error = (near - exact).square().mean().sqrt() / exact.std()
    assert float(error) < 0.05
