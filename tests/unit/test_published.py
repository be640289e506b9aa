"""published.csv against a transcription of the paper's tables that was made on its own, cell by cell."""

import collections
import csv

import pytest

from paper import runs

#: Table 3, CIFAR-10 at ratio 50: imbalance, method, ten classes.
TABLE_3 = """
exp CE 97.4 98.0 84.0 80.3 78.8 68.4 76.1 64.5 57.0 52.0
exp Focal 91.6 95.1 73.1 59.2 67.8 67.2 84.2 77.3 83.9 61.8
exp CB 92.9 96.3 79.2 75.1 82.4 69.9 75.0 69.1 73.6 66.8
exp LDAM 96.9 98.5 82.9 74.7 82.8 69.0 78.5 69.9 65.3 66.0
exp LDAM-DRW 94.8 97.8 82.6 72.3 85.3 73.0 82.0 76.7 75.8 72.4
exp IB 92.2 96.2 81.3 66.6 85.7 76.4 81.7 75.9 79.9 81.1
exp IB+CB 93.8 97.2 78.1 64.8 84.8 74.2 86.4 79.7 79.5 76.9
exp IB+Focal 90.9 96.1 81.7 69.0 82.0 75.7 85.2 77.5 80.2 76.8
step CE 95.9 99.2 91.5 91.9 95.5 24.8 40.2 46.7 52.7 55.1
step Focal 96.3 93.9 91.2 90.5 95.7 20.0 46.7 48.8 56.1 57.6
step CB 87.4 96.3 76.8 77.0 85.7 34.6 61.5 56.5 68.7 63.8
step LDAM 96.4 98.5 91.1 90.2 94.6 28.3 50.3 57.0 56.2 64.4
step LDAM-DRW 94.5 97.2 88.0 84.5 94.3 50.4 69.9 71.4 74.6 76.0
step IB 94.0 97.7 86.7 83.2 93.8 56.9 71.0 75.1 76.5 81.7
step IB+CB 91.8 95.7 86.6 79.4 93.6 62.8 77.2 72.3 74.2 87.3
step IB+Focal 91.2 96.4 83.3 77.1 92.0 64.8 78.0 74.4 83.5 83.1
"""

#: Table 4: imbalance, method, CIFAR-10 at 200 100 50 20 10, CIFAR-100 at the same.
TABLE_4 = """
exp CE 66.28 70.87 78.22 82.43 86.49 33.54 38.05 43.71 51.21 56.96
exp Focal 65.29 70.38 76.71 82.76 86.66 35.62 38.41 44.32 51.95 55.78
exp CB 68.89 74.57 79.27 84.36 87.49 36.23 39.60 45.32 52.59 57.99
exp LDAM - 73.35 - - 86.96 - 39.6 - - 56.91
exp LDAM-DRW - 77.03 - - 88.16 - 42.04 - - 57.99
exp IB 73.96 78.26 81.70 85.8 88.25 37.31 42.14 46.22 52.63 57.13
exp IB+CB 73.69 78.04 81.54 85.42 88.09 37.06 41.31 46.16 52.74 56.78
exp IB+Focal 75.05 79.76 81.51 85.31 88.04 38.23 42.06 47.49 53.28 58.20
step CE 56.97 64.81 69.35 79.71 84.16 38.29 39.27 41.65 48.55 54.13
step LDAM - 66.58 - - 85.00 - 39.58 - - 56.27
step LDAM-DRW - 76.92 - - 87.81 - 45.36 - - 59.46
step IB 72.15 76.53 81.66 85.41 87.72 39.66 45.39 48.93 53.57 57.96
step IB+CB 69.96 75.97 82.09 85.27 88.01 39.69 45.27 48.80 53.42 57.86
step IB+Focal 74.12 77.97 82.38 85.68 87.90 40.39 44.96 48.92 54.53 59.54
"""

#: Tables 1 and 2 (IB), 5, 6 and the independent ones: place, method, variant, values.
TABLE_1 = {
    ("cifar10", 100): [78.41, 75.67, 77.23], ("cifar10", 20): [85.80, 84.35, 84.30],
    ("cifar100", 100): [40.85, 36.41, 37.48], ("cifar100", 20): [52.85, 50.95, 50.99],
}  # fmt: skip
TABLE_2 = {"eps1e-8": (76.03, 0.97), "": (78.17, 0.57), "eps1e-2": (77.55, 0.55), "no-factor": (64.91, 1.40)}
TABLE_5 = {  # exp 100, exp 10, step 100, step 10
    "CE": [38.52, 36.62, 36.74, 51.11], "Focal": [38.95, 54.02, 38.24, 41.77], "CB": [41.37, 54.82, 37.35, 54.3],
    "LDAM-DRW": [37.47, 52.78, 39.37, 52.57], "IB": [42.65, 57.22, 41.13, 54.83],
}  # fmt: skip
TABLE_6 = {
    "CE": [57.30, 79.48], "Focal": [58.03, 78.65], "CB": [61.12, 81.03], "LDAM": [64.58, 83.52], "IB": [65.39, 84.98],
}  # fmt: skip
#: Error rates of BagofTricks-LT (documents/trick_gallery.md and README.md, the CIFAR-LT of Cao et al.).
ERRORS = {  # CIFAR-10 at 100, 50, CIFAR-100 at 100, 50
    "CE": [28.05, 23.55, 62.27, 56.22], "CE+DRW-IB": [25.18, 20.18, 58.38, 53.20], "IB": [23.34, 19.08, 59.21, 54.54],
    "BS": [22.46, 18.89, 57.01, 53.45], "LDAM-DRW": [22.27, 18.40, 57.53, 52.71], "CE+cRT": [25.01, None, 59.74, None],
    "tau-norm": [27.30, None, 59.04, None], "BS-DRW": [22.83, None, 58.18, None],
    "CDT-DRW": [22.45, None, 57.78, None], "DiVE": [21.12, None, 54.48, None],
}  # fmt: skip


