"""Answers follow their grammar, whatever the model says; through the engine, with tiny models."""

import gc
import json
import re
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from services.core.block_hash import Compatibility
from services.core.clock import SystemClock
from services.core.sampling import SamplingParams
from services.engine.device.grammar import Grammars, Guidance
from services.engine.device.sampler import sample_tokens
from services.engine.device.torch_runner import TorchRunner
from services.engine.engine import Engine
from services.engine.messages import Drop, Failed, Landed, Limits, Start, Submit, Token
from services.engine.runner import Sample
from services.model.files import ModelFiles, open_model
from services.model.grammar import GrammarVocabulary
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
            answers.setdefault((token.seq_id, token.choice), []).append(token)
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


def ids(tokens: Sequence[Token]) -> list[int]:
    return [token.token for token in tokens]


def mixed(model: Model) -> list[Submit]:
    """Greedy and drawn sequences, with several grammars and with none."""
    grammars = ["", SCHEMA, DATE, "", WORDS, DIGITS, SCHEMA, ""]
    return [
        Submit(f"s{n}", "local", [n, 2 * n + 1, 7], [], model.params(grammar, temperature=n % 3 / 2, seed=n))
        for n, grammar in enumerate(grammars)
    ]


def test_company_with_or_without_grammars_changes_no_answer(model: Model, shared: Engine) -> None:
    submits = mixed(model)
    alone = {(one.seq_id, 0): ids(run(shared, one)[0][one.seq_id, 0]) for one in submits}
    together, _ = run(shared, *submits)
    small = model.engine(blocks=12)
    crowded, _ = run(small, *submits)
    assert small.take_report().gauges.preemptions > 0
    assert {key: ids(tokens) for key, tokens in together.items()} == alone
    assert {key: ids(tokens) for key, tokens in crowded.items()} == alone
    without_grammars, _ = run(shared, *[one for one in submits if not one.sampling.grammar])
    assert {key: ids(tokens) for key, tokens in without_grammars.items()}.items() <= alone.items()


def test_choices_follow_the_grammar_each_in_its_own_way(model: Model, shared: Engine) -> None:
    params = model.params(DIGITS, temperature=1.5, seed=4, max_tokens=6)
    answers, _ = run(shared, Submit("several", "local", [5, 6], [], params, choices=(0, 2, 3, 7)))
    alone, _ = run(shared, *[Submit(f"{n}", "local", [5, 6], [], params, choices=(n,)) for n in (0, 2, 3, 7)])
    assert [ids(tokens) for tokens in answers.values()] == [ids(tokens) for tokens in alone.values()]
    assert len({model.text(ids(tokens)) for tokens in answers.values()}) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("grammar", [SCHEMA, DATE], ids=["schema", "date"])
def test_a_resumed_answer_goes_on_as_if_nothing_had_happened(
    model: Model, grammar: str, temperature: float
) -> None:
    params = model.params(grammar, temperature=temperature, seed=9, max_tokens=40)
    whole = answer(model.engine(), params)
    for cut in range(1, len(whole)):
        rest = answer(model.engine(), params, outputs=ids(whole[:cut]))
        assert ids(rest) == ids(whole[cut:])
        assert rest[-1].finish == whole[-1].finish


def test_decode_goes_on_from_the_tokens_that_prefill_sampled(model: Model) -> None:
    params = model.params(DIGITS, temperature=1.5, seed=4, max_tokens=5)
    prompt, choices = [5, 6, 7, 8], (0, 1, 2)
    alone, _ = run(model.engine(), Submit("a", "local", prompt, [], params, choices=choices))
    prefill, decode = model.engine(), model.engine()
    firsts, _ = run(prefill, Submit("a", "prefill", prompt, [], params, choices=choices))
    decode.handle(Submit("a", "receive", prompt, [], params, choices=choices))
    while decode.preparing:
        decode.step()
    admitted = decode.take_report().admitted[0]
    pools = [engine._runner.pool for engine in (prefill, decode)]
    held = prefill._sequences["a"][0].blocks
    for source, target in zip(held, admitted.block_ids, strict=True):
        pools[1][target] = pools[0][source]
    decode.handle(Landed("a", len(prompt)))
    decode.handle(Start("a", {choice: firsts["a", choice][0].token for choice in choices}))
    rest, _ = run(decode)
    assert rest
    for choice in choices:
        assert ids(firsts["a", choice] + rest.get(("a", choice), [])) == ids(alone["a", choice])


@pytest.mark.parametrize("limits", [{"end_token_ids": ()}, {"min_tokens": 50}], ids=str)
def test_a_complete_answer_ends_even_where_no_end_is_allowed(
    model: Model, shared: Engine, limits: Any
) -> None:
    tokens = answer(shared, model.params(DATE, temperature=1.0, **limits))
    assert tokens[-1].finish == "stop"
    assert matches(DATE, model.text(ids(tokens)))
    endless = answer(shared, model.params(DIGITS, temperature=1.0, **limits, max_tokens=50))
    assert endless[-1].finish == "length"
    assert matches(DIGITS, model.text(ids(endless)))


