"""Log files cut at any place: mended at resume, no epoch twice, none missing."""

import json
import random
import shutil
from pathlib import Path

import pytest
from script_runner import FOUR, break_off, log_folder, read_logs, run_ok, scalars

TRIES = 20


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and the same one broken off after three of its four epochs."""
    return tmp_path_factory.mktemp("runs")


def trained(runs, capsys):
    if not any(runs.iterdir()):
        run_ok([*FOUR, "--exp_str", "whole"], runs, capsys)
        break_off(FOUR, runs, capsys, after=3)
    return runs


def cut(folder, draw):
    """Cut a random file of the folder at a random place, or delete it."""
    path = draw.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    content = path.read_bytes()
    kept = draw.randrange(-len(content) // 8, len(content))
    path.write_bytes(content[: max(kept, 0)]) if kept >= 0 else path.unlink()
    return path.name


def test_logs_cut_at_random_places_are_whole_after_resume(runs, tmp_path, capsys):
    draw, names = random.Random(0), set()
    whole = log_folder(trained(runs, capsys), "IB", exp="whole")
    for number in range(TRIES):
        home = Path(shutil.copytree(runs, tmp_path / str(number)))
        folder = log_folder(home, "IB")
        names.add(cut(folder, draw).split(".")[0])
        run_ok([*FOUR, "--resume", "auto"], home, capsys)
        assert read_logs(folder) == read_logs(whole)
        mended, expected = (json.loads((path / "summary.json").read_text()) for path in (folder, whole))
        assert [record["epoch"] for record in mended["history"]] == [0, 1, 2, 3]
        assert [record["test"]["loss"] for record in mended["history"]] == [
            record["test"]["loss"] for record in expected["history"]
        ]
        assert scalars(folder) == scalars(whole)
        assert json.loads((folder / "args.json").read_text())["epochs"] == 4
    assert names == {"args", "class_accuracy", "events", "log_test", "log_train", "summary"}
