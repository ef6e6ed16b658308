"""Structured answers with the real model: what the grammar allows, and the same through every route."""

import asyncio
import json
from typing import Any, Literal

import httpx
import openai
from pydantic import BaseModel, ConfigDict, Field

from tests.support.completions import MODEL

Colour = Literal["red", "green", "blue"]


class Pet(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=12)
    colour: Colour
    age: int = Field(ge=0, le=30)
    tags: list[Colour] = Field(max_length=3)


FORMS: list[dict[str, Any]] = [
    {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "pet", "schema": Pet.model_json_schema()},
        }
    },
    {"guided_regex": "[0-9]{4}-[0-9]{2}-[0-9]{2}", "ignore_eos": True, "temperature": 0},
    {"guided_choice": ["yes", "yesterday", "no"], "n": 3},
    {"structured_outputs": {"grammar": 'root ::= "SELECT " ("a" | "b") (", " ("a" | "b")){0,4}'}},
]


async def answers(http: httpx.AsyncClient, form: dict[str, Any]) -> list[tuple[str, str]]:
    body = {"model": MODEL, "prompt": "Here is a cat as JSON:\n", "max_tokens": 300, "seed": 3, **form}
    response = await http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return [(choice["text"], choice["finish_reason"]) for choice in response.json()["choices"]]


async def test_structured_answers_are_the_same_through_both_workers_and_one(split, alone) -> None:
    async with split.http() as both, alone.http() as lonely:
        through_both = await asyncio.gather(*(answers(both, form) for form in FORMS))
        through_one = [await answers(lonely, form) for form in FORMS]  # in other company, too
    assert through_both == through_one
    (pet, date, words, query) = through_both
    assert all(finish == "stop" for form in through_both for _, finish in form)
    Pet.model_validate_json(pet[0][0])
    assert len(date[0][0]) == 10
    assert {text for text, _ in words} <= {"yes", "yesterday", "no"}
    assert query[0][0].startswith("SELECT ")


async def test_openai_parses_an_answer_into_a_model_of_pydantic(split) -> None:
    client = openai.AsyncOpenAI(base_url=f"{split.url}/v1", api_key="any", max_retries=0)
    messages: list[Any] = [{"role": "user", "content": "Describe a cat as JSON."}]
    async with client:
        whole = await client.chat.completions.parse(
            model=MODEL, messages=messages, response_format=Pet, seed=1, max_tokens=300
        )
        assert isinstance(whole.choices[0].message.parsed, Pet)
        async with client.chat.completions.stream(
            model=MODEL, messages=messages, response_format=Pet, seed=1, max_tokens=300
        ) as stream:
            streamed = await stream.get_final_completion()
    assert streamed.choices[0].message.parsed == whole.choices[0].message.parsed
    assert json.loads(whole.choices[0].message.content or "")["colour"] in ("red", "green", "blue")
