"""Wrong input is a 400 (or 404, 405, 413) with OpenAI's error body, naming the parameter."""

import gzip
import json

import pytest
from pydantic import ValidationError

from services.gateway.api.schema import ChatCompletionRequest, CompletionRequest
from tests.unit.gateway.in_memory_cluster import MODEL
from tests.unit.gateway.scripted_worker_server import report

HELLO = [{"role": "user", "content": "hi"}]
NAMED = {"type": "function", "function": {"name": "b"}}
ALLOWED = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}
CALL = {"id": "c", "type": "function", "function": {"name": "a", "arguments": "{}"}}


def tool(name: str, parameters: dict | None = None) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


@pytest.fixture
def network() -> bool:
    return False


BAD_EVERYWHERE = [
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": float("nan")}, "temperature"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": -1}, "min_p"),
    ({"seed": "one"}, "seed"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**6}, "max_tokens"),
    ({"max_tokens": 5, "min_tokens": 6}, "min_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop[1]"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": 7}, "stop"),
    ({"stop": ["a" * 1001]}, "stop[0]"),
    ({"guided_choice": [str(n) for n in range(2000)]}, "guided_choice"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"stop_token_ids": [-1] * 12}, "stop_token_ids[0]"),
    ({"stop_token_ids": [10**7]}, "stop_token_ids"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": 1.5}, "n"),
    ({"n": "2"}, "n"),
    ({"n": 2, "best_of": 3}, "best_of"),
    ({"n": 2, "best_of": 1}, "best_of"),
    ({"n": True}, "n"),
    ({"best_of": 3}, "best_of"),
    ({"top_logprobs": 5}, "top_logprobs"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"prompt_logprobs": True}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"suffix": "end"}, "suffix"),
    ({"logit_bias": {"5": 101}}, "logit_bias.5"),
    ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": {"-5": 1}}, "logit_bias"),
    ({"logit_bias": {"10000000": 1}}, "logit_bias"),
    ({"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [5, -1]}, "allowed_token_ids[1]"),
    ({"allowed_token_ids": [5, 10**7]}, "allowed_token_ids"),
    ({"bad_words": "one"}, "bad_words"),
    ({"bad_words": ["one", ""]}, "bad_words[1]"),
    ({"bad_words": ["  "]}, "bad_words"),
    ({"bad_words": ["x" * 201]}, "bad_words[0]"),
    ({"bad_words": ["one"] * 257}, "bad_words"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"functions": [{"name": "a"}]}, "functions"),
    ({"function_call": {"name": "a"}}, "function_call"),
    ({"response_format": {"type": "yaml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "b"}}}},
        "response_format",
    ),
    ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
    ({"guided_json": [], "n": 1}, "guided_json"),
    ({"guided_json": "{"}, "guided_json"),
    ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json"),
    ({"guided_json": '{"items":' * 500 + "{}" + "}" * 500}, "guided_json"),
    ({"guided_json": {}, "guided_whitespace_pattern": "("}, "guided_json"),
    ({"guided_regex": "(a"}, "guided_regex"),
    ({"guided_regex": "a" * 70_000}, "guided_regex"),
    ({"guided_regex": "\ud800"}, "guided_regex"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_choice": ["a", 5]}, "guided_choice[1]"),
    ({"guided_grammar": "root ::= other"}, "guided_grammar"),
    ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex"),
    ({"structured_outputs": {"json": {}, "choice": ["a"]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"model": 5}, "model"),
    ({"cache_salt": "\ud800"}, "cache_salt"),
    ({"stop": ["\ud800"]}, "stop[0]"),
]
BAD_CHAT = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": ""}] * 2049}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 500}] * 5}, "messages"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": 5}]}, "messages[0].role"),
    ({"messages": [{"role": "robot", "content": "hi"}, {"role": "user", "content": 5}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}] * 12}]}, "messages[0].content[0].text"),
    ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages[1].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": "word " * 9000}]}, "messages"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
    ({"tools": [tool("two words")]}, "tools[0].function.name"),
    ({"tools": [tool("a"), tool("b"), tool("a")]}, "tools"),
    ({"tools": [tool("a")] * 129}, "tools"),
    ({"tools": [tool("a", {"type": "string"})]}, "tools[0].function.parameters"),
    ({"tools": [tool("a", {"type": "object", "properties": []})]}, "tools[0].function.parameters"),
    ({"tools": [tool("a", {"description": "word " * 300_000})]}, "tools"),
    ({"tools": [tool("a", {"description": "\ud800"})]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tool_choice": NAMED}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": NAMED}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": "always"}, "tool_choice"),
    ({"tools": [tool("a")], "tool_choice": ALLOWED}, "tool_choice"),
    ({"chat_template": "mine"}, "chat_template"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"x": "\ud800"}, "documents": [{"text": "\ud800"}]}, "documents"),
    ({"documents": [{"text": "x"}]}, "documents"),
    ({"reasoning_effort": "most"}, "reasoning_effort"),
    ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
    ({"continue_final_message": True, "messages": [{"role": "assistant"}]}, "continue_final_message"),
    ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages[0]"),
    ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].function"),
    ({"messages": [*HELLO, {"role": "assistant", "tool_calls": [CALL] * 2049}]}, "messages"),
    (
        {"messages": [{"role": "assistant", "content": [{"type": "refusal"}]}]},
        "messages[0].content[0].refusal",
    ),
    ({"messages": [{"role": "function", "content": "x", "name": "a"}]}, "messages[0].role"),
    ({"max_completion_tokens": 10**6}, "max_completion_tokens"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 20, "n": 24, "max_completion_tokens": 1000}, "max_completion_tokens"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
    ({"echo": True}, "echo"),
]
BAD_COMPLETION = [
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": -1}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"echo": "yes"}, "echo"),
    ({"prompt": [5] * 1000, "echo": True, "logprobs": 20, "n": 20}, "logprobs"),
    ({"prompt": [[5] * 900] * 30, "prompt_logprobs": 9}, "prompt_logprobs"),
    ({"logprobs": 20, "max_tokens": 1000, "n": 24}, "max_tokens"),
    ({"tools": [tool("a")]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [1, -1]}, "prompt[1]"),
    ({"prompt": [1, 10**7]}, "prompt"),
    ({"prompt": [-1] * 12}, "prompt[0]"),
    ({"prompt": [["one"]]}, "prompt[0][0]"),
    ({"prompt": [""]}, "prompt[0]"),
    ({"prompt": ["one", ""]}, "prompt[1]"),
    ({"prompt": [[1], []]}, "prompt[1]"),
    ({"prompt": ["one", "\ud800"]}, "prompt[1]"),
    ({"prompt": [[1], [2, 10**7]]}, "prompt[1]"),
    ({"prompt": [[1], [2, -3]]}, "prompt[1][1]"),
    ({"prompt": ["one", 5]}, "prompt[1]"),
    ({"prompt": [5, "one"]}, "prompt[1]"),
    ({"prompt": [["one"], {}]}, "prompt[0][0]"),
    ({"prompt": ["one", [[1]]]}, "prompt[1][0]"),
    ({"prompt": ["one", "word " * 9000]}, "prompt[1]"),
    ({"prompt": ["one", [5] * 2048]}, "prompt[1]"),
    ({"prompt": ["one"] * 257}, "prompt"),
    ({"prompt": ["one"] * 5000}, "prompt"),
    ({"prompt": ["one"] * 129, "n": 2}, "prompt"),
    ({"prompt": "word " * 9000}, "prompt"),
]


