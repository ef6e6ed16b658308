"""The command line: what is accepted, and errors as one line with the right exit code."""

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.launch.cli import build_parser, main
from services.launch.cluster import ClusterPlan, claim_port, diptych
from services.launch.lock import lock_from_state, lock_of_its_own, lock_to_state
from services.launch.up import describe_threads
from services.wire.cluster_lock import ClusterLock


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


def plan(**changes: int | str) -> ClusterPlan:
    values: dict[str, object] = {
        "prefill": 1,
        "decode": 1,
        "host": "127.0.0.1",
        "port": 8000,
        "dtype": "float32",
    }
    return ClusterPlan(**{**values, **changes}, model=Path("m"), logs=None)  # type: ignore[arg-type]


def test_up_has_one_worker_of_each_role_by_default() -> None:
    arguments = build_parser().parse_args(["up"])
    assert (arguments.prefill, arguments.decode, arguments.host, arguments.port) == (1, 1, "127.0.0.1", 8000)


@pytest.mark.parametrize(
    "flags",
    [
        ["--decode", "0"],
        ["--prefill", "-1"],
        ["--port", "70000"],
        ["--threads", "x"],
        ["--dtype", "int1"],
        ["--quantization", "int3"],
    ],
)
def test_up_refuses_impossible_numbers(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["up", *flags])
    assert caught.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_up_without_prefill_workers_is_possible() -> None:
    assert build_parser().parse_args(["up", "--prefill", "0"]).prefill == 0


def test_the_choice_of_threads_is_told() -> None:
    assert describe_threads(plan(), cores=2) == (
        "threads: 1 per worker (2 cores / 2 workers); with 8-bit weights up to 2 while others are idle"
    )
    assert describe_threads(plan(), cores=1) == "threads: 1 per worker (1 cores / 2 workers)"
    assert describe_threads(plan(threads=3), cores=2) == "threads: 3 per worker (--threads)"


def test_a_port_in_use_is_found_before_anything_starts(
    taken_port: int, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["up", "--port", str(taken_port)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"diptych: cannot listen on 127.0.0.1 port {taken_port}")
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("number", ["99999", "-1"])
@pytest.mark.parametrize(
    ("command", "flag"), [("gateway", "--port"), ("worker", "--port"), ("worker", "--metrics-port")]
)
def test_a_port_that_cannot_exist_is_refused_in_one_line(
    command: str, flag: str, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, flag, number]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"{flag} must be from 0 to 65535, not {number}")


def test_port_0_becomes_a_free_port() -> None:
    port = claim_port("127.0.0.1", 0)
    assert port > 0
    assert claim_port("127.0.0.1", port) == port


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
    ],
)
def test_the_gateway_is_reached_over_loopback_when_it_listens_everywhere(host: str, url: str) -> None:
    assert plan(host=host).gateway_url == url


def test_a_missing_model_is_one_line_and_exit_code_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["up", "--port", "0", "--model", "/no/such/model"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("diptych: /no/such/model does not exist")
    assert main(["up", "--port", "0", "--model", "~nobody-of-this-name/model"]) == 1
    assert "~nobody-of-this-name/model does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("service", ["gateway", "worker"])
def test_a_wrong_setting_is_one_line_and_exit_code_2(
    service: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main([service, "--port", "http"]) == 2
    assert capsys.readouterr().err == "diptych: command line: --port must be int, not 'http'\n"
    monkeypatch.setenv(f"DIPTYCH_{service.upper()}__PROT", "1")
    assert main([service]) == 2
    assert f"DIPTYCH_{service.upper()}__PORT" in capsys.readouterr().err


def test_model_path_prints_where_the_model_belongs(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", "path"]) == 0
    assert capsys.readouterr().out == f"{home}/models/SmolLM2-135M-Instruct.Q4_1.gguf\n"


def test_model_pull_prints_the_path_of_a_proven_file(
    default_model: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "models").mkdir()
    os.link(default_model, home / "models" / default_model.name)
    assert main(["model", "pull"]) == 0
    assert capsys.readouterr().out == f"{home}/models/{default_model.name}\n"


def test_chat_and_status_say_how_to_start_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "hello", "--url", "http://127.0.0.1:1/v1"]) == 1
    assert "diptych up" in capsys.readouterr().err
    assert main(["status"]) == 1
    assert "diptych up" in capsys.readouterr().err


def test_child_commands_are_what_a_person_would_type() -> None:
    command = diptych("worker", "--role", "prefill")
    assert command[-3:] == ("worker", "--role", "prefill")
    assert command[-4].endswith(("/diptych", "services.launch.cli"))


def test_a_worker_that_strangers_could_reach_names_the_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker", "--host", "0.0.0.0", "--redis", "redis://127.0.0.1:1"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "diptych certs create" in error
    assert "DIPTYCH_CLUSTER__TOKEN" in error


def test_a_cluster_of_its_own_has_at_least_a_token() -> None:
    own = lock_of_its_own(ClusterLock())
    assert len(own.token) == 64
    assert own.token != lock_of_its_own(ClusterLock()).token
    assert lock_from_state(lock_to_state(own)) == own
    given = ClusterLock(cert=Path("/c"), key=Path("/k"), ca=Path("/a"))
    assert lock_of_its_own(given) == given
    assert lock_from_state(lock_to_state(given)) == given
