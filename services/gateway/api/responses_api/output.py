"""The output items of one answer, and what a stream shows of them, from the answer's deltas.

    message    item added, part added, text delta ..., text done, part done, item done
    call       item added, arguments delta ..., arguments done, item done

An item ends when another one begins, or the answer ends.
"""

from collections.abc import Iterator
from typing import Any

from services.gateway.api.responses_api.response import (
    ItemStatus,
    OutputFunctionCall,
    OutputItem,
    OutputMessage,
    OutputText,
)
from services.gateway.text.answer import TextDelta
from services.gateway.text.tool_calls.call_delta import CallDelta

Event = dict[str, Any]  # without its sequence number


class Output:
    def __init__(self, request_id: str) -> None:
        self.items: list[OutputItem] = []  # those that are done
        self._request_id = request_id
        self._open: OutputItem | None = None
        self._pieces: list[str] = []  # of the text or the arguments of the open one

    def feed(self, delta: TextDelta) -> Iterator[Event]:
        if delta.text:
            yield from self._add_text(delta.text)
        for call in delta.calls:
            yield from self._add_call(call)
        if delta.finish is not None:
            yield from self._end("incomplete" if delta.finish == "length" else "completed")

    def _add_text(self, text: str) -> Iterator[Event]:
        if not isinstance(self._open, OutputMessage):
            yield from self._close("completed")
            yield from self._open_message()
        self._pieces.append(text)
        yield {**self._part_event("output_text.delta"), "delta": text, "logprobs": []}

    def _add_call(self, call: CallDelta) -> Iterator[Event]:
        if call.id is not None:
            yield from self._close("completed")
            yield from self._open_call(call.id, call.name or "")
        if call.arguments:
            self._pieces.append(call.arguments)
            yield {**self._item_event("function_call_arguments.delta", named=True), "delta": call.arguments}

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        """An answer without anything in it is an empty message."""
        if self._open is None and not self.items:
            yield from self._open_message()
        yield from self._close(status)

    def _open_message(self) -> Iterator[Event]:
        self._open = OutputMessage(id=self._new_id("msg"), status="in_progress", content=[])
        yield {**self._item_event("output_item.added"), "item": self._open.model_dump()}
        yield {**self._part_event("content_part.added"), "part": OutputText(text="").model_dump()}

    def _open_call(self, call_id: str, name: str) -> Iterator[Event]:
        self._open = OutputFunctionCall(
            id=self._new_id("fc"), status="in_progress", call_id=call_id, name=name, arguments=""
        )
        yield {**self._item_event("output_item.added"), "item": self._open.model_dump()}

    def _close(self, status: ItemStatus) -> Iterator[Event]:
        item, text = self._open, "".join(self._pieces)
        if isinstance(item, OutputMessage):
            part = OutputText(text=text)
            item.content = [part]
            yield {**self._part_event("output_text.done"), "text": text, "logprobs": []}
            yield {**self._part_event("content_part.done"), "part": part.model_dump()}
        elif isinstance(item, OutputFunctionCall):
            item.arguments = text
            done = self._item_event("function_call_arguments.done", named=True)
            yield {**done, "name": item.name, "arguments": text}
        if item is not None:
            item.status = status
            yield {**self._item_event("output_item.done"), "item": item.model_dump()}
            self.items.append(item)
        self._open, self._pieces = None, []

    def _new_id(self, kind: str) -> str:
        return f"{kind}_{self._request_id}_{len(self.items)}"

    def _item_event(self, name: str, *, named: bool = False) -> Event:
        event: Event = {"type": f"response.{name}", "output_index": len(self.items)}
        if named:
            assert self._open is not None
            event["item_id"] = self._open.id
        return event

    def _part_event(self, name: str) -> Event:
        return {**self._item_event(name, named=True), "content_index": 0}
