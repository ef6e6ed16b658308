"""The lines with curl in README.md and docs/openai.md, run as they stand there."""

import json
import re
import shutil
import subprocess

import pytest

from tests.support.cluster import ROOT, RunningCluster

DOCUMENTED = "http://127.0.0.1:8000"
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(
    r"^curl .*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL
)  # up to the next line that is not indented


def documented_commands() -> list[str]:
    texts = [(ROOT / name).read_text() for name in ("README.md", "docs/openai.md")]
    return [command for text in texts for block in FENCED.findall(text) for command in COMMAND.findall(block)]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
@pytest.mark.parametrize("command", documented_commands())
def test_a_documented_command_gets_an_answer(split: RunningCluster, command: str) -> None:
    assert DOCUMENTED in command
    quiet = command.replace(DOCUMENTED, split.url).replace(
        "curl ", "curl -sS --noproxy '*' --max-time 60 ", 1
    )
    ran = subprocess.run(["sh", "-c", quiet], capture_output=True, text=True, timeout=90, check=False)
    assert ran.returncode == 0, ran.stderr
    if " -N " in command:
        events = [
            line.removeprefix("data: ") for line in ran.stdout.splitlines() if line.startswith("data: ")
        ]
        assert len(events) > 2, ran.stdout
        assert not [event for event in events if "error" in event]
    elif "metrics" not in command:
        assert "error" not in json.loads(ran.stdout), ran.stdout


def test_there_are_such_commands_for_a_whole_answer_and_for_a_stream() -> None:
    assert {" -N " in command for command in documented_commands()} == {True, False}
