"""Logprobs in OpenAI's two shapes and vLLM's: whole, streamed, on every route and with a resume between."""

import asyncio
import json
from functools import partial
from itertools import chain

import pytest

from services.core.child_tasks import ChildTasks
from services.core.errors import WorkerLost
from services.core.logprobs import TokenLogprobs
from services.gateway.api.logprobs import ChatLogprobsWriter, CompletionLogprobsWriter
from services.gateway.api.responses import ChatCompletion, ChatCompletionChunk, Completion
from services.gateway.text.answer import ScoredToken, TextDelta
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault, scores_of
from tests.unit.gateway.api.test_token_ids import chunks_of
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "France?"}], "logprobs": True}
COMPLETION = {"model": MODEL, "prompt": "France is 日本", "max_tokens": 100}


@pytest.fixture
def network() -> bool:
    return False


async def chat(cluster, **body) -> dict:
    answered = await cluster.http.post("/v1/chat/completions", json=CHAT | body)
    assert answered.status_code == 200, answered.text
    return ChatCompletion.model_validate_json(answered.text).model_dump(exclude_unset=True)


async def complete(cluster, **body) -> dict:
    answered = await cluster.http.post("/v1/completions", json=COMPLETION | body)
    assert answered.status_code == 200, answered.text
    return Completion.model_validate_json(answered.text).model_dump(exclude_unset=True)


async def streamed(cluster, path: str, body: dict) -> list[dict]:
    """The choices of all chunks."""
    answered = await cluster.http.post(path, json=body | {"stream": True})
    chunks = chunks_of(answered.text)
    shape = ChatCompletionChunk if "chat" in path else Completion
    for chunk in chunks:
        shape.model_validate_json(json.dumps(chunk), strict=True)
    return [choice for chunk in chunks for choice in chunk["choices"]]


def bytes_of(content: list[dict]) -> bytes:
    return bytes(chain.from_iterable(token["bytes"] for token in content))


async def test_a_chat_has_each_token_s_logprob_and_bytes(cluster) -> None:
    (choice,) = (await chat(cluster, top_logprobs=2))["choices"]
    content = choice["logprobs"]["content"]
    assert len(content) == len(cluster.answer_ids)  # the end token's included
    assert bytes_of(content[:-1]).decode() == choice["message"]["content"] == ANSWER
    for token, token_id in zip(content, cluster.answer_ids, strict=True):
        scores = scores_of(token_id, 2)
        assert token["logprob"] == scores.logprob
        assert [top["logprob"] for top in token["top_logprobs"]] == list(scores.top_logprobs)
    assert {token["token"] for token in content} >= {"Paris", " is", " \\xe6", "\\x97", "<|im_end|>"}
    assert choice["logprobs"]["refusal"] is None


async def test_top_logprobs_are_left_out_unless_asked_for(cluster) -> None:
    (choice,) = (await chat(cluster))["choices"]
    assert all(token["top_logprobs"] == [] for token in choice["logprobs"]["content"])
    (choice,) = (await chat(cluster, logprobs=None))["choices"]
    assert choice["logprobs"] is None
    assert all(call.sequence.sampling.top_logprobs is None for call in cluster.workers.calls[2:])


@pytest.mark.parametrize("stop", [None, [" says so, but not this"], [" capital of"]])
async def test_a_stream_brings_the_logprobs_of_the_whole_answer_with_the_text_of_their_tokens(
    cluster, stop
) -> None:
    (whole,) = (await chat(cluster, stop=stop))["choices"]
    chunks = await streamed(cluster, "/v1/chat/completions", CHAT | {"stop": stop})
    content, text = [], ""
    for choice in chunks:
        text += choice["delta"].get("content") or ""
        new = (choice["logprobs"] or {"content": []})["content"]
        content += new
        if choice["finish_reason"] is None and new:
            # The text so far is that of the tokens so far, but for the held part of a character or word.
            assert text.startswith(bytes_of(content).decode(errors="ignore"))
    assert content == whole["logprobs"]["content"]
    assert text == whole["message"]["content"]


async def test_completions_have_lists_and_offsets_into_the_text(cluster) -> None:
    (choice,) = (await complete(cluster, logprobs=2))["choices"]
    scores = choice["logprobs"]
    assert len(scores["tokens"]) == len(cluster.answer_ids)
    for token, begin in zip(scores["tokens"][:-1], scores["text_offset"], strict=False):
        assert token.startswith("bytes:") or choice["text"][begin:].startswith(token)
    assert "bytes: \\xe6" in scores["tokens"]
    assert scores["text_offset"] == sorted(scores["text_offset"])
    for logprob, top in zip(scores["token_logprobs"], scores["top_logprobs"], strict=True):
        assert logprob in top.values()  # the third best is added to the two best
        assert len(top) == (3 if logprob == -0.75 else 2)


async def test_no_top_logprobs_leave_the_token_s_own(cluster) -> None:
    (choice,) = (await complete(cluster, logprobs=0))["choices"]
    scores = choice["logprobs"]
    tokens = zip(scores["tokens"], scores["token_logprobs"], strict=True)
    assert scores["top_logprobs"] == [{token: logprob} for token, logprob in tokens]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_an_echo_comes_before_each_answer_with_its_logprobs(cluster, tokenizer, n, stream) -> None:
    prompt = tokenizer.encode(COMPLETION["prompt"], add_special_tokens=True)
    body = COMPLETION | {"echo": True, "logprobs": 1, "n": n}
    plain = (await complete(cluster, logprobs=1, n=n))["choices"]
    if stream:
        choices = [joined(chunks) for chunks in by_index(await streamed(cluster, "/v1/completions", body))]
    else:
        choices = (await complete(cluster, **body))["choices"]
    for choice, answer in zip(choices, plain, strict=True):
        scores, alone = choice["logprobs"], answer["logprobs"]
        assert choice["text"] == COMPLETION["prompt"] + answer["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs"):
            assert scores[name][len(prompt) :] == alone[name]
        assert scores["token_logprobs"][0] is None
        assert scores["top_logprobs"][0] is None
        logprobs = scores["token_logprobs"][1 : len(prompt)]
        assert logprobs == [scores_of(token, 1).logprob for token in prompt[1:]]
        assert [offset - len(COMPLETION["prompt"]) for offset in scores["text_offset"][len(prompt) :]] == (
            alone["text_offset"]
        )