async def refused(cluster, path: str, body: dict) -> dict:
    answered = await cluster.http.post(
        path, content=json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answered.status_code == 400, answered.text
    error = answered.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    return error


@pytest.mark.parametrize(("change", "param"), BAD_EVERYWHERE + BAD_CHAT, ids=str)
async def test_a_bad_chat_request_names_its_parameter(cluster, change, param) -> None:
    error = await refused(cluster, "/v1/chat/completions", {"model": MODEL, "messages": HELLO, **change})
    assert error["param"] == param
    assert cluster.workers.calls == []


async def test_of_several_types_the_one_that_was_given_has_the_problem(cluster) -> None:
    error = await refused(cluster, "/v1/completions", {"model": MODEL, "prompt": "a", "stop": ["a"] * 5})
    assert "at most 4 items" in error["message"]


@pytest.mark.parametrize(("change", "param"), BAD_EVERYWHERE + BAD_COMPLETION, ids=str)
async def test_a_bad_completion_request_names_its_parameter(cluster, change, param) -> None:
    error = await refused(cluster, "/v1/completions", {"model": MODEL, "prompt": "hi", **change})
    assert error["param"] == param
    assert cluster.workers.calls == []


@pytest.mark.parametrize(
    ("schema", "bad"),
    [
        (CompletionRequest, {"prompt": [-1] * 1000}),
        (CompletionRequest, {"prompt": [[-1] * 1000]}),
        (CompletionRequest, {"prompt": ["a", *[5] * 1000]}),
        (CompletionRequest, {"prompt": [[-1], *[[-1] * 1000] * 1000]}),
        (CompletionRequest, {"prompt": "a", "stop_token_ids": [-1] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "robot", "content": "hi"}] * 1000}),
        (ChatCompletionRequest, {"messages": [{"role": "user", "content": [{"type": "image_url"}] * 1000}]}),
    ],
    ids=["prompt", "a list of one prompt", "prompts", "lists", "stop_token_ids", "messages", "parts"],
)
def test_a_list_is_checked_only_up_to_its_first_bad_element(schema, bad) -> None:
    with pytest.raises(ValidationError) as invalid:
        schema.model_validate({"model": MODEL, **bad})
    assert invalid.value.error_count() < 5


