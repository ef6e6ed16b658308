"""What a client received, and how it differs from what it should have."""

import json
from typing import Any

from tests.sim.gateway import HttpCall
from tests.sim.workload import Expected, Request, answer


class Received:
    """What a client received with status 200."""

    def __init__(self, call: HttpCall, *, streams: bool) -> None:
        self.error = ""
        self.timings: dict[str, Any] = {}
        self._choices: dict[int, Expected] = {}
        self._usage: dict[str, Any] = {}
        self._done = not streams
        for chunk in _events(call.received) if streams else [json.loads(call.received)]:
            self._take(chunk)

    def _take(self, chunk: Any) -> None:
        if chunk == "[DONE]":
            self._done = True
            return
        if "error" in chunk:
            self.error = chunk["error"]["code"] or chunk["error"]["type"]
            return
        self._usage = chunk.get("usage") or self._usage
        self.timings = chunk.get("timings") or self.timings
        for part in chunk["choices"]:
            choice = self._choices.setdefault(part["index"], Expected([], "", ""))
            assert not choice.finish, "text after the end of a choice"
            choice.text += part["text"]
            choice.token_ids += part.get("token_ids") or []
            choice.logprobs += (part["logprobs"] or {}).get("token_logprobs", [])
            choice.finish = part["finish_reason"] or ""

    def differences(self, request: Request) -> list[str]:
        seed = request.body.get("seed", self.timings.get("seed"))
        expected = {n: answer(request.body, seed, n) for n in range(request.body.get("n", 1))}
        found = []
        for number, right in expected.items():
            if self._choices.get(number) != right:
                found.append(f"choice {number} is {self._choices.get(number)} instead of {right}")
        tokens = sum(len(choice.token_ids) for choice in expected.values())
        if self._usage.get("completion_tokens") != tokens:
            found.append(f"usage {self._usage} for {tokens} tokens")
        if self._usage.get("prompt_tokens") != len(request.prompt):
            found.append(f"usage {self._usage} for a prompt of {len(request.prompt)} tokens")
        if self._usage.get("prompt_tokens_details", {}).get("cached_tokens", 0) > len(request.prompt):
            found.append(f"more cached tokens than the prompt has: {self._usage}")
        if not self._done:
            found.append("a stream without [DONE]")
        return found


def _events(stream: bytes) -> list[Any]:
    events = [event.removeprefix("data: ") for event in stream.decode().split("\n\n") if event]
    return [event if event == "[DONE]" else json.loads(event) for event in events]
