"""Each answer of a chaos run against the undisturbed one to the same request, choice by choice."""

import asyncio
from collections.abc import Sequence

import httpx

from tests.chaos.client import follow
from tests.chaos.reply import Choice, Reply
from tests.chaos.report import Findings
from tests.chaos.workload import Ask

ASKED_AT_ONCE = 4
UNSEEDED_CHECKED_MAX = 40


async def ask_all(http: httpx.AsyncClient, asks: Sequence[Ask]) -> list[Reply]:
    """In the order of `asks`, a few at once."""
    turns = asyncio.Semaphore(ASKED_AT_ONCE)

    async def ask_one(ask: Ask) -> Reply:
        async with turns:
            return await follow(http, ask)

    return list(await asyncio.gather(*map(ask_one, asks)))


async def compare_all(findings: Findings, undisturbed: dict[int, Reply], http: httpx.AsyncClient) -> None:
    """The completed answers, by the number of their request; those to drawn seeds that were resumed are
    asked again."""
    completed = [reply for reply in findings.replies if reply.end == "completed"]
    for reply in completed:
        if reply.ask.kind != "unseeded":
            compare(findings, reply, undisturbed[reply.ask.number])
    resumed = [reply for reply in completed if reply.ask.kind == "unseeded" and reply.resumed]
    checked = resumed[:UNSEEDED_CHECKED_MAX]
    again = await ask_all(http, [r.ask.with_seed(r.timings["seed"]) for r in checked])
    findings.unseeded_checked = len(checked)
    for reply, right in zip(checked, again, strict=True):
        if right.end == "completed":
            compare(findings, reply, right)
        else:
            findings.different.append(f"request {reply.ask.number}, asked again: {right.problem}")


def compare(findings: Findings, reply: Reply, right: Reply) -> None:
    """One answer: `findings` notes it if it differs."""
    found = [text for text in (prompt_difference(reply, right),) if text]
    for index, (choice, other) in enumerate(zip(reply.choices, right.choices, strict=True)):
        if text := difference(choice, other):
            found.append(f"choice {index}: {text}")
    if found:
        attempts = reply.timings.get("attempts")
        findings.different.append(f"request {reply.ask.number} ({attempts} attempts): {'; '.join(found)}")


def difference(choice: Choice, right: Choice) -> str:
    if choice.token_ids != right.token_ids:
        return f"its tokens are {choice.token_ids}, undisturbed {right.token_ids}"
    if (choice.text, choice.finish) != (right.text, right.finish):
        return f"its text is {choice.text!r} ({choice.finish}), undisturbed {right.text!r} ({right.finish})"
    if choice.logprobs != right.logprobs:
        return f"its logprobs are {choice.logprobs}, undisturbed {right.logprobs}"
    return ""


def prompt_difference(reply: Reply, right: Reply) -> str:
    """What is counted of a prompt does not depend on faults, nor on the number of choices. The count of
    the answers' tokens is compared with the tokens themselves: Reply.usage_mistake."""
    counted, expected = (one.usage["prompt_tokens"] for one in (reply, right))
    return f"its prompt_tokens are {counted}, undisturbed {expected}" if counted != expected else ""
