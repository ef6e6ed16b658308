"""`diptych explain`: where a prompt would go now, and why. Nothing is computed for it."""

import argparse
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from services.launch.api_key import add_api_key_flag
from services.launch.chat import DEFAULT_URL, api_url, piped, trust
from services.launch.https import add_ca_flag
from services.launch.openai_client import OpenAiClient
from services.launch.up import positive

TERMS = {  # of an offer, and their headings
    "queue": "queue",
    "fetch": "fetch",
    "prefill": "prefill",
    "transfer": "move",
    "decode": "decode",
    "interference": "delay",
}
LEGEND = """\
*: chosen; times in ms, cost: their sum; move: KV to the decode worker;
delay: of decoding, by prefills; cached, fetched: tokens of the prompt"""


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "explain", help="show where a prompt would go now, and why", description=__doc__
    )
    parser.add_argument("prompt", nargs="?", help="default: standard input")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message, as of `diptych chat`")
    parser.add_argument("--system", metavar="TEXT", help="a system message before it (with --chat)")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="the answer's length at most")
    parser.add_argument("--cache-salt", metavar="SALT", help="as in requests: whose cached prompts count")
    add_api_key_flag(parser)
    parser.add_argument("--url", help=f"the API (default: the cluster of `diptych up`, or {DEFAULT_URL})")
    parser.add_argument("--json", action="store_true", help="print the gateway's answer as it is")
    add_ca_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    prompt = arguments.prompt if arguments.prompt is not None else piped("explain")
    with OpenAiClient(api_url(arguments.url), api_key=arguments.api_key, verify=trust(arguments)) as client:
        answer = client.route(request(arguments, prompt, client.served_model()))
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return 0
    print(summary(answer))
    Console().print(table(answer["route"]))
    print(LEGEND)
    return 0


def request(arguments: argparse.Namespace, prompt: str, model: str) -> dict[str, Any]:
    """The body of the request that is asked about."""
    body: dict[str, Any] = {"model": model}
    if arguments.chat or arguments.system:
        system = [{"role": "system", "content": arguments.system}] if arguments.system else []
        body["messages"] = [*system, {"role": "user", "content": prompt}]
    else:
        body["prompt"] = prompt
    for name in ("max_tokens", "cache_salt"):
        if getattr(arguments, name) is not None:
            body[name] = getattr(arguments, name)
    return body


def summary(answer: dict[str, Any]) -> str:
    """What was decided, in words."""
    route, wait_ms = answer["route"], answer["expected_wait"]
    lines = [
        f"{answer['prompt_tokens']} prompt tokens, policy {route['policy']}: {_places(route)}",
        f"first token expected in {wait_ms + route['expected_first_token']:.0f} ms, of it "
        f"{wait_ms:.0f} ms wait in the gateway, {route['expected_queue']:.0f} ms at the worker",
    ]
    for offer in route["offers"]:
        if offer["chosen"] and offer["fetched_from"]:
            lines.append(
                f"{offer['worker']} fetches {offer['fetched_tokens']} tokens from {offer['fetched_from']}"
            )
    lines += [
        f"{worker['worker']} will have {worker['coming_tokens']} tokens cached, which it computes now"
        for worker in answer["cached"]
        if worker["coming_tokens"] > worker["cached_tokens"]
    ]
    lines += [f"{worker} is in no pair: {why}" for worker, why in answer["unpaired"].items()]
    return "\n".join(lines)


def table(route: dict[str, Any]) -> Table:
    """A row per offer; terms that are zero for all are left out, to fit 80 columns."""
    offers = route["offers"]
    terms = [term for term in TERMS if any(offer[term] for offer in offers)]
    counts = [name for name in ("cached", "fetched") if any(offer[f"{name}_tokens"] for offer in offers)]
    scored = [] if route["policy"] == "cost" else ["score"]
    result = Table(box=None, padding=(0, 1, 0, 0))
    for heading in ("  worker", "part"):
        result.add_column(heading, no_wrap=True)
    for heading in (*scored, "cost", *(TERMS[term] for term in terms), *counts):
        result.add_column(heading, justify="right", no_wrap=True)
    for offer in offers:
        worker = ("* " if offer["chosen"] else "  ") + escape(offer["worker"])
        times = [_short(offer[name]) for name in (*scored, "cost", *terms)]
        tokens = [str(offer[f"{name}_tokens"]) for name in counts]
        result.add_row(worker, offer["part"], *times, *tokens)
    return result


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.1f}" if milliseconds < 100 else f"{milliseconds:.0f}"


def _places(route: dict[str, Any]) -> str:
    prefill, decode = route["prefill_worker"], route["decode_worker"]
    if prefill is None:
        return f"{decode} alone"
    return f"{prefill} alone, for one token" if decode is None else f"{prefill}, then {decode}"
