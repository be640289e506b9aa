"""reproduce.py report: the figures of known records, the rule of the noise, what is set against what."""

import copy
import json
import math
import pathlib
import statistics

import pytest

import reproduce
from paper import report
from paper.runs import Run

RESULTS = pathlib.Path(__file__).parent.parent / "results"


@pytest.fixture
def write_record(tmp_path):
    """A function that writes the record of a Run with a given accuracy, best and last."""
    source = next((RESULTS / "cifar10_lt100_short").glob("*_IB_IBReweight_exp_0.01_short/summary.json"))
    original = json.loads(source.read_text())

    def write(run, best, last, **settings):
        record = copy.deepcopy(original)
        wanted = {"dataset": run.dataset, "imb_type": run.imb_type, "imb_factor": 1 / run.ratio, "seed": run.seed}
        record["settings"] |= {**wanted, "rand_number": run.subset, **run.settings, **settings}
        record["epochs_done"] = record["settings"]["epochs"]
        record["best"] |= {"acc1": best, "seen": 10000}
        record["last"] |= {"acc1": last, "class_mean": last, "seen": 10000}
        (tmp_path / f"{run.name}.json").write_text(json.dumps(record))

    return write


def written(folder, capsys):
    reproduce.main(["report", str(folder)])
    assert "report.md" in capsys.readouterr().out
    return (folder / "report.md").read_text()


def cells(text, *start):
    """The cells of the one row that starts with `start`."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[: len(start)] == list(start)]
    return row


def test_noise_is_two_standard_errors_of_the_difference():
    binomial = 78 * 22 / 10000  # in squared percent points
    assert report.noise([78.0], 10000) == pytest.approx(2 * math.sqrt(2 * binomial))
    values = [77.0, 78.0, 79.0]  # their variance, 1, is the larger one
    assert report.noise(values, 10000) == pytest.approx(2 * math.sqrt(1 / 3 + 1))
    assert report.noise(values, 10000, 0.57, 3) == pytest.approx(2 * math.sqrt(1 / 3 + 0.57**2 / 3))
    assert report.noise([78.0] * 4, 10000) == pytest.approx(2 * math.sqrt(binomial / 4 + binomial)), "no spread"


def test_full_runs_stand_beside_the_published_cell(write_record, tmp_path, capsys):
    best, last = [77.0, 78.5, 78.0], [76.0, 77.0, 78.0]
    for seed in range(3):
        write_record(Run("cifar10", "exp", 100, "IB", seed=seed), best[seed], last[seed])
    text = written(tmp_path, capsys)
    table_2 = text[text.index("### Table 2") : text.index("### Table 4")]
    row = cells(table_2, "cifar10", "exp", "100", "IB")
    mean, limit = statistics.mean(best), report.noise(best, 10000, 0.57, 3)
    assert row[4:9] == ["78.17 ± 0.57 (authors)", f"{mean:.2f} ± 0.76", "77.00 ± 1.00", "77.00 ± 1.00", "3"]
    assert row[9:] == [f"{mean - 78.17:+.2f}", f"no (over {limit:.2f})"]
    assert set(cells(table_2, "cifar10", "exp", "100", "IB (no-factor)")[5:]) == {""}, "blank where nothing was run"
    table_4 = text[text.index("### Table 4") :]
    assert cells(table_4, "cifar10", "exp", "100", "IB")[4] == "78.26 (authors)"
    assert set(cells(table_4, "cifar10", "exp", "100", "CE")[5:]) == {""}
    assert "misquoted" in table_4


def test_a_large_difference_is_called_so(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "exp", 100, "CE"), 60.0, 59.0)
    text = written(tmp_path, capsys)
    row = cells(text, "cifar10", "exp", "100", "CE")
    assert row[8:10] == ["1", "-10.87"]
    assert row[10].startswith("yes")


def test_short_runs_and_other_settings_are_never_set_against_published_figures(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "exp", 100, "IB", protocol="short"), 70.0, 70.0)
    write_record(Run("cifar10", "exp", 100, "IB", seed=1), 70.0, 70.0, alpha=10.0)
    write_record(Run("cifar10", "exp", 100, "IB", subset=3), 70.0, 70.0)
    text = written(tmp_path, capsys)
    assert "### Table" not in text
    assert "not to be set against published figures" in text
    assert cells(text, "IB, but alpha 10.0")[1] == "1"
    assert cells(text, "IB, subset 3")[1] == "1"


def test_table_3_has_our_classes_under_the_papers(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "step", 50, "IB"), 81.0, 80.5)
    text = written(tmp_path, capsys)
    rows = text[text.index("### Table 3") :].splitlines()
    (at,) = [i for i, row in enumerate(rows) if row.startswith("| step | IB | published")]
    assert rows[at].endswith("| 94.0 | 97.7 | 86.7 | 83.2 | 93.8 | 56.9 | 71.0 | 75.1 | 76.5 | 81.7 | 81.66 |")
    assert rows[at + 1].startswith("|  |  | ours, last (n = 1) | 79.3 | 90.3 | 55.7 | 49.2 |")
    assert rows[at + 1].endswith("| 80.50 |")


@pytest.mark.parametrize("name", ["cifar10_lt100_short", "digits_lt100"])
def test_the_committed_reports_are_those_of_the_committed_records(name, tmp_path):
    report.write([RESULTS / name], tmp_path)
    ours, theirs = (
        [line for line in (folder / "report.md").read_text().splitlines() if line.startswith(("|", "##"))]
        for folder in (tmp_path, RESULTS / name)
    )
    assert ours == theirs
    assert sum(line.startswith("| IB") for line in ours) >= 3


def test_figure_3_takes_the_starts_of_plain_ib_only(write_record, tmp_path):
    for variant, best in {"": 70.0, "start020": 60.0, "detached": 50.0}.items():
        write_record(Run("cifar10", "exp", 10, "IB", variant, protocol="short"), best, best)
    rows = report.group(report.records.read(tmp_path))
    assert report.starts(rows, "cifar10", "short") == {10: [(4, [60.0]), (20, [70.0])]}
    assert report.starts(rows, "cifar10", "full") == {}


def test_a_folder_without_records_and_no_folder(tmp_path, capsys):
    assert "nothing has run" in written(tmp_path, capsys)
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["report", str(tmp_path / "none")])
    assert stop.value.code == 1
