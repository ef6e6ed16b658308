"""Bias, allowed tokens, bad words and shown stop strings with the real model: the same on both routes."""

from typing import Any

import pytest

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL

PROMPT = "The capital of France is"
ALLOWED = [260, 282, 284, 411, 511]
RULES: dict[str, dict[str, Any]] = {
    "allowed": {"allowed_token_ids": ALLOWED, "temperature": 1.0, "seed": 3, "n": 2},
    "forced": {"logit_bias": {"411": 100}},
    "biased": {"logit_bias": {"411": 12.5, "260": -100}, "temperature": 1.0, "seed": 3},
    "bad words": {"bad_words": ["Paris", "the", "city of", "France"]},
    "stop": {"stop": ["is"], "include_stop_str_in_output": True},
}


async def choices(cluster: RunningCluster, **rules: Any) -> list[dict[str, Any]]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    async with cluster.http() as http:
        response = await http.post("/v1/completions", json=body | {"ignore_eos": True} | rules)
    assert response.status_code == 200, response.text
    found: list[dict[str, Any]] = response.json()["choices"]
    return found


@pytest.mark.parametrize("name", RULES)
async def test_rules_give_the_same_answer_on_both_routes(
    split: RunningCluster, alone: RunningCluster, name: str
) -> None:
    both = await choices(split, **RULES[name])
    assert both == await choices(alone, **RULES[name])
    plain = await choices(split)
    assert both != plain
    text, tokens = both[0]["text"], [token for choice in both for token in choice["token_ids"]]
    if name == "allowed":
        assert set(tokens) <= set(ALLOWED)
        assert len(set(tokens)) > 1
    elif name == "forced":
        assert set(tokens) == {411}
    elif name == "bad words":
        assert any(word in plain[0]["text"] for word in RULES[name]["bad_words"])
        assert not any(word in text for word in RULES[name]["bad_words"])
    elif name == "stop":
        assert plain[0]["text"].startswith(text)
        assert text.endswith("is")
