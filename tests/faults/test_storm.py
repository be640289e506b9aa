"""A short storm of SIGKILLs; the long one is `make soak`."""

import json
import subprocess
import sys
from pathlib import Path

from script_runner import environment


def test_runs_killed_at_random_moments_end_with_the_same_bits(tmp_path):
    script = Path(__file__).with_name("storm.py")
    done = subprocess.run(
        [sys.executable, script, "--kills", "3", "--seed", "1"], cwd=tmp_path, env=environment(), capture_output=True,
        text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["kills"] >= 3
    assert figures["runs"] >= 1
