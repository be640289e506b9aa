"""paper/pages.py: the tables of the pages against figures counted by hand."""

import json

from paper import pages, records, rows
from paper.rows import Row
from paper.runs import Run


def record(top1, seed=0):
    """A record of len(top1) epochs, CE in the first two."""
    stages = [
        {"loss": "CE" if i < 2 else "other", "class_weights": "none", "sampler": "none", "lr": 0.1}
        for i in range(len(top1))
    ]
    history = [
        {"epoch": i, "test": {"acc1": value, "few": None}, "stage": stage}
        for i, (value, stage) in enumerate(zip(top1, stages, strict=True))
    ]
    best = max(history, key=lambda epoch: epoch["test"]["acc1"])
    return {
        "device": "cpu", "settings": {"seed": seed}, "history": history, "best": best["test"],
        "last": history[-1]["test"],
    }  # fmt: skip


def row(method, dataset="cifar10"):
    return Row(Run(dataset, "exp", 100, method))


def test_a_short_run_does_not_stand_beside_a_published_figure():
    assert rows.published(row("IB")) == 78.26
    assert rows.published(Row(Run("cifar10", "exp", 100, "IB", "detached"))) is None
    assert rows.published(Row(Run("cifar10", "exp", 100, "IB", protocol="short"))) is None


def test_a_gain_is_taken_within_one_first_phase(monkeypatch):
    ce = [record([10.0, 20.0, 30.0, 31.0]), record([11.0, 21.0, 35.0, 33.0], seed=1)]
    ib = [record([10.0, 20.0, 40.0, 35.0]), record([12.0, 22.0, 90.0, 90.0], seed=1)]
    folder = {"CE": (row("CE"), ce), "IB": (row("IB"), ib)}
    monkeypatch.setattr(pages, "of_folder", {"here": folder}.get)
    page = "before\n<!-- table gain over CE\nhere: IB; CE\n-->\n| old |\n|---|\n\nafter\n"
    made = pages.made_again(page)
    assert "| IB | +7.39 | 1 | +9.00 | +4.00 | +4.00 |" in made, "the second IB has no CE of its first phase"
    assert "| CE | +0.00 | 2 | +0.00 ± 0.00 |" in made
    assert "old" not in made
    assert pages.made_again(made) == made
    assert (made.startswith("before\n"), made.endswith("\n\nafter\n")) == (True, True)


def test_how_far_two_runs_are_apart(monkeypatch, tmp_path):
    for name, top1 in (("a", [10.0, 12.0]), ("b", [11.0, 9.0])):
        (tmp_path / f"{name}.json").write_text(json.dumps(record(top1)))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "load", lambda path: json.loads(path.read_text()))
    made = pages.made_again("<!-- table apart\nthe seed: a; b\n-->\n")
    assert "| the seed | 1.00 | 3.00 | 3.00 |" in made


def test_a_column_tells_the_data_apart(monkeypatch):
    folders = {"here": {"CE": (row("CE"), [record([1.0])])}, "there": {"CE": (row("CE", "cifar100"), [record([2.0])])}}
    monkeypatch.setattr(pages, "of_folder", folders.get)
    made = pages.made_again("<!-- table accuracy\nhere: CE\nthere: CE\n-->\n")
    assert "| CIFAR-10, CPU | CE | 70.87 | 1 | 1.00 | 1.00 | 1.00 |" in made
    assert "| CIFAR-100, CPU | CE | 38.05 | 1 | 2.00 | 2.00 | 2.00 |" in made
