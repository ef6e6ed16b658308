"""`diptych kernels build`: the C++ kernels before they are needed, in an installation or an image."""

import argparse

from kernels.cpu.build import KernelsUnavailable
from services.core.errors import ConfigError
from services.launch.display import Display
from services.worker.quantization import BUILDING, build_kernels


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = commands.add_parser("kernels", help="build the C++ kernels", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    build = actions.add_parser("build", help="build them for this processor, if that is not done yet")
    build.set_defaults(run=run_build)


def run_build(_: argparse.Namespace) -> int:
    display = Display()
    try:
        print(f"kernels for {build_kernels(lambda: display.line(BUILDING))}")
    except KernelsUnavailable as error:
        raise ConfigError(f"no kernels: {error}") from None
    return 0
