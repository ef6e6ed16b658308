"""The certificate, key and authority that a part of a cluster shows to the others: PEM files, checked when
they are read, and read again when they have been renewed.

Every node's certificate carries the same name, so that peers can be known by address alone: what counts is
that the cluster's authority signed it. These are the fields that must be there, whoever made the files:

    subject alternative name   DNS: diptych-cluster
    extended key usage         server auth and client auth, or none at all
    signature                  of the authority in `ca`, perhaps over intermediate ones in `cert`
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from services.core.errors import ConfigError

CLUSTER_NAME = "diptych-cluster"
E = TypeVar("E", bound=x509.ExtensionType)
_EXPIRES_SOON = timedelta(days=7)
_TIME = "%Y-%m-%d %H:%M UTC"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    cert: Path  # the node's, then intermediate ones if there are any
    key: Path
    ca: Path


@dataclass(frozen=True, slots=True, repr=False)
class Certificates:
    """What is in the files."""

    cert: bytes
    key: bytes
    ca: bytes


class RenewedCertificates:
    """The certificates of today: whoever renews them only replaces the files.

    Raises ConfigError at first if they are not good. Files that are not good later change nothing, with a
    warning: a renewal may be read when it is half written.
    """

    def __init__(self, files: CertificateFiles) -> None:
        self._files = files
        self._seen = _versions(files)
        self._current = load_certificates(files)
        self.renewals = 0

    def current(self) -> Certificates:
        seen = _versions(self._files)
        if seen != self._seen:
            self._seen = seen
            try:
                self._current = load_certificates(self._files)
                self.renewals += 1
                logger.info("the cluster's certificates in %s were renewed", self._files.cert.parent)
            except ConfigError as error:
                logger.warning("renewed certificates are not used: %s", error.message)
        return self._current


def load_certificates(files: CertificateFiles) -> Certificates:
    """Read and check. Raises ConfigError, naming the file and what is wrong with it."""
    loaded = Certificates(*(_read(path) for path in (files.cert, files.key, files.ca)))
    chain, authorities = _parse(loaded.cert, files.cert), _parse(loaded.ca, files.ca)
    _check_key(chain[0], loaded.key, files)
    _check_time(chain[0], files.cert)
    _check_purpose(chain[0], files.cert)
    if not _is_issued_by(chain[0], chain[1:], authorities):
        raise ConfigError(f"{files.cert} is not signed by the authority in {files.ca}")
    return loaded


def _versions(files: CertificateFiles) -> list[tuple[int, int, int] | None]:
    """Changes with every replacement of a file, also where it is a link as in Kubernetes' mounts."""
    return [_version(path) for path in (files.cert, files.key, files.ca)]


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        seen = os.stat(path)
    except OSError:
        return None
    return seen.st_ino, seen.st_mtime_ns, seen.st_size


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(pem: bytes, path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError as error:
        raise ConfigError(f"{path} has no certificate in PEM form: {error}") from error


def _check_key(certificate: x509.Certificate, key: bytes, files: CertificateFiles) -> None:
    try:
        public = load_pem_private_key(key, password=None).public_key()
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(
            f"{files.key} has no private key in PEM form without a password: {error}"
        ) from error
    as_der = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if public.public_bytes(*as_der) != certificate.public_key().public_bytes(*as_der):
        raise ConfigError(f"the key in {files.key} is not that of the certificate in {files.cert}")


def _check_time(certificate: x509.Certificate, path: Path) -> None:
    now, begin, end = datetime.now(UTC), certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now >= end:
        raise ConfigError(f"the certificate in {path} has expired on {end:{_TIME}}")
    if now < begin:
        raise ConfigError(f"the certificate in {path} is not valid before {begin:{_TIME}}")
    if now + _EXPIRES_SOON > end:
        logger.warning("the certificate in %s expires on %s", path, f"{end:{_TIME}}")


def _check_purpose(certificate: x509.Certificate, path: Path) -> None:
    if CLUSTER_NAME not in _names(certificate):
        raise ConfigError(
            f"the certificate in {path} is not one of a cluster: its subject alternative names must have "
            f"DNS:{CLUSTER_NAME}"
        )
    usage = _extension(certificate, x509.ExtendedKeyUsage)
    needed = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    if usage is not None and not needed <= set(usage):
        raise ConfigError(f"the certificate in {path} must be for server auth and client auth, both")


def _names(certificate: x509.Certificate) -> list[str]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    return names.get_values_for_type(x509.DNSName) if names else []


def _extension(certificate: x509.Certificate, kind: type[E]) -> E | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _is_issued_by(
    certificate: x509.Certificate,
    intermediates: Sequence[x509.Certificate],
    authorities: Sequence[x509.Certificate],
) -> bool:
    if any(_signed(certificate, authority) for authority in authorities):
        return True
    # Each one is followed once, so a circle of signatures ends.
    return any(
        _signed(certificate, between)
        and _is_issued_by(between, [other for other in intermediates if other is not between], authorities)
        for between in intermediates
    )


def _signed(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True
