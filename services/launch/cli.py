"""The command `diptych`. Each command is a module with `add_parser`; this one finds and runs it.

Exit codes: 0 done, 1 an operating error (one line on stderr), 2 a wrong argument or setting,
130 interrupted.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from services.core.errors import ConfigError, DiptychError
from services.launch import (
    certs,
    chat,
    demo,
    doctor,
    explain,
    kernels,
    keys,
    model,
    role,
    service,
    status,
    up,
)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except DiptychError as error:
        print(f"diptych: {error.message}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone, as in `diptych chat ... | head`. Python would complain
        # once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diptych", description="A disaggregated prefill/decode LLM serving cluster."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up.add_parser(commands)
    demo.add_parser(commands)
    chat.add_parser(commands)
    status.add_parser(commands)
    explain.add_parser(commands)
    role.add_parser(commands)
    keys.add_parser(commands)
    doctor.add_parser(commands)
    model.add_parser(commands)
    kernels.add_parser(commands)
    certs.add_parser(commands)
    service.add_parsers(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
