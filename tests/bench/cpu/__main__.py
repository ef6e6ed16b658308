"""Diptych beside llama.cpp, vLLM and transformers on this machine's CPU, with one client, in one run.

    make bench-cpu [QUICK=1] [ONLY=diptych,llama.cpp,vllm,transformers] [SHAPE=256x64] [CONCURRENCY=1,8,32]
    python -m tests.bench.cpu [--quick] [--only ...] [--shapes ...] [--concurrency ...] [--resume] [--render]

Peers are installed and built on first use, into ~/.cache/diptych/bench (a quarter of an hour on two cores). A
full run then takes about an hour on two cores with AVX-512, QUICK=1 about ten minutes; no repetition of a
load takes more than three minutes: what is not answered by then has failed. Each server runs alone. Prompts
are random token ids, and others in every request, so that no prefix cache helps; answers have full length.
Figures are medians of three rounds; memory is the proportional set size of all of a server's processes. After
each repetition what is known is saved: --resume goes on with the file of a broken run (and marks what is of
another start), --render only writes its tables and picture.
"""

import argparse
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from services.model.home import diptych_home
from tests.bench.cpu.contestant import Contestant
from tests.bench.cpu.load import HEADLINE, LONG, SHORT, Shape
from tests.bench.cpu.plan import contestants, plan
from tests.bench.cpu.processes import ROOT, PeerFailed
from tests.bench.cpu.results import Results, Session
from tests.bench.cpu.tables import heading, tables
from tests.bench.cpu.visit import Notebook, make

CONCURRENCIES = (1, 8, 32)
QUICK_CONCURRENCIES = (1, 8)
SHAPES = (SHORT, LONG, HEADLINE)
FAMILIES = ("diptych", "llama.cpp", "vllm", "transformers")


def main() -> int:
    given = _arguments()
    if given.render:
        render(Results.load(given.json), given)
        return 0
    results = _notebook(given)
    notebook = Notebook(results, given.json, given.json.parent / "logs")
    chosen = [c for c in contestants() if c.family.lower() in given.only]
    begun = time.monotonic()
    visits = plan(prepared(chosen, notebook), given.shapes, given.concurrency, given.quick)
    for number, visit in enumerate(visits, 1):
        print(f"{(time.monotonic() - begun) / 60:.0f} min, turn {number} of {len(visits)}", flush=True)
        make(visit, notebook)
    print(f"\nmeasured for {(time.monotonic() - begun) / 60:.0f} minutes; {given.json} has everything")
    render(results, given)
    return 0


def prepared(chosen: Sequence[Contestant], notebook: Notebook) -> list[Contestant]:
    """Those that can run here; of the others the reason is written down."""
    ready: list[Contestant] = []
    for contestant in chosen:
        try:
            contestant.prepare()
            ready.append(contestant)
        except (PeerFailed, OSError) as error:
            notebook.failed(contestant, error)
    return ready


def render(results: Results, given: argparse.Namespace) -> None:
    made = tables(results)
    print("\n".join(["", *heading(results), *(table.text() for table in made)]))
    # Imported here: a machine that only measures needs no plots.
    from tests.bench.cpu.plot import draw

    picture = given.markdown.with_suffix(".png")
    draw([row for row in results.rows() if not row.trial], picture)
    intro = [
        "# Diptych beside vLLM, llama.cpp and transformers on a CPU",
        "",
        "Made by `make bench-cpu`, which explains itself in `tests/bench/cpu/__main__.py`.",
        "",
        *(f"- {line}" for line in heading(results)),
        "",
        f"![bars]({picture.name})",
        "",
    ]
    given.markdown.parent.mkdir(parents=True, exist_ok=True)
    given.markdown.write_text("\n".join([*intro, *(table.markdown() for table in made)]))
    print(f"\nwritten: {given.markdown}, {picture}")


def _notebook(given: argparse.Namespace) -> Results:
    """The file's results with a new session, or new ones; a file of an earlier run stays as NAME.1."""
    if given.json.exists() and not given.resume:
        shutil.move(given.json, f"{given.json}.1")
    results = Results.load(given.json) if given.json.exists() else Results()
    begun_at = datetime.now().astimezone().isoformat(timespec="seconds")
    results.sessions.append(Session(len(results.sessions) + 1, begun_at, given.quick, machine()))
    return results


def machine() -> dict[str, str]:
    facts = Path("/proc/cpuinfo").read_text().splitlines()
    found = {line.partition(":")[0].strip(): line.partition(":")[2].strip() for line in facts if ":" in line}
    wanted = ("avx2", "avx_vnni", "avx512_vnni")
    features = [name for name in wanted if name in found.get("flags", "").split()]
    commit = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return {
        "processor": found.get("model name", "unknown"),
        "cores": str(sum(line.startswith("processor") for line in facts)),
        "features": " ".join(features) or "none of ours",
        "Diptych": subprocess.run(commit, capture_output=True, text=True).stdout.strip() or "unknown",
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few requests, one round, no trials of settings")
    parser.add_argument(
        "--only", type=_families, default=FAMILIES, metavar="NAME,...", help=", ".join(FAMILIES)
    )
    parser.add_argument(
        "--shapes", type=_shapes, metavar="INxOUT,...", help="default: 256x64,1024x128,16x128"
    )
    parser.add_argument("--concurrency", type=_numbers, metavar="N,...", help="default: 1,8,32")
    parser.add_argument("--resume", action="store_true", help="go on with what --json has")
    parser.add_argument("--render", action="store_true", help="measure nothing")
    parser.add_argument("--json", type=Path, default=diptych_home() / "bench" / "results" / "cpu.json")
    parser.add_argument("--markdown", type=Path, default=ROOT / "docs" / "results" / "cpu.md")
    given = parser.parse_args()
    given.shapes = given.shapes or ((SHORT,) if given.quick else SHAPES)
    given.concurrency = given.concurrency or (QUICK_CONCURRENCIES if given.quick else CONCURRENCIES)
    return given


def _families(text: str) -> list[str]:
    names = text.lower().split(",")
    unknown = set(names) - set(FAMILIES)
    if unknown:
        raise argparse.ArgumentTypeError(f"nobody is called {', '.join(unknown)}: {', '.join(FAMILIES)}")
    return names


def _shapes(text: str) -> list[Shape]:
    return [Shape.of(name) for name in text.split(",")]


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    sys.exit(main())
