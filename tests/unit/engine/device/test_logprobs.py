"""Logprobs are transformers' log-softmax, whatever the chunks and whatever else is in the batch."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from services.core.logprobs import PromptLogprobs, TokenLogprobs
from services.core.sampling import SamplingParams
from services.engine.device.logprobs import score
from services.engine.device.torch_runner import TorchRunner
from services.engine.runner import Row, Sample, Targets
from tests.unit.engine.device.test_int8_decoder import open_int8
from tests.unit.engine.device.tiny_models import Driver, open_runner, open_torch, random_model

TOP = 4
OPENERS: dict[str, Callable[[Path], TorchRunner]] = {
    "none": open_runner,
    "torch": open_torch,
    "int8": open_int8,
}


def expected(model: PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float64 [tokens, vocab]: log-softmax after each token."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0].double().log_softmax(dim=-1)


def scored(runner: TorchRunner, tokens: list[int], chunks: list[int], blocks: range) -> list[TokenLogprobs]:
    """Of all tokens but the first, computed in these chunks, beside another sequence."""
    driver, other = Driver(runner, blocks), Driver(runner, range(blocks.stop, blocks.stop + 8))
    result: list[PromptLogprobs] = []
    start = 0
    for size in chunks:
        row = driver.row(tokens[start : start + size], start, None)
        ids = tokens[start + 1 : start + size + 1]
        targets = Targets(start + 1, ids, TOP) if ids else None
        row = Row(row.tokens, start, row.block_table, (), targets)
        outcome = runner.run([other.row([9, 8, 7], 0), row])[1]
        result += [outcome.scored] if outcome.scored else []
        start += size
    assert [part.first for part in result] == [1 + sum(chunks[:n]) for n in range(len(result))]
    return [token for part in result for token in part.tokens()]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_logprobs_of_a_prompt_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    model = random_model(name)
    model.save_pretrained(tmp_path)
    tokens = torch.randint(0, 199, (150,)).tolist()  # more than are unembedded at once
    logprobs = expected(model, tokens)
    for place, token in enumerate(scored(open_runner(tmp_path), tokens, [150], range(24)), start=1):
        row = logprobs[place - 1]
        best = row.topk(TOP)
        assert token.logprob == pytest.approx(float(row[tokens[place]]), abs=1e-4)
        assert token.top_logprobs == pytest.approx(best.values.tolist(), abs=1e-4)
        assert set(token.top_ids) == set(best.indices.tolist())
        assert token.rank == 1 + int((row > row[tokens[place]]).sum())


class Prompt:
    """One prompt, with its logprobs computed at once."""

    def __init__(self, path: Path, quantization: str) -> None:
        self.exact = quantization != "torch"
        self.runner = OPENERS[quantization](path)
        self.tokens = torch.randint(0, 199, (60,)).tolist()
        self.whole = scored(self.runner, self.tokens, [60], range(8))


@pytest.fixture(scope="module", params=list(OPENERS))
def prompt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prompt:
    path = tmp_path_factory.mktemp("scored")
    torch.manual_seed(0)
    random_model("llama").save_pretrained(path)
    return Prompt(path, request.param)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_how_a_prompt_is_cut_makes_no_difference_to_its_logprobs(prompt: Prompt, chunks: list[int]) -> None:
    """With 8-bit weights to the last bit."""
    sizes, left = [], len(prompt.tokens)
    for chunk in [*chunks, left]:
        sizes.append(min(chunk, left))
        left -= sizes[-1]
    cut = scored(prompt.runner, prompt.tokens, [size for size in sizes if size], range(16, 24))
    if prompt.exact:
        assert cut == prompt.whole
    for one, other in zip(cut, prompt.whole, strict=True):
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("quantization", list(OPENERS))
def test_sampled_tokens_have_the_logprobs_that_their_samples_ask_for(
    tmp_path: Path, quantization: str
) -> None:
    """Of the logits as they are: neither temperature nor penalties change them."""
    random_model("llama").save_pretrained(tmp_path)
    runner = OPENERS[quantization](tmp_path)
    driver = Driver(runner)
    plain = driver.row([5, 6, 7], 0)
    logits = runner.logits([plain])[0]
    asked = [None, 0, 3, 20]
    samples = [
        Sample(SamplingParams(max_tokens=9, temperature=0.7, presence_penalty=2, top_logprobs=top), [5], [6])
        for top in asked
    ]
    outcome = runner.run([Row(plain.tokens, 0, plain.block_table, samples), driver.row([5], 0)])[0]
    row = logits.double().log_softmax(dim=-1).float()
    for top, token, logprobs in zip(asked, outcome.tokens, outcome.logprobs, strict=True):
        if top is None:
            assert logprobs is None
            continue
        best = row.topk(top)
        assert logprobs == TokenLogprobs(
            float(row[token]),
            1 + int((row > row[token]).sum()),
            tuple(best.indices.tolist()),
            tuple(best.values.tolist()),
        )


def test_numbers_that_json_cannot_write_become_the_least_probable() -> None:
    logits = torch.tensor([[0.0, float("nan"), 1.0], [0.0, float("-inf"), 1.0]])
    scores = score(logits, [0, 1], 2)
    assert scores.logprobs[1] == -9999.0
    assert torch.cat((scores.logprobs, scores.top_logprobs.flatten())).isfinite().all()
