"""Which certificates commands take for that of a gateway."""

import argparse
import ssl
from pathlib import Path

from services.core.errors import ConfigError


def add_ca_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ca",
        type=Path,
        metavar="FILE",
        help="authority that signed the certificate of an https URL (PEM; default: those of the system)",
    )


def trusting(ca: Path | None) -> ssl.SSLContext | bool:
    """What httpx takes as `verify`. Raises ConfigError."""
    if ca is None:
        return True
    try:
        return ssl.create_default_context(cafile=ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"cannot read the authority in {ca}: {error}") from error


def trusting_only(certificate: Path) -> ssl.SSLContext:
    """For a gateway of our own, which has exactly this certificate, whatever names are in it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    try:
        text = certificate.read_text()
        end = "-----END CERTIFICATE-----"
        context.load_verify_locations(cadata=text[text.index("-----BEGIN") : text.index(end)] + end)
    except (OSError, ValueError, ssl.SSLError) as error:
        raise ConfigError(f"cannot read the certificate in {certificate}: {error}") from error
    return context
