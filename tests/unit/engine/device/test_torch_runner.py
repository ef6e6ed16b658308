from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from services.core.errors import ConfigError
from services.core.sampling import SamplingParams
from services.engine.device.torch_runner import TorchRunner
from services.engine.runner import Outcome, Row, Sample
from services.model.files import open_model
from tests.unit.engine.device.tiny_models import GREEDY, Driver, open_runner, random_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random_model("llama").save_pretrained(tmp_path)
    return tmp_path


def test_tokens_are_those_that_transformers_generates(
    default_model: Path, default_reference: PreTrainedModel
) -> None:
    prompt = (
        open_model(default_model).tokenizer().encode("The capital of France is", add_special_tokens=False)
    )
    ids = torch.tensor([prompt])
    expected = default_reference.generate(ids, do_sample=False, max_new_tokens=12)[0].tolist()
    driver = Driver(open_runner(default_model, block_size=16))
    tokens = list(prompt)
    for _ in range(len(expected) - len(prompt)):
        start = 0 if tokens == prompt else len(tokens) - 1
        tokens += driver.runner.run([driver.row(tokens[start:], start)])[0].tokens
    assert tokens == expected


def test_results_follow_the_order_of_the_rows_and_chunks_have_none(folder: Path) -> None:
    runner = open_runner(folder)
    long, short = torch.randint(0, 199, (30,)).tolist(), torch.randint(0, 199, (4,)).tolist()
    drivers = [Driver(runner, range(8 * at, 8 * at + 8)) for at in range(4)]
    rows = [
        drivers[0].row(long, 0),
        drivers[1].row(short[:1], 0),
        drivers[2].row(short, 0, None),
        drivers[3].row(short, 0),
    ]
    alone = [runner.run([row])[0] for row in rows]
    assert [len(outcome.tokens) for outcome in alone] == [1, 1, 0, 1]
    assert runner.run(rows) == alone
    assert runner.run(rows[::-1]) == alone[::-1]
    assert torch.allclose(runner.logits([rows[3], rows[0]])[1], runner.logits([rows[0]])[0], atol=1e-5)
    assert runner.run([rows[2]]) == [Outcome([], [])]
    assert runner.run([]) == []


def test_kv_lands_in_the_shared_memory_it_was_given(folder: Path) -> None:
    files = open_model(folder)
    geometry = files.config.pool_geometry(6, 8)
    memory = bytearray(geometry.bytes)
    runner = TorchRunner(files, geometry, memoryview(memory), threads=1)
    runner.run([Row([5, 6, 7], 0, [4], [])])
    written = [
        block
        for block in range(6)
        if any(memory[block * geometry.block_bytes : (block + 1) * geometry.block_bytes])
    ]
    assert written == [4]


def test_blocks_copied_to_another_pool_decode_to_the_same_token(folder: Path) -> None:
    """What a transfer does: the prefill worker's blocks, in other places of the decode worker's pool."""
    files = open_model(folder)
    geometry = files.config.pool_geometry(8, 8)
    pools = [bytearray(geometry.bytes), bytearray(geometry.bytes)]
    prefill, decode = (TorchRunner(files, geometry, memoryview(pool), threads=1) for pool in pools)
    prompt = torch.randint(0, 199, (21,)).tolist()
    samples = [Sample(GREEDY, prompt, [])]
    (first,) = prefill.run([Row(prompt, 0, [1, 2, 3], samples)])[0].tokens
    for source, target in ((1, 7), (2, 0), (3, 5)):
        size = geometry.block_bytes
        pools[1][target * size : (target + 1) * size] = pools[0][source * size : (source + 1) * size]
    (local,) = prefill.run([Row([first], 21, [1, 2, 3], samples)])
    (moved,) = decode.run([Row([first], 21, [7, 0, 5], samples)])
    assert moved == local


def test_a_sampled_stream_continues_the_same_when_resumed_elsewhere(folder: Path) -> None:
    params = SamplingParams(max_tokens=100, temperature=1.3, seed=77, top_p=0.95, presence_penalty=0.3)
    prompt = torch.randint(0, 199, (10,)).tolist()

    def generate(runner: TorchRunner, output: list[int], count: int) -> list[int]:
        output, start = list(output), 0
        driver = Driver(runner, seed=len(output))
        for _ in range(count):
            tokens = (prompt + output)[start:]
            table = driver.row(tokens, start).block_table
            output += runner.run([Row(tokens, start, table, [Sample(params, prompt, output)])])[0].tokens
            start = len(prompt) + len(output) - 1
        return output

    whole = generate(open_runner(folder), [], 30)
    assert generate(open_runner(folder), whole[:13], 17) == whole
    assert len(set(whole)) > 5


def test_a_pool_of_another_model_or_size_is_refused(folder: Path) -> None:
    files = open_model(folder)
    geometry = files.config.pool_geometry(6, 8)
    with pytest.raises(ConfigError, match="bytes"):
        TorchRunner(files, geometry, memoryview(bytearray(geometry.bytes - 4)), threads=1)
    other = open_model(folder).config.pool_geometry(6, 8)
    wrong = type(other)(6, other.layers + 1, other.kv_heads, 8, other.head_dim)
    with pytest.raises(ConfigError, match="same model"):
        TorchRunner(files, wrong, None, threads=1)


def test_a_device_that_cannot_share_its_pool_with_the_transfers_is_refused(folder: Path) -> None:
    files = open_model(folder)
    geometry = files.config.pool_geometry(6, 8)
    with pytest.raises(ConfigError, match="must be on the CPU"):
        TorchRunner(files, geometry, memoryview(bytearray(geometry.bytes)), threads=1, device="cuda")


def test_choices_of_one_row_are_what_each_gives_alone(folder: Path) -> None:
    """One forward pass gives all of them, beside rows with one choice or none."""
    runner = open_runner(folder)
    params = SamplingParams(max_tokens=9, temperature=1.3, seed=5, top_k=100)
    prompt = torch.randint(0, 199, (11,)).tolist()
    table = Driver(runner, range(8, 16)).row(prompt, 0).block_table
    choices = [Sample(params, prompt, [], choice) for choice in range(6)]
    alone = [runner.run([Row(prompt, 0, table, [choice])])[0].tokens[0] for choice in choices]
    others = [Driver(runner, range(8)).row(prompt[:3], 0), Driver(runner, range(16, 24)).row(prompt, 0, None)]
    together = runner.run([others[0], Row(prompt, 0, table, choices), others[1]])
    assert [outcome.tokens for outcome in together] == [runner.run([others[0]])[0].tokens, alone, []]
    assert len(set(alone)) > 2


def test_copied_blocks_hold_what_their_sources_hold(folder: Path) -> None:
    runner = open_runner(folder, blocks=6)
    runner.pool.copy_(torch.randn(runner.pool.shape))
    before = runner.pool.clone()
    runner.copy_blocks([(1, 4), (1, 2), (5, 0)])
    assert torch.equal(runner.pool, before[[5, 1, 1, 3, 1, 5]])
