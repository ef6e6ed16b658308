"""Events as clients read them."""

import json

from services.gateway.api.sse import EventStream


async def test_an_event_is_one_line_for_every_client_whatever_its_text_holds() -> None:
    sent: list[bytes] = []

    async def send(message: dict) -> None:
        sent.append(message.get("body", b""))

    text = "a\x85b\u2028c\u2029d\x1ce\nf é 漢"
    await EventStream(send).event(json.dumps({"text": text}, ensure_ascii=False))
    lines = b"".join(sent).decode().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": text}
