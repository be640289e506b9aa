"""Log files cut at any place: mended at resume, no epoch twice, none missing."""

import json
import random
import shutil
from pathlib import Path

from script_runner import FOUR, break_off, log_folder, read_logs, run_ok, scalars

FILES = ("args.json", "class_accuracy.csv", "events*", "log_test.csv", "log_train.csv", "summary.json")


def test_logs_cut_at_random_places_are_whole_after_resume(tmp_path):
    """Each file is cut at a random place, and one in eight times deleted."""
    draw, runs = random.Random(0), tmp_path / "runs"
    runs.mkdir()
    run_ok([*FOUR, "--exp_str", "whole"], runs)
    break_off(FOUR, runs, after=3)
    whole = log_folder(runs, "IB", exp="whole")
    for name in FILES:
        home = Path(shutil.copytree(runs, tmp_path / name))
        folder = log_folder(home, "IB")
        (path,) = folder.glob(name)
        content = path.read_bytes()
        kept = draw.randrange(-len(content) // 8, len(content))
        path.write_bytes(content[:kept]) if kept >= 0 else path.unlink()
        run_ok([*FOUR, "--resume", "auto"], home)
        assert read_logs(folder) == read_logs(whole)
        mended, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
        assert [record["epoch"] for record in mended["history"]] == [0, 1, 2, 3]
        assert [record["test"]["loss"] for record in mended["history"]] == [
            record["test"]["loss"] for record in expected["history"]
        ]
        assert scalars(folder) == scalars(whole)
        assert json.loads((folder / "args.json").read_text())["epochs"] == 4
