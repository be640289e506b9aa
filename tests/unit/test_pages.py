"""paper/pages.py: the tables of the pages against figures counted by hand."""

import json

import pytest

from paper import pages


def record(top1, start=2, dataset="cifar10"):
    """A record of len(top1) epochs, its later loss from epoch `start` on."""
    history = [{"epoch": i, "test": {"acc1": value, "few": None}} for i, value in enumerate(top1)]
    best = max(history, key=lambda epoch: epoch["test"]["acc1"])
    settings = {"dataset": dataset, "imb_type": "exp", "imb_factor": 0.01, "start_ib_epoch": start, "epochs": 200}
    return {
        "device": "cpu",
        "settings": settings,
        "history": history,
        "best": best["test"],
        "last": history[-1]["test"],
    }


def test_the_plateau_is_the_mean_of_the_last_tenth():
    one = record([*range(18), 50.0, 40.0])
    assert [pages.reached(one, when) for when in pages.ENDPOINTS] == [50.0, 45.0, 40.0]
    assert pages.reached(one, "plateau", "few") is None
    assert pages.reached(record([1.0, 2.0]), "plateau") == 2.0


@pytest.mark.parametrize(
    ("values", "text"), [([], "n/a"), ([1.0, None], "n/a"), ([1.0], "+1.00"), ([1.0, 3.0], "+2.00 ± 1.41")]
)
def test_a_mean_and_its_spread(values, text):
    assert pages.shown(values, "+") == text


def test_a_short_run_does_not_stand_beside_a_published_figure():
    one = record([1.0])
    assert pages.published("IB", one) == "78.26"
    assert pages.published("IB (detached)", one) == ""
    one["settings"]["epochs"] = 40
    assert pages.published("IB", one) == ""


def test_a_gain_is_taken_within_one_first_phase(monkeypatch):
    ce = [record([10.0, 20.0, 30.0, 31.0]), record([11.0, 21.0, 35.0, 33.0])]
    ib = [record([10.0, 20.0, 40.0, 35.0]), record([12.0, 22.0, 90.0, 90.0])]
    monkeypatch.setattr(pages, "of_folder", {"here": {"CE": ce, "IB": ib}}.get)
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
    made = pages.made_again("<!-- table apart\nthe seed: a; b\n-->\n")
    assert "| the seed | 1.00 | 3.00 | 3.00 |" in made


def test_a_column_tells_the_data_apart(monkeypatch):
    folders = {"here": {"CE": [record([1.0])]}, "there": {"CE": [record([2.0], dataset="cifar100")]}}
    monkeypatch.setattr(pages, "of_folder", folders.get)
    made = pages.made_again("<!-- table accuracy\nhere: CE\nthere: CE\n-->\n")
    assert "| CIFAR-10, CPU | CE | 70.87 | 1 | 1.00 | 1.00 | 1.00 |" in made
    assert "| CIFAR-100, CPU | CE | 38.05 | 1 | 2.00 | 2.00 | 2.00 |" in made