def values(table, **wanted):
    """Values of the rows of a table, in the file's order."""
    return [
        row["value"] for row in runs.published()
        if row["table"] == table and all(row[name] == value for name, value in wanted.items())
    ]  # fmt: skip


def lines(text):
    for line in text.split("\n")[1:-1]:
        imb_type, method, *cells = line.split()
        yield imb_type, method, [None if cell == "-" else float(cell) for cell in cells]


def test_table_1():
    for (dataset, ratio), expected in TABLE_1.items():
        found = [values("1", dataset=dataset, ratio=ratio, variant=v) for v in ("", "l2-auto", "linf-auto")]
        assert found == [[value] for value in expected]


def test_table_2():
    rows = {row["variant"]: row for row in runs.published() if row["table"] == "2"}
    assert {name: (row["value"], row["spread"]) for name, row in rows.items()} == TABLE_2
    assert {int(row["runs"]) for row in rows.values()} == {3}


def test_table_3():
    expected = {(imb_type, method): cells for imb_type, method, cells in lines(TABLE_3)}
    assert len(expected) == 16
    for (imb_type, method), cells in expected.items():
        assert values("3", imb_type=imb_type, method=method) == cells
    assert len(values("3")) == 160


def test_table_4():
    places = [(dataset, ratio) for dataset in ("cifar10", "cifar100") for ratio in (200, 100, 50, 20, 10)]
    count = 0
    for imb_type, method, cells in lines(TABLE_4):
        for (dataset, ratio), value in zip(places, cells, strict=True):
            found = values("4", dataset=dataset, ratio=ratio, imb_type=imb_type, method=method)
            assert found == [value] * (value is not None)
            count += len(found)
    assert count == len(values("4")) == 116


def test_tables_5_and_6():
    for method, expected in TABLE_5.items():
        places = [("exp", 100), ("exp", 10), ("step", 100), ("step", 10)]
        assert [values("5", method=method, imb_type=i, ratio=r) for i, r in places] == [[v] for v in expected]
    for method, expected in TABLE_6.items():
        assert [values("6", method=method, metric=m) for m in ("top1", "top5")] == [[v] for v in expected]
    assert (len(values("5")), len(values("6"))) == (20, 10)


def test_independent_figures_are_100_minus_the_error_rates():
    places = [("cifar10", 100), ("cifar10", 50), ("cifar100", 100), ("cifar100", 50)]
    for method, errors in ERRORS.items():
        for (dataset, ratio), error in zip(places, errors, strict=True):
            expected = [] if error is None else [pytest.approx(100 - error)]
            assert values("independent", method=method, dataset=dataset, ratio=ratio) == expected


def test_post_hoc_logit_adjustment_is_100_minus_the_balanced_errors_of_its_paper():
    for dataset, error in (("cifar10", 22.60), ("cifar100", 58.24)):  # Table 3, tau 1
        assert values("yardstick", method="post-hoc LA", dataset=dataset) == [pytest.approx(100 - error)]


def test_what_is_not_the_same_experiment_says_why():
    rows = runs.published()
    other = collections.Counter((row["table"], row["method"]) for row in rows if not row["same_experiment"])
    assert {key: n for key, n in other.items() if key[0] == "4"} == {
        ("4", "Focal"): 10, ("4", "CB"): 10, ("4", "LDAM-DRW"): 1,
    }  # fmt: skip
    assert other["3", "CB"] == 20
    assert not any(row["same_experiment"] for row in rows if row["table"] == "6"), "no script of the authors"
    assert all(row["note"] for row in rows if not row["same_experiment"] and row["table"] != "independent")
    assert not any(row["same_experiment"] for row in rows if row["table"] == "independent")
    assert all("10" in row["note"] for row in rows if row["method"] == "Focal")


def test_the_file_is_regular():
    with open(runs.PUBLISHED, newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {13}
    assert {row["variant"] for row in runs.published()} <= set(runs.VARIANTS)
    keys = [
        tuple(row[k] for k in ("table", "dataset", "imb_type", "ratio", "method", "variant", "metric", "whose"))
        for row in runs.published()
    ]
    assert len(keys) == len(set(keys))
