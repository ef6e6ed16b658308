"""Generates services/wire/generated from proto/. `--check` fails when the committed code is stale.

python -m services.wire.generate [--check]
"""

import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GENERATED = Path(__file__).parent / "generated"
NAMES = ("worker", "transfer")


def generate(target: Path) -> None:
    """Write message and stub modules for every schema into `target`."""
    from grpc_tools import protoc

    proto = ROOT / "proto"
    outputs = [f"--{kind}_out={target}" for kind in ("python", "pyi", "grpc_python")]
    sources = [str(proto / f"{name}.proto") for name in NAMES]
    if protoc.main(["protoc", f"-I{proto}", *outputs, *sources]) != 0:
        raise SystemExit("protoc failed")
    for path in sorted(target.glob("*_pb2*.py*")):
        path.write_text(_relative_imports(path.read_text()))
    (target / "__init__.py").write_text("")


def _relative_imports(source: str) -> str:
    """protoc writes top-level imports; the modules live in a package."""
    pattern = rf"^import ({'|'.join(NAMES)})_pb2 as"
    return re.sub(pattern, r"from services.wire.generated import \1_pb2 as", source, flags=re.MULTILINE)


def main() -> None:
    if sys.argv[1:] != ["--check"]:
        generate(GENERATED)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.name: path.read_text() for path in Path(folder).iterdir()}
    committed = {path.name: path.read_text() for path in GENERATED.iterdir() if path.is_file()}
    stale = sorted(name for name in fresh.keys() | committed.keys() if fresh.get(name) != committed.get(name))
    if stale:
        raise SystemExit(f"generated protobuf code is stale ({', '.join(stale)}): run `make proto`")


if __name__ == "__main__":
    main()
