"""`diptych demo`: the first thing a person runs."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support.kernels import share_kernels


def test_the_demo_answers_shows_where_time_went_and_ends_cleanly(tmp_path: Path, default_model: Path) -> None:
    command = [sys.executable, "-m", "services.launch.cli", "demo", "--model", str(default_model)]
    share_kernels(tmp_path)
    environment = {**os.environ, "DIPTYCH_HOME": str(tmp_path)}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert finished.returncode == 0, finished.stderr
    assert "> Name the capital of France." in finished.stdout
    assert "Paris" in finished.stdout
    rows = {line.split("│")[1].strip(): line for line in finished.stdout.splitlines() if line.count("│") == 4}
    assert rows["prefill worker"].count("prefill-0") == 2
    assert rows["decode worker"].count("decode-0") == 2
    assert "32 tokens" in rows["cached on the decode worker"]
