"""/tokenize and /detokenize say what a request's prompt is to the model."""

import pytest

from services.gateway.api.tokenization import TOKENIZED_MAX
from services.gateway.text.tokenizing import THREAD_CHARACTERS_MIN
from tests.unit.gateway.in_memory_cluster import MODEL

TEXT = "Paris, 日本 👍"
CHAT = [{"role": "user", "content": TEXT}]


@pytest.fixture
def network() -> bool:
    return False


async def ask(cluster, path: str, **body) -> dict:
    answered = await cluster.http.post(path, json=body)
    assert answered.status_code == 200, answered.text
    return answered.json()


async def prompt_of(cluster, path: str, **body) -> list[int]:
    """What the workers got."""
    await ask(cluster, path, model=MODEL, max_tokens=1, **body)
    return cluster.workers.calls[-1].sequence.prompt_ids


@pytest.mark.parametrize("text", [TEXT, TEXT * THREAD_CHARACTERS_MIN], ids=["short", "long"])
async def test_a_text_is_what_a_completion_computes_and_comes_back_whole(cluster, tokenizer, text) -> None:
    tokenized = await ask(cluster, "/tokenize", model=MODEL, prompt=text)
    assert tokenized["tokens"] == tokenizer.encode(text, add_special_tokens=True)
    assert (tokenized["count"], tokenized["token_strs"]) == (len(tokenized["tokens"]), None)
    assert tokenized["max_model_len"] == cluster.gateway.prompts.context_tokens_max()
    assert (await ask(cluster, "/detokenize", tokens=tokenized["tokens"]))["prompt"] == text


async def test_a_completion_s_prompt_is_what_tokenize_says(cluster) -> None:
    tokenized = await ask(cluster, "/tokenize", prompt=TEXT)
    assert tokenized["tokens"] == await prompt_of(cluster, "/v1/completions", prompt=TEXT)


async def test_a_chat_is_what_the_model_s_template_writes(cluster) -> None:
    tokenized = await ask(cluster, "/tokenize", messages=CHAT)
    assert tokenized["tokens"] == await prompt_of(cluster, "/v1/chat/completions", messages=CHAT)
    text = (await ask(cluster, "/detokenize", tokens=tokenized["tokens"]))["prompt"]
    assert text.endswith(f"<|im_start|>user\n{TEXT}<|im_end|>\n<|im_start|>assistant\n")


async def test_tokens_are_spelled_as_in_the_vocabulary_if_wanted(cluster) -> None:
    tokenized = await ask(cluster, "/tokenize", prompt="Hello world", return_token_strs=True)
    assert tokenized["token_strs"] == ["Hello", "Ġworld"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_special_tokens": 1}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0]"),
        ("/tokenize", {"prompt": "a" * (TOKENIZED_MAX + 1)}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [1, -1]}, "tokens[1]"),
        ("/detokenize", {"tokens": [10**7]}, "tokens"),
        ("/v1/embeddings", {"input": "a"}, "model"),
        ("/v1/embeddings", {"model": MODEL, "input": "a"}, "model"),
    ],
    ids=lambda value: str(value)[:80],
)
async def test_a_bad_request_names_its_parameter(cluster, path, body, param) -> None:
    answered = await cluster.http.post(path, json=body)
    assert (answered.status_code, answered.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/embeddings"])
async def test_an_unknown_model_is_a_404(cluster, path) -> None:
    answered = await cluster.http.post(path, json={"model": "other", "prompt": "a", "tokens": [1]})
    assert (answered.status_code, answered.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
async def test_a_full_gateway_tokenizes_nothing(start_cluster, path) -> None:
    cluster = await start_cluster(inflight_max=0)
    answered = await cluster.http.post(path, json={"prompt": "a", "tokens": [1]})
    assert answered.status_code == 429


async def test_the_version_is_the_package_s(cluster) -> None:
    version = (await cluster.http.get("/version")).json()["version"]
    assert version.startswith("20")
