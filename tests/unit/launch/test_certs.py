"""`diptych certs` makes certificates that the cluster takes, and keeps their keys to their owner."""

import ssl
from pathlib import Path

import pytest

from services.launch.authority import create_authority
from services.launch.cli import main
from services.wire.cluster_lock import lock_network
from tests.support.certificates import lock_of

FILES = {"cert": "tls.crt", "key": "tls.key", "ca": "ca.crt"}


def test_every_node_gets_files_that_a_cluster_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["certs", "create", str(tmp_path / "c"), "gateway", "worker"]) == 0
    folders = [Path(line) for line in capsys.readouterr().out.split()]
    assert [folder.name for folder in folders] == ["gateway", "worker"]
    for folder in folders:
        lock_network(lock_of(folder))
    assert {folder.joinpath("ca.crt").read_bytes() for folder in folders} == {
        (tmp_path / "c/ca.crt").read_bytes()
    }


def test_nobody_else_can_read_them(tmp_path: Path) -> None:
    main(["certs", "create", str(tmp_path / "c")])
    files = [path for path in (tmp_path / "c").rglob("*") if path.is_file()]
    assert len(files) == 5
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}


def test_a_second_node_gets_its_certificate_of_the_same_authority(tmp_path: Path) -> None:
    main(["certs", "create", str(tmp_path), "one"])
    before = (tmp_path / "ca.crt").read_bytes()
    main(["certs", "create", str(tmp_path), "two"])
    assert (tmp_path / "ca.crt").read_bytes() == before
    lock_network(lock_of(tmp_path / "two"))


def test_a_renewed_certificate_is_another_one_for_the_same_hosts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "certs",
            "create",
            str(tmp_path),
            "one",
            "--host",
            "api.example",
            "--host",
            "10.0.0.1",
            "--days",
            "1",
        ]
    )
    before = (tmp_path / "one/tls.crt").read_bytes()
    assert main(["certs", "renew", str(tmp_path), "--days", "30"]) == 0
    assert (tmp_path / "one/tls.crt").read_bytes() != before
    lock_network(lock_of(tmp_path / "one"))
    capsys.readouterr()
    main(["certs", "show", str(tmp_path)])
    assert "one/tls.crt: expires in 29 days" in (shown := capsys.readouterr().out)
    assert "api.example, 10.0.0.1" in shown


def test_what_is_there_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["certs", "create", str(tmp_path), "one"])
    before = (tmp_path / "one/tls.crt").read_bytes()
    assert main(["certs", "create", str(tmp_path), "two", "one"]) == 2
    assert "certs renew" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()
    assert (tmp_path / "one/tls.crt").read_bytes() == before


@pytest.mark.parametrize("arguments", [["renew"], ["show"]])
def test_an_empty_folder_has_nothing_to_renew_or_show(tmp_path: Path, arguments: list[str]) -> None:
    assert main(["certs", *arguments, str(tmp_path)]) == 2


@pytest.mark.parametrize("name", ["../x", ".", "", "a/b"])
def test_a_name_is_one_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(SystemExit):
        main(["certs", "create", str(tmp_path / "c"), name])
    assert not (tmp_path / "c").exists()


def test_clients_outside_can_check_the_hosts(tmp_path: Path) -> None:
    main(["certs", "create", str(tmp_path), "gateway", "--host", "localhost"])
    ssl.create_default_context(cafile=tmp_path / "gateway/ca.crt")
    ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
        tmp_path / "gateway/tls.crt", tmp_path / "gateway/tls.key"
    )


def test_a_worker_whose_certificate_has_expired_says_so_and_does_not_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = create_authority(tmp_path).issue("old", [], -0.01)
    files = [f"--cluster-{flag}={folder / name}" for flag, name in FILES.items()]
    assert main(["worker", "--host", "0.0.0.0", "--redis", "redis://127.0.0.1:1", *files]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "old/tls.crt has expired on" in error