def by_index(choices: list[dict]) -> list[list[dict]]:
    return [
        [one for one in choices if one["index"] == index]
        for index in sorted({one["index"] for one in choices})
    ]


def joined(chunks: list[dict]) -> dict:
    scores = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    return {
        "text": "".join(chunk["text"] for chunk in chunks),
        "logprobs": {name: list(chain.from_iterable(s[name] for s in scores)) for name in scores[0]},
    }


@pytest.mark.parametrize("logprobs", [None, 1])
async def test_the_prompt_alone_comes_back_for_no_tokens(cluster, logprobs) -> None:
    answer = await complete(cluster, prompt=[504, 2], echo=True, max_tokens=0, logprobs=logprobs, n=2)
    assert answer["usage"]["completion_tokens"] == 0
    for choice in answer["choices"]:
        assert choice["text"] == "The<|im_end|>"
        assert choice["finish_reason"] == "length"
        scores = choice["logprobs"]
        assert scores is None or scores["tokens"] == ["The", "<|im_end|>"]
    assert {call.kind for call in cluster.workers.calls} == {"prefill"}
    assert cluster.metric("completion_tokens_total") == 0


async def test_several_prompts_are_echoed_each_before_its_own_answers(cluster) -> None:
    prompts = [[504, 338], [2], [504, 338, 1]]
    answer = await complete(cluster, prompt=prompts, echo=True, logprobs=1, max_tokens=1, n=2)
    assert [len(choice["logprobs"]["tokens"]) for choice in answer["choices"]] == [3, 3, 2, 2, 4, 4]


@pytest.mark.parametrize("path", ["chat", "completions"])
async def test_prompt_logprobs_have_vllm_s_shape_and_place(cluster, path) -> None:
    if path == "chat":
        answer = await chat(cluster, prompt_logprobs=1, logprobs=None)
        scores = answer["prompt_logprobs"]
    else:
        answer = await complete(cluster, prompt_logprobs=1)
        scores = answer["choices"][0]["prompt_logprobs"]
        assert answer["choices"][0]["logprobs"] is None
    prompt = cluster.workers.calls[0].sequence.prompt_ids
    assert scores[0] is None
    for token, entries in zip(prompt[1:], scores[1:], strict=True):
        expected = scores_of(token, 1)
        assert entries[str(token)]["logprob"] == expected.logprob
        assert entries[str(token)]["rank"] == expected.rank
        assert entries[str(expected.top_ids[0])]["rank"] == 1


@pytest.mark.parametrize(
    "body", [{"logprobs": 1}, {"logprobs": 2, "echo": True, "n": 2}, {"prompt_logprobs": 2, "n": 2}], ids=str
)
@pytest.mark.parametrize("split", ["always", "never"])
async def test_routes_and_resumes_give_the_same_logprobs(start_cluster, split, body) -> None:
    expected = (await complete(await start_cluster(), **body))["choices"]
    cluster = await start_cluster(route_split=split)
    assert (await complete(cluster, **body))["choices"] == expected
    cluster.workers.script(ANY_WORKER, "decode", Fault(WorkerLost("gone"), after_tokens=5))
    cluster.workers.calls.clear()
    assert (await complete(cluster, **body))["choices"] == expected
    asked = [call.sequence for call in cluster.workers.calls if call.sequence.output_ids]
    assert asked
    assert all(sequence.sampling.prompt_logprobs is None for sequence in asked)


async def test_a_prompt_that_is_scored_is_routed_as_if_nobody_had_it_cached(cluster) -> None:
    prompt = list(range(100, 164))
    for scored in (None, 0):
        body = {"prompt": prompt, "max_tokens": 2, "prompt_logprobs": scored, "explain": True}
        answer = await complete(cluster, **body)
        answer = await complete(cluster, **body)
        cached = max(offer["cached_tokens"] for offer in answer["routes"][0]["offers"])
        assert (cached > 0) == (scored is None)


async def test_a_worker_that_does_not_know_logprobs_of_prompts_is_an_error(cluster, monkeypatch) -> None:
    monkeypatch.setattr("services.gateway.workers.memory_worker_client.prompt_scores", lambda sequence: ())
    answered = await cluster.http.post("/v1/completions", json=COMPLETION | {"prompt_logprobs": 1})
    assert answered.status_code >= 500
    assert "logprobs" in answered.json()["error"]["message"]


async def test_others_go_on_between_the_logprobs_of_two_choices(served_model) -> None:
    scored = (ScoredToken(1, 0, TokenLogprobs(-1.0, 1)),)
    deltas = [TextDelta("a", choice=choice, tokens=scored) for choice in range(8)]
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    for form in (ChatLogprobsWriter, partial(CompletionLogprobsWriter, echoes=False)):
        async with ChildTasks() as tasks:
            tasks.start(other())
            turns = 0
            assert len(await form(served_model.token_bytes, 0, None).of_choices(deltas)) == len(deltas)
            assert turns >= len(deltas) - 1
