"""Templates in processes of their own: what they do stays there."""

import asyncio
import os
import signal
import sys

import psutil
import pytest

from services.core.errors import BadRequest, Overloaded
from services.gateway.text.chat_renderer import (
    BATCH_MAX,
    FOREIGN_WAITING_MAX,
    LONG_BYTES,
    LocalRenderer,
    ProcessRenderer,
)
from services.gateway.text.template_process import Limits
from services.model.chat_template import Chat, ChatTemplate
from tests.unit.gateway.in_memory_cluster import until

TEMPLATE = ChatTemplate(
    {"default": "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"},
    {"bos_token": "<s>"},
)
HELLO = [{"role": "user", "content": "Hé, 日本 👍"}]
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
HOSTILE = {
    "loops": ENDLESS,
    "doubles": "{{ 'x' * 10**10 }}",
    "collects": "{% for i in range(9999) %}{{ 'x' * 10**7 }}{% endfor %}",
    "recurses": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "nests": "{{ " + "(" * 50_000,
    "leaves": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "halves": "{{ '\\ud83d' }}",
    "raises": "{{ 1 // 0 }}",
}


@pytest.fixture
async def renderer():
    renderer = ProcessRenderer(TEMPLATE, Limits(seconds=0.2))
    yield renderer
    await renderer.close()


@pytest.fixture(params=["local", "process"])
async def any_renderer(request):
    local = request.param == "local"
    renderer = LocalRenderer(TEMPLATE) if local else ProcessRenderer(TEMPLATE, Limits(seconds=2.0))
    await renderer.start()
    yield renderer
    await renderer.close()


async def test_the_text_is_the_template_s(any_renderer) -> None:
    assert await any_renderer.render(Chat(messages=HELLO)) == "<s><user>Hé, 日本 👍"
    chat = Chat(messages=HELLO, template="{{ tools[0].n }}{{ x }}{#tools#}", tools=[{"n": 2**70}])
    assert await any_renderer.render(chat) == str(2**70)
    long = Chat(messages=[{"role": "user", "content": "a" * LONG_BYTES}])
    assert (await any_renderer.render(long)).endswith("a" * LONG_BYTES)


async def test_errors_are_the_client_s_and_name_the_parameter(any_renderer) -> None:
    for chat, param in [
        (Chat(messages=[{"role": "user", "content": "a\ud83d"}], template="{{ 1 // 0 }}"), "chat_template"),
        (Chat(messages=HELLO, documents=[{"text": "x"}]), "documents"),
        (Chat(messages=HELLO, characters_max=3), "messages"),
    ]:
        with pytest.raises(BadRequest) as refused:
            await any_renderer.render(chat)
        assert refused.value.param == param


async def test_a_hostile_template_gets_an_error_and_harms_nobody(renderer) -> None:
    for name, source in HOSTILE.items():
        attack = asyncio.create_task(renderer.render(Chat(messages=HELLO, template=source)))
        for _ in range(3):
            assert await renderer.render(Chat(messages=HELLO)) == "<s><user>Hé, 日本 👍"
        with pytest.raises(BadRequest) as refused:
            await attack
        assert refused.value.param == "chat_template", name
        assert await renderer.render(Chat(messages=HELLO, template="ok")) == "ok", name


async def test_a_template_that_overruns_its_time_is_ended_and_its_process_replaced(renderer) -> None:
    assert await renderer.render(Chat(messages=HELLO, template="ok")) == "ok"
    first = renderer.foreign.pid
    with pytest.raises(BadRequest, match=r"takes more than 0\.2 s"):
        await renderer.render(Chat(messages=HELLO, template=ENDLESS))
    assert await renderer.render(Chat(messages=HELLO, template="ok")) == "ok"
    assert renderer.foreign.pid != first
    assert not psutil.pid_exists(first)


