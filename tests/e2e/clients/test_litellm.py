"""LiteLLM with `openai/MODEL` and a base URL, as its proxy calls servers of OpenAI's API."""

import os
from types import ModuleType

import pytest

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL

CAPITAL = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


@pytest.fixture(scope="module")
def litellm() -> ModuleType:
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # it would ask GitHub for prices at its import
    import litellm

    litellm.telemetry = False
    return litellm


@pytest.fixture
def asked(split: RunningCluster, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    where = {"api_base": f"{split.url}/v1", "api_key": "none", "num_retries": 0, "timeout": 120}
    return {"model": f"openai/{MODEL}", "messages": CAPITAL, "temperature": 0, "max_tokens": 24, **where}


async def test_answers_are_the_same_whole_streamed_and_asynchronous(
    litellm: ModuleType, asked: dict[str, object]
) -> None:
    whole = litellm.completion(**asked, logprobs=True, top_logprobs=2)
    text = whole.choices[0].message.content
    assert "Paris" in text
    assert whole.choices[0].finish_reason == "stop"
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2
    assert (await litellm.acompletion(**asked)).choices[0].message.content == text
    streamed = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices) == text
    assert streamed[-1].usage.completion_tokens == whole.usage.completion_tokens
    pieces = [
        chunk.choices[0].delta.content or ""
        async for chunk in await litellm.acompletion(**asked, stream=True)
    ]
    assert "".join(pieces) == text


def test_text_is_completed(litellm: ModuleType, asked: dict[str, object]) -> None:
    del asked["messages"]
    asked["model"] = f"text-completion-openai/{MODEL}"
    told = litellm.text_completion(**asked, prompt="Once upon a time", ignore_eos=True)
    assert told.usage.completion_tokens == 24
    assert told.choices[0].text


def test_errors_are_those_that_it_documents(litellm: ModuleType, asked: dict[str, object]) -> None:
    with pytest.raises(litellm.BadRequestError, match="temperature"):
        litellm.completion(**asked | {"temperature": 7})
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked | {"model": "openai/nobody-has-this"})
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(**asked | {"messages": [{"role": "user", "content": "word " * 9000}]})
