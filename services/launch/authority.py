"""A certificate authority in a folder, and the certificates it signs for a cluster's nodes.

FOLDER/ca.crt, ca.key                    the authority; the key is needed for new certificates only
FOLDER/NAME/tls.crt, tls.key, ca.crt     what one node needs, as cert-manager's Secrets call it
"""

import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from services.core.errors import ConfigError
from services.wire.certificates import CLUSTER_NAME

AUTHORITY_DAYS = 3650
_CLOCKS_DIFFER = timedelta(hours=1)  # a new certificate is valid on nodes whose clocks are behind


@dataclass(frozen=True, slots=True)
class Authority:
    folder: Path
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    def issue(self, name: str, hosts: Sequence[str], days: float) -> Path:
        """Write the files of node `name`, also in place of older ones; their folder. `hosts` are names and
        addresses that clients outside the cluster know it by."""
        folder = self.folder / name
        folder.mkdir(mode=0o700, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _sign_node(self, key.public_key(), name, hosts, days)
        # The key first: a reader that comes in between finds a pair that does not match, and waits.
        _write(folder / "tls.key", _key_pem(key))
        _write(folder / "tls.crt", certificate.public_bytes(Encoding.PEM))
        _write(folder / "ca.crt", self.certificate.public_bytes(Encoding.PEM))
        return folder


def open_authority(folder: Path) -> Authority | None:
    """The one in `folder`; None if there is none. Raises ConfigError if its files are not good."""
    try:
        certificate = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
        key = load_pem_private_key((folder / "ca.key").read_bytes(), password=None)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"the authority in {folder} cannot be read: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise ConfigError(f"ca.key and ca.crt in {folder} do not belong together")
    return Authority(folder, certificate, key)


def create_authority(folder: Path) -> Authority:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name(f"{CLUSTER_NAME} authority")
    builder = _builder(name, name, key.public_key(), AUTHORITY_DAYS)
    certificate = (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write(folder / "ca.key", _key_pem(key))
    _write(folder / "ca.crt", certificate.public_bytes(Encoding.PEM))
    return Authority(folder, certificate, key)


def read_hosts(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that `issue` was given."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    addresses = [str(address) for address in names.get_values_for_type(x509.IPAddress)]
    return [n for n in names.get_values_for_type(x509.DNSName) if n != CLUSTER_NAME] + addresses


def _sign_node(
    authority: Authority, key: ec.EllipticCurvePublicKey, name: str, hosts: Sequence[str], days: float
) -> x509.Certificate:
    names = [x509.DNSName(CLUSTER_NAME), *map(_host, hosts)]
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = _builder(_name(name), authority.certificate.subject, key, days)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    return (
        builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(issuer, critical=False)
        .sign(authority.key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: float
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(**allowed: bool) -> x509.KeyUsage:
    usages = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{usage: allowed.get(usage, False) for usage in usages})


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _write(path: Path, data: bytes) -> None:
    """For its owner only, and never half: renewed certificates are read while they are written."""
    fresh = path.with_name(path.name + ".new")
    fresh.unlink(missing_ok=True)
    with open(fresh, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(data)
    os.replace(fresh, path)
