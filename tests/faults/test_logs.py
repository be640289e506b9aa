"""Log files cut at any place: mended at resume, no epoch twice, none missing."""

import json
import random
import shutil
from pathlib import Path

import pytest
from script_runner import FOUR, break_off, log_folder, read_logs, run_ok, scalars

FILES = ("args.json", "class_accuracy.csv", "events*", "log_test.csv", "log_train.csv", "summary.json")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and the same one broken off after three of its four epochs."""
    return tmp_path_factory.mktemp("runs")


def trained(runs, capsys):
    if not any(runs.iterdir()):
        run_ok([*FOUR, "--exp_str", "whole"], runs, capsys)
        break_off(FOUR, runs, capsys, after=3)
    return runs


def test_logs_cut_at_random_places_are_whole_after_resume(runs, tmp_path, capsys):
    """Each file is cut at a random place, and one in eight times deleted."""
    draw = random.Random(0)
    whole = log_folder(trained(runs, capsys), "IB", exp="whole")
    for name in FILES:
        home = Path(shutil.copytree(runs, tmp_path / name))
        folder = log_folder(home, "IB")
        (path,) = folder.glob(name)
        content = path.read_bytes()
        kept = draw.randrange(-len(content) // 8, len(content))
        path.write_bytes(content[:kept]) if kept >= 0 else path.unlink()
        run_ok([*FOUR, "--resume", "auto"], home, capsys)
        assert read_logs(folder) == read_logs(whole)
        mended, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
        assert [record["epoch"] for record in mended["history"]] == [0, 1, 2, 3]
        assert [record["test"]["loss"] for record in mended["history"]] == [
            record["test"]["loss"] for record in expected["history"]
        ]
        assert scalars(folder) == scalars(whole)
        assert json.loads((folder / "args.json").read_text())["epochs"] == 4
