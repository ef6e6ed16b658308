"""LangChain's ChatOpenAI against a base URL."""

import httpx
import pytest
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

from tests.support.cluster import RunningCluster
from tests.support.completions import MODEL

CAPITAL = "What is the capital of France? Answer in one word."


@pytest.fixture
def where(split: RunningCluster) -> dict[str, object]:
    return {
        "model": MODEL,
        "base_url": f"{split.url}/v1",
        "api_key": "none",
        "max_retries": 0,
        "http_client": httpx.Client(trust_env=False, timeout=120),
        "http_async_client": httpx.AsyncClient(trust_env=False, timeout=120),
    }


@pytest.fixture
def chat(where: dict[str, object]) -> ChatOpenAI:
    return ChatOpenAI(**where, temperature=0, max_tokens=24, stream_usage=True)


async def test_answers_are_the_same_invoked_streamed_and_in_a_batch(chat: ChatOpenAI) -> None:
    whole = chat.bind(logprobs=True).invoke(CAPITAL)
    assert "Paris" in whole.content
    assert whole.response_metadata["finish_reason"] == "stop"
    assert whole.response_metadata["logprobs"]["content"]
    assert whole.usage_metadata["output_tokens"] > 0
    pieces = list(chat.stream(CAPITAL))
    assert "".join(piece.content for piece in pieces) == whole.content
    assert [p.usage_metadata for p in pieces if p.usage_metadata][-1]["output_tokens"] == (
        whole.usage_metadata["output_tokens"]
    )
    batch = chat.batch([CAPITAL, [("system", "Answer in French."), ("human", CAPITAL)], CAPITAL])
    assert [batch[0].content, batch[2].content] == [whole.content] * 2
    assert (await chat.ainvoke(CAPITAL)).content == whole.content
    assert "".join([piece.content async for piece in chat.astream(CAPITAL)]) == whole.content


def test_its_completion_model_takes_several_prompts(where: dict[str, object]) -> None:
    told = OpenAI(**where, temperature=0, max_tokens=8, n=2, best_of=2).generate(["Once upon", "The sea is"])
    assert [len(choices) for choices in told.generations] == [2, 2]
    assert all(choice.text for choices in told.generations for choice in choices)
    assert told.llm_output["token_usage"]["completion_tokens"] <= 32


def test_tools_are_bound_and_called(chat: ChatOpenAI) -> None:
    @tool
    def weather(city: str, days: int) -> str:
        """The weather of a city in so many days."""
        return f"{city}: sunny in {days} days"

    asked = [HumanMessage("What will the weather in Paris be in 3 days?")]
    said = chat.bind_tools([weather], tool_choice="weather").invoke(asked, max_tokens=100)
    (call,) = said.tool_calls
    assert call["name"] == "weather"
    assert isinstance(call["args"]["city"], str)
    assert isinstance(call["args"]["days"], int)
    assert chat.bind_tools([weather]).invoke([*asked, said, weather.invoke(call)]).content is not None


class Person(BaseModel):
    """Somebody."""

    name: str
    age: int


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_answers_have_the_structure_that_was_asked_for(chat: ChatOpenAI, method: str) -> None:
    structured = chat.with_structured_output(Person, method=method)
    answers = structured.batch(["Anna is 31 years old.", "Tom is 7."], max_tokens=200)
    assert all(isinstance(answer, Person) for answer in answers)
