"""From a checked request to tokens and sampling parameters, with the default model."""

import asyncio
import random
import threading
from dataclasses import replace

import pytest
import tokenizers
from tokenizers.processors import TemplateProcessing

from services.core.errors import BadRequest
from services.gateway.api.schema import ChatCompletionRequest, CompletionRequest
from services.gateway.door.tenant import Tenant
from services.gateway.text.prompt import PromptReader
from services.gateway.text.tokenizing import THREAD_CHARACTERS_MIN, THREADS_MAX, Tokenizing
from services.model.tokenizer import Tokenizer
from tests.unit.gateway.in_memory_cluster import MODEL

CONTEXT = 200


@pytest.fixture
def reader(served_model) -> PromptReader:
    return PromptReader(served_model, lambda: CONTEXT, 8, random.Random(5))


def chat(*messages, **fields) -> ChatCompletionRequest:
    return ChatCompletionRequest.model_validate({"model": MODEL, "messages": list(messages), **fields})


def completion(prompt, **fields) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": MODEL, "prompt": prompt, **fields})


async def test_a_chat_goes_through_the_model_s_template(reader, tokenizer) -> None:
    generation = await reader.read_one(chat({"role": "user", "content": "Hello"}), "r", 9.0)
    text = tokenizer.decode(generation.prompt_ids, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert (generation.request_id, generation.deadline) == ("r", 9.0)


async def test_text_parts_are_joined_and_developers_are_systems(reader) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    split = await reader.read_one(
        chat({"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}), "r", 0.0
    )
    plain = await reader.read_one(
        chat({"role": "system", "content": "Be brief."}, {"role": "user", "content": "one\ntwo"}), "r", 0.0
    )
    assert split.prompt_ids == plain.prompt_ids


async def test_a_long_prompt_gives_the_same_tokens_as_the_tokenizer(reader, tokenizer) -> None:
    text = "a" * THREAD_CHARACTERS_MIN + " end"
    reader = PromptReader(reader.model, lambda: 10**6, 8, reader.rng)
    generation = await reader.read_one(completion(text), "r", 0.0)
    assert generation.prompt_ids == tokenizer.encode(text, add_special_tokens=True)


@pytest.mark.parametrize("prompt", ["Hello", [5, 6]], ids=str)
async def test_a_list_of_one_prompt_is_that_prompt(reader, prompt) -> None:
    in_a_list = await reader.read_one(completion([prompt]), "r", 0.0)
    assert in_a_list.prompt_ids == (await reader.read_one(completion(prompt), "r", 0.0)).prompt_ids


LONG_PROMPTS = {
    "chat": chat({"role": "user", "content": "a" * THREAD_CHARACTERS_MIN}),
    "completion": completion("a" * (THREAD_CHARACTERS_MIN + 1)),
    "many": completion(["a"] * 100),
}


@pytest.mark.parametrize("request_", LONG_PROMPTS.values(), ids=LONG_PROMPTS)
async def test_long_prompts_are_tokenised_beside_the_event_loop(served_model, request_) -> None:
    threads: set[threading.Thread] = set()

    class Watched(Tokenizer):
        def encode(self, *args, **kwargs) -> list[int]:
            threads.add(threading.current_thread())
            return super().encode(*args, **kwargs)

    plain = served_model.tokenizer
    watched = Watched(plain.backend, plain.end_token_ids, plain.chat_template)
    model = replace(served_model, tokenizing=Tokenizing(watched))
    await PromptReader(model, lambda: 10**6, 8, random.Random(5)).read(request_, "r", 0.0)
    assert threads
    assert threading.current_thread() not in threads


async def test_no_more_than_two_long_prompts_are_tokenised_at_once(served_model) -> None:
    running, most = 0, 0
    lock = threading.Lock()

    class Watched(Tokenizer):
        def encode(self, *args, **kwargs) -> list[int]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            ids = super().encode(*args, **kwargs)
            with lock:
                running -= 1
            return ids

    plain = served_model.tokenizer
    tokenizing = Tokenizing(Watched(plain.backend, plain.end_token_ids, plain.chat_template))
    texts = ["word " * 2000] * 8
    await asyncio.gather(*(tokenizing.encode([text], add_special_tokens=False) for text in texts))
    assert most == THREADS_MAX


@pytest.mark.parametrize("kind", [chat, completion])
async def test_a_prompt_far_beyond_the_context_is_refused_without_tokenising_it(served_model, kind) -> None:
    class Unused(Tokenizer):
        def encode(self, *args, **kwargs) -> list[int]:
            raise AssertionError("it was tokenised")

    plain = served_model.tokenizer
    tokenizing = Tokenizing(Unused(plain.backend, plain.end_token_ids, plain.chat_template))
    reader = PromptReader(replace(served_model, tokenizing=tokenizing), lambda: CONTEXT, 8, random.Random(5))
    text = "a" * 8_000_000
    with pytest.raises(BadRequest) as refused:
        await reader.read(kind({"role": "user", "content": text}) if kind is chat else kind(text), "r", 0.0)
    assert refused.value.param == ("messages" if kind is chat else "prompt")
    assert refused.value.code == "context_length_exceeded"


async def test_answers_may_fill_the_context_in_chats_and_sixteen_tokens_in_completions(reader) -> None:
    chatting = await reader.read_one(chat({"role": "user", "content": "Hello"}), "r", 0.0)
    assert chatting.sampling.max_tokens == CONTEXT - len(chatting.prompt_ids)
    assert (await reader.read_one(completion("Hello"), "r", 0.0)).sampling.max_tokens == 16
    assert (await reader.read_one(completion([5] * (CONTEXT - 3)), "r", 0.0)).sampling.max_tokens == 3


async def test_max_completion_tokens_wins_over_max_tokens(reader) -> None:
    request = chat({"role": "user", "content": "Hi"}, max_tokens=3, max_completion_tokens=4)
    assert (await reader.read_one(request, "r", 0.0)).sampling.max_tokens == 4


@pytest.mark.parametrize(("prompt_tokens", "fits"), [(CONTEXT - 10, True), (CONTEXT - 9, False)])
async def test_prompt_and_answer_fit_the_context_exactly(reader, prompt_tokens, fits) -> None:
    request = completion([5] * prompt_tokens, max_tokens=10)
    if fits:
        assert (await reader.read_one(request, "r", 0.0)).sampling.max_tokens == 10
        return
    with pytest.raises(BadRequest) as refused:
        await reader.read_one(request, "r", 0.0)
    assert (refused.value.param, refused.value.code) == ("max_tokens", "context_length_exceeded")


@pytest.mark.parametrize("seed", [0, 5, -1, 2**63, -(2**100)])
async def test_any_seed_fits_a_signed_64_bit_integer_and_stays_the_same(reader, seed) -> None:
    seeds = {(await reader.read_one(completion("a", seed=seed), "r", 0.0)).sampling.seed for _ in range(2)}
    assert len(seeds) == 1
    assert 0 <= seeds.pop() < 2**63


async def test_seeds_are_drawn_when_none_is_given_and_follow_the_gateway_s(served_model) -> None:
    async def drawn() -> list[int]:
        reader = PromptReader(served_model, lambda: CONTEXT, 8, random.Random(11))
        return [(await reader.read_one(completion("a"), "r", 0.0)).sampling.seed for _ in range(3)]

    first, second = await drawn(), await drawn()
    assert first == second
    assert len(set(first)) == 3


async def test_end_tokens_are_the_model_s_and_the_client_s(reader, tokenizer) -> None:
    ends = tokenizer.end_token_ids

    async def end_ids(**fields) -> set[int]:
        return set((await reader.read_one(completion("a", **fields), "r", 0.0)).sampling.end_token_ids)

    assert await end_ids() == ends
    assert await end_ids(stop_token_ids=[50, 60]) == ends | {50, 60}
    assert await end_ids(stop_token_ids=[50], ignore_eos=True) == {50}


async def test_parameters_arrive_and_defaults_are_openai_s(reader) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.25,
        "min_p": 0.125,
        "presence_penalty": -2.0,
        "frequency_penalty": 2.0,
        "repetition_penalty": 1.5,
        "min_tokens": 3,
    }
    sampling = (await reader.read_one(completion("a", **given, top_k=40), "r", 0.0)).sampling
    assert {name: getattr(sampling, name) for name in given} == given
    assert sampling.top_k == 40
    default = (await reader.read_one(completion("a"), "r", 0.0)).sampling
    assert (default.temperature, default.top_p, default.top_k, default.min_p) == (1.0, 1.0, 0, 0.0)
    assert (await reader.read_one(completion("a", top_k=-1), "r", 0.0)).sampling.top_k == 0


async def test_the_rest_of_the_request_arrives(reader) -> None:
    request = completion("a", stop=["x", "y"], cache_salt="mine", skip_special_tokens=False)
    tenant = Tenant.of("Bearer key")
    generation = await reader.read_one(request, "r", 0.0, tenant)
    assert (generation.stop, generation.skip_special_tokens) == (("x", "y"), False)
    assert (generation.tenant, generation.salt) == (tenant.id, tenant.salt("mine", "key"))


async def test_special_tokens_are_added_to_completions_and_not_to_chats_or_as_asked(served_model) -> None:
    [end, *_] = served_model.tokenizer.end_token_ids
    backend = tokenizers.Tokenizer.from_str(served_model.tokenizer.backend.to_str())
    name = backend.id_to_token(end)
    backend.post_processor = TemplateProcessing(single=f"{name} $A", special_tokens=[(name, end)])
    tokenizer = Tokenizer(backend, frozenset({end}), served_model.tokenizer.chat_template)
    model = replace(served_model, tokenizer=tokenizer, tokenizing=Tokenizing(tokenizer))
    reader = PromptReader(model, lambda: CONTEXT, 8, random.Random(5))
    hello = {"role": "user", "content": "Hello"}

    async def begins_with_it(request) -> bool:
        return (await reader.read_one(request, "r", 0.0)).prompt_ids[0] == end

    assert await begins_with_it(completion("Hello"))
    assert not await begins_with_it(completion("Hello", add_special_tokens=False))
    assert not await begins_with_it(chat(hello))
    assert await begins_with_it(chat(hello, add_special_tokens=True))
