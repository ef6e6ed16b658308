"""What has come of one request of a chaos run, choice by choice, and what is wrong with it by itself."""

import itertools
import time
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.chaos.workload import Ask


@dataclass(slots=True)
class Choice:
    """One of the answers to a request."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    logprobs: list[Any] = field(default_factory=list)  # of its tokens and the likeliest ones
    arrivals_s: list[float] = field(default_factory=list)  # of a stream's tokens

    @property
    def longest_pause(self) -> tuple[float, float]:
        """Its length in seconds, and the moment it began."""
        gaps = ((later - earlier, earlier) for earlier, later in itertools.pairwise(self.arrivals_s))
        return max(gaps, default=(0.0, 0.0))

    def take(self, told: dict[str, Any]) -> None:
        """What a whole answer, or a chunk of a stream, says of this choice."""
        if self.finish:
            raise ValueError(f"choice {told['index']} went on after its end")
        message = told.get("delta") or told.get("message") or {"content": told.get("text")}
        self.text += message.get("content") or ""
        self.token_ids += told.get("token_ids") or []
        self.logprobs += _logprobs(told.get("logprobs") or {})
        self.finish = told["finish_reason"] or self.finish

    def take_chunk(self, told: dict[str, Any]) -> None:
        self.take(told)
        if told.get("token_ids"):
            self.arrivals_s.append(time.monotonic())

    def mistake(self, asked: dict[str, Any]) -> str:
        """What is wrong with an answer that says it is whole; empty if nothing is."""
        least, limit, tokens = asked.get("min_tokens", 1), asked["max_tokens"], len(self.token_ids)
        if self.finish not in ("stop", "length"):
            return f"finish_reason is {self.finish!r}"
        if not least <= tokens <= limit:
            return f"{tokens} tokens came, {least} to {limit} were asked for"
        if self.finish == "length" and tokens != limit:
            return f"it ended for its length after {tokens} of {limit} tokens"
        if self.finish == "stop" and asked.get("ignore_eos"):
            return "it ended by itself although it was not to"
        return ""


def _logprobs(told: dict[str, Any]) -> list[Any]:
    """As a chat tells them, or a completion."""
    if "content" in told:
        return told["content"]
    return list(zip(told.get("token_logprobs", []), told.get("top_logprobs", []), strict=True))


@dataclass(slots=True)
class Reply:
    """The answers to one request. `choices` are as many as were asked for, also before they begin."""

    ask: Ask
    sent_s: float
    choices: list[Choice]
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)
    end: Literal["completed", "hung_up", "failed"] = "failed"
    problem: str = ""  # why it failed

    @property
    def resumed(self) -> bool:
        return bool(self.timings) and self.timings["attempts"] > 1

    @property
    def tokens(self) -> int:
        """Of all choices together."""
        return sum(len(choice.token_ids) for choice in self.choices)

    @property
    def chunks(self) -> int:
        return sum(len(choice.arrivals_s) for choice in self.choices)

    @property
    def first_token_s(self) -> float | None:
        arrivals = [choice.arrivals_s[0] for choice in self.choices if choice.arrivals_s]
        return min(arrivals) - self.sent_s if arrivals else None

    @property
    def longest_pause(self) -> tuple[float, float]:
        """Of any one choice: its length in seconds, and the moment it began."""
        return max(choice.longest_pause for choice in self.choices)

    @property
    def usage_mistake(self) -> str:
        """Empty when usage counts each choice's tokens once."""
        if self.end != "completed":
            return ""
        prompt, completion, total = (
            self.usage.get(f"{what}_tokens") for what in ("prompt", "completion", "total")
        )
        if completion != self.tokens:
            return f"{completion} completion tokens counted, {self.tokens} received"
        if total != prompt + completion or self.usage["prompt_tokens_details"]["cached_tokens"] > prompt:
            return f"usage contradicts itself: {self.usage}"
        return ""

    def mistakes(self) -> str:
        """What is wrong with answers that say they are whole; empty if nothing is."""
        found = (choice.mistake(self.ask.body) for choice in self.choices)
        return "; ".join(f"choice {index}: {mistake}" for index, mistake in enumerate(found) if mistake)
