"""Bias, allowed tokens and bad words, beside transformers' processors and on what they leave to sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor

from services.core.sampling import SamplingParams
from services.engine.device.logit_rules import LogitRules, RuleCache
from services.engine.device.sampler import sample_tokens
from services.engine.runner import Sample

VOCAB = 12
TOKENS = st.integers(0, VOCAB - 1)
WORDS = st.lists(st.lists(TOKENS, min_size=1, max_size=3), min_size=1, max_size=6)


def params(**rules: object) -> SamplingParams:
    return SamplingParams(max_tokens=9, **rules)  # type: ignore[arg-type]


def applied(rules: SamplingParams, logits: torch.Tensor, output: list[int]) -> torch.Tensor:
    return LogitRules(rules, len(logits), logits.device).apply(logits, output)


@settings(max_examples=60)
@given(words=WORDS, output=st.lists(TOKENS, min_size=1, max_size=8))
def test_bad_words_are_forbidden_where_transformers_forbids_them(
    words: list[list[int]], output: list[int]
) -> None:
    logits = torch.randn(VOCAB)
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([output]), logits.unsqueeze(0))[0]
    actual = applied(params(bad_words=tuple(map(tuple, words))), logits, output)
    assert torch.equal(actual, expected)


def test_a_longer_bad_word_is_free_before_the_answer_begins() -> None:
    rules = params(bad_words=((3, 4), (5,)))
    assert applied(rules, torch.zeros(VOCAB), []).isinf().nonzero().flatten().tolist() == [5]


@settings(max_examples=30)
@given(bias=st.dictionaries(TOKENS, st.floats(-100, 100, width=32), min_size=1))
def test_bias_is_added_as_transformers_adds_it(bias: dict[int, float]) -> None:
    logits = torch.randn(VOCAB)
    reference = SequenceBiasLogitsProcessor([[[token], value] for token, value in bias.items()])
    expected = reference(torch.tensor([[0]]), logits.unsqueeze(0))[0]
    assert torch.allclose(applied(params(logit_bias=bias), logits, []), expected)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_sampled(temperature: float) -> None:
    rules = params(temperature=temperature, allowed_token_ids=(2, 7, 9), bad_words=((7,),))
    logits = torch.randn(1, VOCAB)
    drawn = {sample_tokens(logits, [Sample(rules, [1], [], choice)])[0] for choice in range(60)}
    assert drawn <= {2, 9}
    assert len(drawn) == (1 if temperature == 0 else 2)


def test_rules_are_made_once_for_a_request_and_never_taken_for_anothers() -> None:
    cache, logits = RuleCache(), torch.zeros(2, VOCAB)
    one = params(logit_bias={1: 5.0})
    assert cache.of(one, logits) is cache.of(one, logits)
    for _ in range(1000):  # whose ids are reused as soon as they are gone
        biased = cache.of(params(logit_bias={2: 3.0}), logits).apply(logits[0], [])
        assert biased.tolist() == [0.0, 0.0, 3.0, *[0.0] * 9]
