"""`diptych doctor` finds what is broken, says what to do, and measures the transports."""

import json
import shutil
import socket
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from kernels.cpu.build import COMPILERS, compiler, processor_level
from services.launch import checks
from services.launch.checks import Finding
from services.launch.cli import main
from services.launch.doctor import table
from services.launch.transport_check import check_transports
from services.transfer import nixl_agent

MISSING_REDIS = "redis://127.0.0.1:1"


def test_a_broken_need_is_exit_code_1_and_everything_else_is_still_told(
    default_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["doctor", "--json", "--redis", MISSING_REDIS, "--model", str(default_model), "--port", "0"]
    assert main(arguments) == 1
    found = {one["check"]: one for one in json.loads(capsys.readouterr().out)}
    assert found["redis"]["state"] == "broken"
    assert "127.0.0.1:1 is unavailable" in found["redis"]["detail"]
    assert [name for name, one in found.items() if one["state"] == "broken"] == ["redis"]
    assert found["model"]["detail"].startswith("SmolLM2-135M-Instruct")
    assert found["transport grpc"]["figures"]["megabytes_per_s"] > 50
    assert 0 < found["transport grpc"]["figures"]["latency_ms"] < 1000


def test_nixl_that_is_not_installed_is_a_warning_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl_agent, "_BUILDS", ("nixl_of_another_planet",))
    nixl, grpc = check_transports()
    assert (nixl.state, grpc.state) == ("warning", "ok")
    assert "pip install 'diptych[nixl]'" in nixl.detail


def test_without_a_compiler_the_kernels_are_a_warning_with_the_remedy_and_the_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = checks.check_kernels("cpu")
    assert found.state == "warning"
    assert "auto is none: there is no C++ compiler (no-such-compiler). Install one" in found.detail
    assert "2 to 6 times as long" in found.detail
    gpu = checks.check_kernels("cuda")
    assert (gpu.state, "auto is none" in gpu.detail) == ("ok", True)


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="there is no C++ compiler")
def test_where_there_are_kernels_their_level_and_the_compiler_are_told() -> None:
    found = checks.check_kernels("cpu")
    assert found.state == "ok"
    assert f"auto is int8: C++ kernels for {processor_level()}, {compiler()}" in found.detail


def test_the_embedded_valkey_answers() -> None:
    found = checks.check_redis("")
    assert found.state == "ok"
    assert found.detail.startswith("valkey")


def test_a_taken_port_is_a_warning_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        found = checks.check_ports("127.0.0.1", port)
    assert found.state == "warning"
    assert f"port {port}" in found.detail
    assert checks.check_ports("127.0.0.1", 0).state == "ok"
    assert checks.check_ports("203.0.113.1", 0).state == "broken"


def test_ports_of_an_ipv6_address_are_checked_too() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    assert checks.check_ports("::1", 0).state == "ok"


def test_a_port_that_cannot_be_is_a_wrong_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["doctor", "--port", "65536"])
    assert raised.value.code == 2
    assert "--port" in capsys.readouterr().err


def test_a_model_that_is_not_there_yet_is_a_warning_and_a_wrong_one_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIPTYCH_HOME", str(tmp_path))
    missing = checks.check_model("")
    assert missing.state == "warning"
    assert "diptych model pull" in missing.detail
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    assert checks.check_model(str(tmp_path / "damaged.gguf")).state == "broken"
    assert checks.check_model("~nobody-of-this-name/model").state == "broken"


def test_a_device_that_torch_does_not_have_is_broken() -> None:
    assert checks.check_device("cpu").state == "ok"
    assert checks.check_device("cuda:99").state == "broken"


def test_missing_packages_are_named() -> None:
    found = checks._packages("packages", ["rich", "no-such-package"], "broken", "pip install diptych")
    assert found.state == "broken"
    assert found.detail == "no-such-package missing; pip install diptych"
    requirements = ["rich", "torch==2.13.0; extra == 'worker'", "redis>=6", 'x; extra == "dev"']
    assert checks._names(requirements, extra="") == ["rich", "redis"]
    assert checks._names(requirements, extra="worker") == ["torch"]


def test_the_table_shows_remedies_as_they_are() -> None:
    console = Console(file=StringIO(), width=120)
    console.print(table([Finding(check="a", state="warning", detail="pip install 'diptych[worker]' [/x]")]))
    assert isinstance(console.file, StringIO)
    assert "pip install 'diptych[worker]' [/x]" in console.file.getvalue()


def test_the_table_fits_a_narrow_terminal() -> None:
    console = Console(file=StringIO(), width=80)
    console.print(table([Finding(check="ports", state="warning", detail="word " * 30)]))
    assert isinstance(console.file, StringIO)
    lines = console.file.getvalue().splitlines()
    assert lines[1].split()[:2] == ["ports", "warning"]
    assert max(map(len, lines)) <= 80