def test_an_empty_answer_is_an_end_and_nothing_else(model: Model, shared: Engine) -> None:
    for limits in ({}, {"end_token_ids": ()}, {"min_tokens": 3}):
        tokens = answer(shared, model.params('start: ""', **limits))
        assert [(token.token in model.ends, token.finish) for token in tokens] == [(True, "stop")]


@pytest.mark.parametrize(
    "params",
    [
        {"grammar": DATE, "allowed_token_ids": (5, 6)},
        {"grammar": "", "allowed_token_ids": (5,), "bad_words": ((5,),)},
    ],
    ids=["grammar", "rules"],
)
def test_a_choice_without_a_next_token_fails_and_no_other(model: Model, shared: Engine, params: Any) -> None:
    others = mixed(model)
    expected, _ = run(shared, *others)
    bad = Submit("bad", "local", [3, 3], [], model.params(**params), choices=(0, 1))
    answers, failed = run(shared, *others[:4], bad, *others[4:])
    assert [(one.seq_id, one.choice, one.code) for one in failed] == [
        ("bad", 0, "unanswerable"),
        ("bad", 1, "unanswerable"),
    ]
    assert answers.pop(("bad", 0)) == answers.pop(("bad", 1)) == []
    assert {key: ids(tokens) for key, tokens in answers.items()} == {
        key: ids(tokens) for key, tokens in expected.items()
    }
    shared.handle(Drop("bad"))
    gauges = shared.take_report().gauges
    assert gauges.running == gauges.waiting == 0
    assert gauges.blocks_free + gauges.blocks_cached == gauges.blocks_total


def test_output_that_leaves_the_grammar_fails_with_the_reason(model: Model, shared: Engine) -> None:
    outputs = model.tokenizer.encode("2x", add_special_tokens=False)
    _, failed = run(shared, Submit("bad", "local", [3], outputs, model.params(DATE)))
    assert "grammar" in failed[0].message


def test_a_grammar_that_does_not_compile_is_refused(model: Model, shared: Engine) -> None:
    shared.handle(Submit("bad", "local", [3], [], model.params("start: missing")))
    while shared.preparing:
        shared.step()
    (refused,) = shared.take_report().refused
    assert (refused.seq_id, refused.code) == ("bad", "bad_request")
    assert "missing" in refused.message


def test_a_grammar_whose_shared_states_are_exhausted_is_compiled_anew(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers share what they find out of a grammar, up to a limit; no answer pays for the others."""
    few = LLParserLimits(max_lexer_states=200)
    monkeypatch.setattr("services.model.grammar._LIMITS", few)
    engine = model.engine()
    grammar = LLMatcher.grammar_from_regex("[yn]*y[yn]{12}")
    answers = [
        answer(engine, model.params(grammar, temperature=1.5, seed=seed, max_tokens=20), [seed % 200])
        for seed in range(40)
    ]
    again = [
        answer(model.engine(), model.params(grammar, temperature=1.5, seed=seed, max_tokens=20), [seed % 200])
        for seed in range(0, 40, 8)
    ]
    assert [ids(one) for one in answers[::8]] == [ids(one) for one in again]


def test_answers_that_fail_together_cost_the_step_one_compilation(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []

    def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
        compiled.append(grammar)
        return LLMatcher(tokenizer, grammar)

    monkeypatch.setattr("services.engine.device.grammar.compile_grammar", compile_grammar)
    grammars = Grammars(GrammarVocabulary.of(model.tokenizer).load, threads=1)
    beyond = model.tokenizer.encode("no date", add_special_tokens=False)
    samples = [Sample(model.params(DATE), [1], beyond) for _ in range(16)]
    assert all(guide.matcher.is_error() for guide in grammars.guides(samples))
    assert compiled == [DATE] * 2, "at its beginning, and once more for all of them"
    monkeypatch.setattr("services.engine.device.grammar.RENEWALS_S_MAX", 0.0)
    assert all(guide.matcher.is_error() for guide in grammars.guides(samples))
    assert compiled == [DATE] * 2, "a compilation that takes long is not repeated in a step"


def test_only_so_many_grammars_are_kept(model: Model) -> None:
    grammars = Grammars(GrammarVocabulary.of(model.tokenizer).load, threads=2)
    for n in range(60):
        while not grammars.prepare(f'start: "{n}"'):
            time.sleep(0.001)
    assert len(grammars._compiling) <= 33
    samples = [Sample(model.params(f'start: "{n}"'), [1], []) for n in range(60)]
    logits = torch.randn(60, GrammarVocabulary.of(model.tokenizer).size)
    for _ in range(3):
        guidance = Guidance(grammars, samples)
        tokens = sample_tokens(logits, samples, restrict=guidance.restrict)
        guidance.follow(tokens)
        assert not guidance.failures
        for sample, token in zip(samples, tokens, strict=True):
            sample.output_ids.append(token)
    del samples, guidance, sample
    gc.collect()
    assert len(grammars._guides) == 0
