"""The API key that commands show to a gateway which wants one."""

import argparse
import os

VARIABLE = "DIPTYCH_API_KEY"


def add_api_key_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(VARIABLE),
        help=f"for a gateway that wants one; others can read command lines, so it belongs into {VARIABLE}",
    )


def authorization(api_key: str | None) -> dict[str, str]:
    """As headers."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}