async def test_a_process_that_somebody_kills_is_replaced_unseen(renderer) -> None:
    await renderer.start()
    os.kill(renderer.short.pid, signal.SIGKILL)
    assert await renderer.render(Chat(messages=HELLO)) == "<s><user>Hé, 日本 👍"


async def test_a_client_that_goes_leaves_nothing_to_the_next_one(renderer) -> None:
    await renderer.render(Chat(messages=HELLO, template="ok"))
    leaving = asyncio.create_task(renderer.render(Chat(messages=HELLO, template=ENDLESS)))
    await asyncio.sleep(0.02)
    leaving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await renderer.render(Chat(messages=HELLO, template="mine")) == "mine"


async def test_of_chats_that_go_to_a_process_together_one_that_ends_it_harms_no_other() -> None:
    source = "{% if messages[0].content == 'bad' %}" + ENDLESS + "{% endif %}{{ messages[0].content }}"
    renderer = ProcessRenderer(ChatTemplate({"default": source}, {}), Limits(seconds=0.2))
    try:
        contents = [f"good {n}" for n in range(BATCH_MAX)] + ["bad"] + [f"good {n}" for n in range(20)]
        chats = [Chat(messages=[{"role": "user", "content": content}]) for content in contents]
        texts = await asyncio.gather(*map(renderer.render, chats), return_exceptions=True)
        assert [text for text in texts if isinstance(text, str)] == [c for c in contents if c != "bad"]
        assert isinstance(texts[BATCH_MAX], BadRequest)
        assert texts[BATCH_MAX].param == "messages"
    finally:
        await renderer.close()


async def test_a_process_that_is_killed_under_many_chats_loses_none(renderer) -> None:
    await renderer.start()
    chats = [Chat(messages=[{"role": "user", "content": str(n)}]) for n in range(100)]
    rendering = asyncio.gather(*map(renderer.render, chats))
    await asyncio.sleep(0)
    os.kill(renderer.short.pid, signal.SIGKILL)
    assert await rendering == [f"<s><user>{n}" for n in range(100)]


async def test_a_bounded_number_waits_for_clients_templates(renderer) -> None:
    chat = Chat(messages=HELLO, template="ok")
    waiting = [asyncio.create_task(renderer.render(chat)) for _ in range(FOREIGN_WAITING_MAX)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await renderer.render(chat)
    assert await asyncio.gather(*waiting) == ["ok"] * FOREIGN_WAITING_MAX


async def test_a_chat_nested_without_end_is_refused(renderer) -> None:
    nested: list = []
    for _ in range(100_000):
        nested = [nested]
    with pytest.raises(BadRequest, match="nested"):
        await renderer.render(Chat(messages=HELLO, variables={"x": nested}))


GATEWAY = """
import asyncio
from services.gateway.text.chat_renderer import ProcessRenderer
from services.gateway.text.template_process import Limits
from services.model.chat_template import Chat, ChatTemplate

async def main():
    renderer = ProcessRenderer(ChatTemplate({}, {}), Limits(60.0))
    await renderer.start()
    await renderer.render(Chat(messages=[], template=%r))

asyncio.run(main())
"""


async def test_processes_end_with_the_gateway_even_when_it_is_killed_while_they_work() -> None:
    gateway = await asyncio.create_subprocess_exec(sys.executable, "-c", GATEWAY % ENDLESS)
    await until(lambda: len(psutil.Process(gateway.pid).children()) == 2)
    children = psutil.Process(gateway.pid).children()
    gateway.kill()
    await gateway.wait()
    await until(lambda: not any(child.is_running() for child in children))


async def test_a_template_s_process_knows_no_secrets_of_the_gateway(renderer, monkeypatch) -> None:
    monkeypatch.setenv("DIPTYCH_GATEWAY__REDIS", "redis://:password@host")
    await renderer.start()
    assert "DIPTYCH_GATEWAY__REDIS" not in psutil.Process(renderer.short.pid).environ()