@pytest.mark.parametrize("change", [{"max_tokens": 10**6}, {"prompt": [5] * 2048}, {"prompt": [5] * 5000}])
async def test_an_overrun_context_has_openai_s_code(cluster, change) -> None:
    error = await refused(cluster, "/v1/completions", {"model": MODEL, "prompt": "hi", **change})
    assert error["code"] == "context_length_exceeded"


async def test_the_smallest_context_of_the_workers_is_the_limit(start_cluster) -> None:
    cluster = await start_cluster(reports=[report("d1", "decode", context_tokens_max=100)])
    body = {"model": MODEL, "prompt": [5] * 90}
    await refused(cluster, "/v1/completions", body | {"max_tokens": 11})
    assert (await cluster.http.post("/v1/completions", json=body | {"max_tokens": 10})).status_code == 200


@pytest.mark.parametrize(
    "harmless",
    [
        {"n": 1, "best_of": 1, "echo": False, "logprobs": None, "logit_bias": {}, "suffix": None},
        {"n": 2, "best_of": 2, "logprobs": False, "bad_words": [], "suffix": "", "prompt_logprobs": None},
        {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"},
        {"user": "me", "metadata": {"a": "b"}, "store": False, "something_new": [1]},
        {"temperature": None, "top_p": None, "max_tokens": None, "stop": None, "stream_options": None},
        {"temperature": 0, "top_p": 0, "top_k": -1, "min_p": 1, "seed": -(2**70), "cache_salt": "tenant"},
    ],
    ids=str,
)
async def test_values_that_ask_for_nothing_special_are_accepted(cluster, harmless) -> None:
    body = {"model": MODEL, "prompt": "hi", **harmless}
    assert (await cluster.http.post("/v1/completions", json=body)).status_code == 200


async def test_an_unknown_field_is_warned_about_once(cluster, caplog) -> None:
    body = {"model": MODEL, "prompt": "hi", "seen_never_before": 1}
    for _ in range(2):
        await cluster.http.post("/v1/completions", json=body)
    assert caplog.text.count("seen_never_before") == 1


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"{not json", "application/json"),
        (b"[1, 2]", "application/json"),
        (b"null", "application/json"),
        (b"", "application/json"),
        (b"\xff\xfe", "application/json"),
        (b"[" * 100_000, "application/json"),
        (b"model=x", "application/x-www-form-urlencoded"),
    ],
    ids=["no json", "a list", "null", "nothing", "no text", "deep", "a form"],
)
async def test_a_body_that_is_no_json_object_is_a_400(cluster, content, kind) -> None:
    answered = await cluster.http.post("/v1/completions", content=content, headers={"Content-Type": kind})
    assert answered.status_code == 400
    assert answered.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "name"), [("/v1/completions", "allowed_token_ids"), ("/detokenize", "tokens")]
)
async def test_more_token_ids_than_any_vocabulary_has_are_refused(cluster, path, name) -> None:
    error = await refused(cluster, path, {"model": MODEL, "prompt": "hi", name: [5] * 300_000})
    assert error["param"] == name


@pytest.mark.parametrize(
    "content",
    [gzip.compress(b"{}"), b'{"prompt": "\xe9"}', b'{"seed": 1' + b"0" * 5000 + b"}", b"[" * 100_000],
    ids=["compressed", "latin-1", "a long number", "deep"],
)
async def test_a_body_that_cannot_be_read_is_told_why(cluster, content) -> None:
    answered = await cluster.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answered.status_code == 400
    assert "UTF-8" in answered.json()["error"]["message"]


@pytest.mark.parametrize(
    "bad",
    [{"model": "x" * 10**6}, {"logit_bias": {"x" * 10**6: "y"}}, {"guided_regex": "(" * 10**4}],
    ids=list,
)
async def test_an_error_does_not_quote_megabytes(cluster, bad) -> None:
    answered = await cluster.http.post("/v1/completions", json={"model": MODEL, "prompt": "hi", **bad})
    assert answered.status_code in (400, 404)
    assert len(answered.content) < 3000


@pytest.mark.parametrize("name", ["other", "", "\ud800"])
async def test_an_unknown_model_is_a_404(cluster, name) -> None:
    content = json.dumps({"model": name, "prompt": "hi"})
    answered = await cluster.http.post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert answered.status_code == 404
    assert answered.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405)],
)
async def test_unknown_paths_and_methods_have_the_same_error_body(cluster, method, path, status) -> None:
    answered = await cluster.http.request(method, path)
    assert answered.status_code == status
    assert answered.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("declared", [True, False])
async def test_a_body_over_the_limit_is_a_413(start_cluster, declared) -> None:
    cluster = await start_cluster(body_bytes_max=1000)
    body = json.dumps({"model": MODEL, "prompt": "x" * 2000}).encode()

    async def pieces():
        yield body

    answered = await cluster.http.post(
        "/v1/completions",
        content=body if declared else pieces(),
        headers={"Content-Type": "application/json"},
    )
    assert answered.status_code == 413
    assert answered.json()["error"]["type"] == "invalid_request_error"
