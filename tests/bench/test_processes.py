"""Each process of a server is known by its command line, and shares are of the server's time alone."""

import pytest

from tests.bench.processes import part_of, shares

PREFILL = ["python", "bin/diptych", "worker", "--role", "prefill", "--worker-id", "prefill-0"]


@pytest.mark.parametrize(
    ("command", "parent", "part"),
    [
        (["python", "-m", "services.engine.process", "13", "14"], PREFILL, "prefill engine"),
        (PREFILL, ["python", "-m", "services.launch.cli", "up"], "prefill"),
        (["python", "bin/diptych", "gateway", "--port", "1"], [], "gateway"),
        (["/packages/valkey-server 127.0.0.1:41743", ""], [], "valkey"),
        (["python", "-m", "services.launch.cli", "up", "--prefill", "1"], [], None),
        (["python", "-m", "services.gateway.text.template_process"], [], None),
    ],
)
def test_a_process_is_known_by_its_command_line(
    command: list[str], parent: list[str], part: str | None
) -> None:
    assert part_of(command, parent) == part


def test_shares_are_of_the_server_without_its_client() -> None:
    each = shares({"decode engine": 6.0, "decode": 1.0, "gateway": 1.0, "client": 4.0}, tokens=1000)
    assert each["decode engine"] == 6000.0
    assert each["client"] == 4000.0
    assert each["engines' share"] == 0.75
