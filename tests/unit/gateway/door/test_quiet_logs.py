"""Whatever happens to a request, the log names it and holds nothing of what its client sent or got."""

import io
import logging

import pytest

from services.core.errors import BadRequest
from services.core.log import setup_logging
from services.gateway.workers.memory_worker_client import ANY_WORKER, Fault
from tests.unit.gateway.door.test_locked_door import Keys
from tests.unit.gateway.in_memory_cluster import ANSWER, MODEL

PROMPT = "a prompt that is nobody else's business"
CHAT = "/v1/chat/completions"


@pytest.fixture
def log():
    """What a process writes at INFO."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers = []
    stream = io.StringIO()
    setup_logging("gateway", stream=stream)
    yield stream
    root.handlers, root.level = handlers, level
    logging.captureWarnings(False)


async def test_no_log_holds_a_key_a_prompt_or_an_answer(start_cluster, log) -> None:
    keys = Keys()
    headers = await keys.create(requests_per_minute=1000)
    cluster = await start_cluster(locks=keys.locks)
    message = {"role": "user", "content": PROMPT}
    chat = {"model": MODEL, "messages": [message], "max_tokens": 20}
    broken = [
        {"messages": PROMPT},
        {"messages": [message | {"role": PROMPT}]},
        {"model": PROMPT},
        {"max_tokens": PROMPT},
        {"user": 3, "prompt_of_mine": PROMPT},
        {"response_format": {"type": PROMPT}},
        {"tools": [{"type": "function", "function": {"name": PROMPT}}]},
        {"logit_bias": {PROMPT: 1}},
    ]
    faults = [
        Fault(ValueError(PROMPT)),
        Fault(KeyError(PROMPT)),
        Fault(BadRequest(f"what you sent is wrong: {PROMPT}", "prompt")),
        Fault(ValueError(PROMPT), after_tokens=2),
    ]
    for stream in (False, True):
        for change in ({}, *broken):
            await cluster.http.post(CHAT, json=chat | {"stream": stream} | change, headers=headers)
        for fault in faults:
            cluster.workers.script(ANY_WORKER, "decode", fault)
            await cluster.http.post(CHAT, json=chat | {"stream": stream}, headers=headers)
    await cluster.http.post(CHAT, content=PROMPT, headers=headers)
    await cluster.http.post(CHAT, json=chat, headers={"Authorization": f"Bearer {PROMPT}"})
    await cluster.http.get(f"/v1/models/{PROMPT}", headers=headers)
    assert log.getvalue().count("Traceback") >= 4
    secret = headers["Authorization"].removeprefix("Bearer ")
    assert not any(hidden in log.getvalue() for hidden in (PROMPT, ANSWER[:20], secret, secret[16:]))
