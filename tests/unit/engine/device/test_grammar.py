"""Answers follow their grammar, whatever the model says; through the engine, with tiny models."""

import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from services.core.block_hash import Compatibility
from services.core.clock import SystemClock
from services.core.sampling import SamplingParams
from services.engine.device.torch_runner import TorchRunner
from services.engine.engine import Engine
from services.engine.messages import Failed, Limits, Submit, Token
from services.model.files import ModelFiles, open_model
from tests.unit.engine.device.tiny_tokenizers import TOKENIZERS, save_model

LIMITS = Limits(sequences_max=16, waiting_max=64, chunk_tokens_max=16, step_ms_target=100.0)
PERSON = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}, "c": {"enum": ["red", "é"]}},
    "required": ["ok", "n", "c"],
    "additionalProperties": False,
}
SCHEMA = LLMatcher.grammar_from_json_schema(PERSON, defaults={"whitespace_pattern": " ?"})
DATE = LLMatcher.grammar_from_regex("[0-9]{4}-[0-9]{2}")
WORDS = 'start: "yes" | "yesterday" | "no"'
DIGITS = LLMatcher.grammar_from_regex("[0-9]+")


class Model:
    """A tiny model, and engines over it that share its weights but no KV."""

    def __init__(self, files: ModelFiles) -> None:
        self.files = files
        self.tokenizer = files.tokenizer()
        self.ends = tuple(sorted(self.tokenizer.end_token_ids))

    def engine(self, blocks: int = 64) -> Engine:
        geometry = self.files.config.pool_geometry(blocks, 8)
        runner = TorchRunner(self.files, geometry, None, threads=1)
        compatibility = Compatibility(model="tiny", revision="1", block_size=8, layout=geometry.layout)
        return Engine(runner, compatibility, blocks, LIMITS, SystemClock())

    def params(self, grammar: str, **params: Any) -> SamplingParams:
        return SamplingParams(**{"max_tokens": 60, "end_token_ids": self.ends, "grammar": grammar} | params)

    def text(self, tokens: Sequence[int]) -> str:
        """Of an answer as the gateway shows it: without the end that closed it, and without bytes' repair."""
        kept = [token for token in tokens if token not in self.ends]
        return self.tokenizer.decode(kept, skip_special_tokens=False)


@pytest.fixture(scope="module", params=list(TOKENIZERS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(open_model(save_model(tmp_path_factory.mktemp("model"), TOKENIZERS[request.param]())))


@pytest.fixture(scope="module")
def shared(model: Model) -> Engine:
    return model.engine()


Answers = dict[tuple[str, int], list[Token]]


def run(engine: Engine, *submits: Submit) -> tuple[Answers, list[Failed]]:
    """Until nothing is left to do; the books must be right after every step."""
    answers: Answers = {(one.seq_id, choice): [] for one in submits for choice in one.choices}
    failed: list[Failed] = []
    for one in submits:
        engine.handle(one)
    while engine.step() or engine.preparing:
        report = engine.take_report()
        assert not report.refused
        failed += report.failed
        for token in report.tokens:
            answers[token.seq_id, token.choice].append(token)
        engine.check_integrity()
        time.sleep(0.001 * engine.preparing)
    return answers, failed


def answer(
    engine: Engine, params: SamplingParams, prompt: Sequence[int] = (5, 6, 7), **submit: Any
) -> list[Token]:
    ((_, tokens),) = run(engine, Submit("one", "local", list(prompt), submit.pop("outputs", []), params))[
        0
    ].items()
    return tokens


def matches(grammar: str, text: str) -> bool:
    if grammar == SCHEMA:
        value = json.loads(text)
        return set(value) == {"ok", "n", "c"} and type(value["n"]) is int and value["c"] in ("red", "é")
    pattern = {DATE: "[0-9]{4}-[0-9]{2}", WORDS: "yes|yesterday|no", DIGITS: "[0-9]+"}[grammar]
    return re.fullmatch(pattern, text) is not None


@settings(max_examples=40, deadline=None)
@given(
    grammar=st.sampled_from([SCHEMA, DATE, WORDS, DIGITS]),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 2.0]),
    seed=st.integers(0, 2**63),
    prompt=st.lists(st.integers(0, 200), min_size=1, max_size=20),
    top_p=st.sampled_from([1.0, 0.3]),
)
def test_an_answer_matches_its_grammar_whatever_the_model_prefers(
    model: Model, shared: Engine, grammar: str, temperature: float, seed: int, prompt: list[int], top_p: float
) -> None:
    params = model.params(grammar, temperature=temperature, seed=seed, top_p=top_p, max_tokens=200)
    tokens = answer(shared, params, prompt)
    text = model.text([token.token for token in tokens])
    if tokens[-1].finish == "stop":
        assert matches(grammar, text), text
    else:  # greedy answers may repeat a digit for ever
        assert len(tokens) == 200
        assert grammar in (SCHEMA, DIGITS)
