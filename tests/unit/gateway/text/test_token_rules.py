"""Bias, allowed tokens and bad words as the worker's sampler takes them."""

import pytest

from services.gateway.api.schema import CompletionRequest
from services.gateway.text.token_rules import TokenRules, token_rules


async def rules(tokenizer, **fields: object) -> TokenRules:
    request = CompletionRequest.model_validate({"model": "m", "prompt": "hi", **fields})
    return await token_rules(request, tokenizer)


def ids(tokenizer, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.encode(text, add_special_tokens=False))


async def test_a_request_without_rules_has_none(tokenizer) -> None:
    nothing = {"logit_bias": {}, "allowed_token_ids": (), "bad_words": ()}
    assert await rules(tokenizer) == nothing
    assert await rules(tokenizer, logit_bias=None, bad_words=None, allowed_token_ids=None) == nothing


async def test_bias_and_allowed_tokens_are_token_ids(tokenizer) -> None:
    made = await rules(tokenizer, logit_bias={"5": -100, "007": 2.5}, allowed_token_ids=[9, 1])
    assert made["logit_bias"] == {5: -100.0, 7: 2.5}
    assert made["allowed_token_ids"] == (9, 1)


@pytest.mark.parametrize("word", ["Paris", " Paris"])
async def test_a_bad_word_is_bad_at_the_begin_and_within_a_text(tokenizer, word) -> None:
    made = await rules(tokenizer, bad_words=[word])
    assert made["bad_words"] == (ids(tokenizer, "Paris"), ids(tokenizer, " Paris"))


async def test_the_form_with_a_space_counts_only_if_it_has_as_many_tokens(tokenizer) -> None:
    """As in vLLM: else the space has tokens of its own."""
    assert len(ids(tokenizer, " 日")) > len(ids(tokenizer, "日"))
    assert (await rules(tokenizer, bad_words=["日"]))["bad_words"] == (ids(tokenizer, "日"),)


async def test_many_bad_words_are_tokenised_all_the_same(tokenizer) -> None:
    words = [f"word{n}" for n in range(100)]
    many = (await rules(tokenizer, bad_words=words))["bad_words"]
    one_by_one = [form for word in words for form in (await rules(tokenizer, bad_words=[word]))["bad_words"]]
    assert many == tuple(one_by_one)
