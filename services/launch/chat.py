"""`diptych chat`: ask a question, or hold a conversation, in the terminal."""

import argparse
import contextlib
import ssl
import sys
from pathlib import Path
from typing import Any

from services.core.errors import BadRequest, DiptychError
from services.launch.api_key import add_api_key_flag
from services.launch.cluster_state import read_state
from services.launch.https import add_ca_flag, trusting, trusting_only
from services.launch.openai_client import Message, OpenAiClient, text_of
from services.launch.up import positive

DEFAULT_URL = "http://127.0.0.1:8000/v1"


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("chat", help="talk to a cluster", description=__doc__)
    parser.add_argument(
        "question", nargs="?", help="default: standard input, or a conversation on a terminal"
    )
    parser.add_argument("--url", help=f"the API (default: the cluster of `diptych up`, or {DEFAULT_URL})")
    parser.add_argument("--model", help="default: the model that is served")
    parser.add_argument("--max-tokens", type=positive, metavar="N", help="end of each answer at the latest")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="0: the likeliest answer, 1: a drawn one (default: 0)",
    )
    parser.add_argument("--system", metavar="TEXT", help="a system message before the conversation")
    add_api_key_flag(parser)
    add_ca_flag(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    with OpenAiClient(api_url(arguments.url), api_key=arguments.api_key, verify=trust(arguments)) as client:
        model = arguments.model or client.served_model()
        parameters: dict[str, Any] = {"model": model, "temperature": arguments.temperature}
        if arguments.max_tokens:
            parameters["max_tokens"] = arguments.max_tokens
        conversation = Conversation(client, parameters, arguments.system)
        if arguments.question is None and sys.stdin.isatty():
            conversation.hold()
        else:
            conversation.ask(arguments.question if arguments.question is not None else piped("chat"))
    return 0


class Conversation:
    """The messages so far. Each answer is printed as it streams and becomes part of them."""

    def __init__(self, client: OpenAiClient, parameters: dict[str, Any], system: str | None) -> None:
        self._client = client
        self._parameters = parameters
        self._messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def ask(self, question: str) -> None:
        """Print the answer. A turn that fails or is interrupted leaves the conversation as it was."""
        messages = [*self._messages, {"role": "user", "content": question}]
        answer = ""
        try:
            for chunk in self._client.stream_chat(messages, **self._parameters):
                answer += text_of(chunk)
                print(text_of(chunk), end="", flush=True)
        finally:
            if answer:
                print()
        self._messages = [*messages, {"role": "assistant", "content": answer}]

    def hold(self) -> None:
        """Questions from the terminal until Ctrl-D; Ctrl-C ends only the answer that is streaming."""
        _enable_line_editing()
        print("Ctrl-C stops an answer, Ctrl-D ends the conversation.", file=sys.stderr)
        while True:
            try:
                question = input("> ").strip()
            except EOFError:
                print()
                return
            try:
                if question:
                    self.ask(question)
            except KeyboardInterrupt:
                continue
            except DiptychError as error:
                print(f"diptych: {error.message}", file=sys.stderr)


def api_url(given: str | None) -> str:
    """`given`, or that of the cluster of `diptych up` on this machine, or where one would be."""
    state = read_state()
    return given or (f"{state.gateway_url}/v1" if state else DEFAULT_URL)


def trust(arguments: argparse.Namespace) -> ssl.SSLContext | bool:
    """What `--ca` says, or of the gateway of `diptych up` its own certificate."""
    state = read_state()
    if arguments.url is None and arguments.ca is None and state is not None and state.gateway_cert:
        return trusting_only(Path(state.gateway_cert))
    return trusting(arguments.ca)


def piped(command: str) -> str:
    """The question on standard input. Raises BadRequest if there is none."""
    question = sys.stdin.read().strip()
    if not question:
        raise BadRequest(f'there is no question; pass one: diptych {command} "..."')
    return question


def _enable_line_editing() -> None:
    """`input` gets history and cursor keys by the mere import, where Python was built with it."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
