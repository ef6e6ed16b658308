"""`diptych certs`: the certificates with which the parts of a cluster know each other.

create makes an authority in FOLDER, unless one is there, and a folder of files for each NAME. Give each node
its folder, and say --cluster-cert NAME/tls.crt --cluster-key NAME/tls.key --cluster-ca NAME/ca.crt there;
keep ca.key elsewhere. renew replaces certificates, which running gateways and workers take up by themselves.
"""

import argparse
import re
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from services.core.errors import ConfigError
from services.launch.authority import Authority, create_authority, open_authority, read_hosts

DEFAULT_NAME, DEFAULT_DAYS = "node", 365.0


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser(
        "certs",
        help="make certificates for a cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="create|renew|show")
    create = verbs.add_parser("create", help="an authority, and certificates for nodes")
    renew = verbs.add_parser("renew", help="the certificates of nodes, by the same authority")
    show = verbs.add_parser("show", help="whose they are, and until when")
    for verb in (create, renew, show):
        verb.add_argument("folder", type=Path, metavar="FOLDER")
        verb.set_defaults(run=run)
    for verb in (create, renew):
        verb.add_argument("names", nargs="*", type=node_name, metavar="NAME", help="of nodes")
        verb.add_argument("--days", type=days, default=DEFAULT_DAYS, help="validity (default: 365)")
    create.add_argument(
        "--host",
        action="append",
        default=[],
        help="name or address that clients know the gateway by, for --tls-cert; may be repeated",
    )


def run(arguments: argparse.Namespace) -> int:
    verbs = {"create": create, "renew": renew, "show": show}
    verbs[arguments.verb](arguments)
    return 0


def create(arguments: argparse.Namespace) -> None:
    names = arguments.names or [DEFAULT_NAME]
    for name in names:
        if (arguments.folder / name).exists():
            raise ConfigError(
                f"{arguments.folder / name} is there already: `diptych certs renew` replaces it"
            )
    authority = open_authority(arguments.folder) or create_authority(arguments.folder)
    for name in names:
        print(authority.issue(name, arguments.host, arguments.days))


def renew(arguments: argparse.Namespace) -> None:
    authority = _existing(arguments.folder)
    for name in arguments.names or _nodes(arguments.folder):
        hosts = read_hosts(_certificate(arguments.folder / name / "tls.crt"))
        print(authority.issue(name, hosts, arguments.days))


def show(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    for path in [folder / "ca.crt", *(folder / name / "tls.crt" for name in _nodes(folder))]:
        certificate = _certificate(path)
        left = certificate.not_valid_after_utc - datetime.now(UTC)
        end = f"expires in {left.days} days" if left.total_seconds() > 0 else "has expired"
        hosts = ", ".join(read_hosts(certificate)) if path.name == "tls.crt" else ""
        print(f"{path}: {end} ({certificate.not_valid_after_utc:%Y-%m-%d}){f'; {hosts}' if hosts else ''}")


def days(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 36500:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of days")
    return value


def node_name(text: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a name of letters, digits, dots and dashes")
    return text


def _existing(folder: Path) -> Authority:
    authority = open_authority(folder)
    if authority is None:
        raise ConfigError(f"no authority (ca.crt and ca.key) in {folder}: `diptych certs create` makes one")
    return authority


def _nodes(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/tls.crt"))


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the certificate {path}: {error}") from error
