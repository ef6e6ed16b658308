"""Certificates that cannot work are found when they are read, not when somebody calls."""

from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from services.core.errors import ConfigError
from services.launch.authority import create_authority
from services.wire.certificates import CLUSTER_NAME, CertificateFiles, load_certificates


def files(folder: Path) -> CertificateFiles:
    return CertificateFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")


@pytest.fixture
def good(tmp_path: Path) -> CertificateFiles:
    return files(create_authority(tmp_path / "ca").issue("node", ["10.0.0.1", "worker.example"], 1))


def expired(good: CertificateFiles, elsewhere: Path) -> None:
    create_authority(elsewhere).issue("node", [], -0.01)
    good.cert.write_bytes((elsewhere / "node/tls.crt").read_bytes())
    good.key.write_bytes((elsewhere / "node/tls.key").read_bytes())


def anothers_key(good: CertificateFiles, elsewhere: Path) -> None:
    folder = create_authority(elsewhere).issue("node", [], 1)
    good.key.write_bytes((folder / "tls.key").read_bytes())


def another_authority(good: CertificateFiles, elsewhere: Path) -> None:
    good.ca.write_bytes(create_authority(elsewhere).folder.joinpath("ca.crt").read_bytes())


def no_pem(good: CertificateFiles, elsewhere: Path) -> None:
    good.cert.write_bytes(b"\x00" * 100)


def no_key(good: CertificateFiles, elsewhere: Path) -> None:
    good.key.write_bytes(good.cert.read_bytes())


def missing(good: CertificateFiles, elsewhere: Path) -> None:
    good.ca.unlink()


def another_name(good: CertificateFiles, elsewhere: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("worker.example")
    issued.cert_chain_pems[0].write_to_path(good.cert)
    issued.private_key_pem.write_to_path(good.key)
    authority.cert_pem.write_to_path(good.ca)


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (expired, r"tls.crt has expired on"),
        (anothers_key, r"tls.key is not that of the certificate"),
        (another_authority, r"tls.crt is not signed by the authority in .*ca.crt"),
        (no_pem, r"tls.crt has no certificate in PEM form"),
        (no_key, r"tls.key has no private key in PEM form"),
        (missing, r"cannot read .*ca.crt: No such file"),
        (another_name, rf"must have DNS:{CLUSTER_NAME}"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(
    good: CertificateFiles,
    spoil: Callable[[CertificateFiles, Path], None],
    complaint: str,
    tmp_path: Path,
) -> None:
    assert load_certificates(good).cert == good.cert.read_bytes()
    spoil(good, tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=complaint):
        load_certificates(good)


def test_a_certificate_over_intermediate_authorities_is_good(good: CertificateFiles) -> None:
    root = trustme.CA()
    issued = root.create_child_ca().create_child_ca().issue_cert(CLUSTER_NAME)
    good.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(good.key)
    root.cert_pem.write_to_path(good.ca)
    assert load_certificates(good).ca == good.ca.read_bytes()
