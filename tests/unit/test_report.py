"""reproduce.py report: the figures of known records, what is set against what, and what is left out."""

import copy
import csv
import dataclasses
import itertools
import json
import pathlib
import statistics
from unittest import mock

import pytest
from scipy import stats
from script_runner import refused, run_reproduce

import reproduce
from experiment.compare import plan
from experiment.records import best_epoch, plateau
from experiment.settings import FIELDS, fields_affecting, from_record, recorded
from imbalance import class_counts
from paper import figures, records, report, runs, style
from paper.rows import Row, group, share_first_phase
from paper.runs import Run
from training.recipe import Recipe

RESULTS = pathlib.Path(__file__).parent.parent.parent / "results"
SOURCE = json.loads(
    next((RESULTS / "cifar10_lt100_short").glob("*_IB_CBReweight_exp_0.01_short/summary.json")).read_text()
)
IB, CE = Run("cifar10", "exp", 100, "IB"), Run("cifar10", "exp", 100, "CE")


def counts_of(run):
    """Training images of each class in a run on the whole data set."""
    classes, images = {"cifar10": (10, 5000), "cifar100": (100, 500), "tinyimagenet": (200, 500)}.get(
        run.dataset, (10, 124)
    )
    if run.dataset == "inaturalist":
        return [437_513 - 8_141, *[1] * 8_141]
    return class_counts([images] * classes, run.imb_type, 1 / run.ratio)


def record_of(run, best, last, first=10.0, macro_f1=None, **settings):
    """A complete record of a Run, its settings those of its command, but for `settings`.

    Accuracies: `best` in one epoch, `last` in the last tenth, `first` in all others, whatever the method.
    """
    record = copy.deepcopy(SOURCE)
    record["settings"] = {**recorded(records.command_settings(run)), "num_classes": 10, **settings}
    record["name"] = run.name
    record["epochs_done"] = epochs = record["settings"]["epochs"]
    record["history"] = [copy.deepcopy(record["history"][0]) for _ in range(epochs)]
    record["class_counts"] = counts_of(run)
    stages = Recipe(from_record(record["settings"])).stages()
    at_best = epochs - epochs // 10 - 1
    for i, epoch in enumerate(record["history"]):
        accuracy = last if i > at_best else best if i == at_best else first
        epoch |= {"epoch": i, "seconds": 36.0, "stage": dataclasses.asdict(stages[i])}
        epoch["test"] |= {"acc1": accuracy, "class_mean": accuracy, "macro_f1": macro_f1}
    for when, i in (("best", at_best), ("last", -1)):
        record[when] |= {"epoch": i % epochs, **record["history"][i]["test"], "per_class": SOURCE[when]["per_class"]}
    record["code"] = {"commit": "0123456789abcdef", "clean": True}
    return record


@pytest.fixture
def write_record(tmp_path):
    """A function that writes such a record."""

    def write(run, best, last, name=None, **settings):
        (tmp_path / f"{name or run.name}.json").write_text(json.dumps(record_of(run, best, last, **settings)))

    return write


def written(folder, capsys, *flags):
    reproduce.main(["report", str(folder), *flags])
    assert "report.md" in capsys.readouterr().out
    return (folder / "report.md").read_text()


def section(text, start):
    """From the heading that starts so to the next one."""
    text = text[text.index(start) :]
    return text[: text.find("\n#", 1)]


def cells(text, *start):
    """The cells of the one row that starts with `start`."""
    rows = [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines() if line[:1] == "|"]
    (row,) = [row for row in rows if row[: len(start)] == list(start)]
    return row


# ------------------------------------------------------------------------------------- beside the published


def test_best_and_plateau_are_judged_apart_with_the_spread_of_their_differences(write_record, tmp_path, capsys):
    for seed, best in enumerate([78.0, 78.5, 78.2]):
        write_record(dataclasses.replace(IB, seed=seed), best, best - 3)
    text = written(tmp_path, capsys)
    table_4 = section(text, "### Table 4")
    row = cells(table_4, "cifar10", "exp", "100", "IB")
    assert row[4:9] == ["78.26 (authors)", "3", "78.23 ± 0.25", "-0.03", "agrees"]
    assert row[9:] == ["75.23 ± 0.25", "-3.03", "lower", "75.23 ± 0.25", "-3.03"]
    assert set(cells(table_4, "cifar10", "exp", "100", "CE")[5:]) == {""}, "blank where nothing was run"
    assert "| cifar100 |" not in table_4, "only where something has run"
    assert cells(section(text, "### Table 2"), "cifar10", "exp", "100", "IB")[4] == "78.17 ± 0.57 (authors)"


def test_one_seed_is_no_verdict_and_a_wide_spread_names_the_seeds_that_would_decide(write_record, tmp_path, capsys):
    write_record(CE, 60.0, 59.0)
    for seed, best in enumerate([76.0, 78.0, 80.0]):
        write_record(dataclasses.replace(IB, seed=seed), best, best)
    table = section(written(tmp_path, capsys), "### Table 4")
    row = cells(table, "cifar10", "exp", "100", "CE")
    assert (row[8], row[11]) == ("one seed", "one seed")
    wanted = next(n for n in range(3, 99) if stats.t.ppf(0.95, n - 1) * 2 / n**0.5 < 1 - 0.26)
    assert cells(table, "cifar10", "exp", "100", "IB")[8] == f"not known ({wanted} seeds would just decide)"


def test_the_margin_is_an_option(write_record, tmp_path, capsys):
    for seed, best in enumerate([76.2, 76.3, 76.4]):
        write_record(dataclasses.replace(IB, seed=seed), best, best)
    text = written(tmp_path, capsys, "--margin", "3")
    assert cells(section(text, "### Table 4"), "cifar10", "exp", "100", "IB")[8] == "agrees"
    assert "inside ± 3" in text


def test_the_class_mean_of_the_validation_images_has_a_column(tmp_path, capsys):
    record = record_of(CE, 70.0, 60.0)
    for i, epoch in enumerate(record["history"]):
        epoch["val"] = {"class_mean": 50.0 + (i >= 180), "acc1": 99.0, "loss": 1.0, "seen": 5}
    (tmp_path / "one.json").write_text(json.dumps(record))
    text = written(tmp_path, capsys)
    heads, line = cells(text, "method"), cells(text[text.index("## CIFAR-10") :], "CE", "1")
    assert dict(zip(heads, line, strict=True))["validation class mean, plateau"] == "51.00"


def test_the_gain_over_ce_is_judged_seed_by_seed(write_record, tmp_path, capsys):
    for seed, ce in enumerate([70.0, 72.0, 74.0]):
        write_record(dataclasses.replace(CE, seed=seed), ce, ce)
        write_record(dataclasses.replace(IB, seed=seed), ce + 7.3 + seed / 10, ce + 4.0 + seed / 10)
    text = section(written(tmp_path, capsys), "### Table 4")
    row = cells(text, "cifar10", "exp", "100", "IB minus CE")
    assert row[4:] == ["+7.39", "3", "+7.40 ± 0.10", "agrees", "+4.10 ± 0.10", "lower", "+4.10 ± 0.10"]


def test_the_gain_is_over_the_ce_with_the_same_lr(write_record, tmp_path, capsys):
    for variant, ce, ib in (("", 40.0, 43.0), ("paper-lr", 41.0, 42.0)):
        write_record(Run("tinyimagenet", "exp", 100, "CE", variant), ce, ce)
        write_record(Run("tinyimagenet", "exp", 100, "IB", variant), ib, ib)
    table = section(written(tmp_path, capsys), "### Table 5")
    for row, gain in (("IB minus CE", "+3.00"), ("IB (paper-lr) minus CE", "+1.00")):
        assert cells(table, "tinyimagenet", "exp", "100", row)[6] == gain


def test_rows_of_other_images_or_another_precision_are_not_compared(write_record, tmp_path, capsys):
    for method, subset in itertools.product(("CE", "IB", "BS"), (0, 1)):
        write_record(Run("cifar10", "exp", 100, method, subset=subset), 70.0, 70.0)
    write_record(Run("cifar10", "exp", 100, "LA"), 70.0, 70.0, amp="bf16")
    text = section(written(tmp_path, capsys, "--all_pairs"), "## CIFAR-10")
    compared = {line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if " minus " in line}
    of_subset = {
        f"{one}, subset 1 minus {other}, subset 1" for one, other in (("IB", "CE"), ("BS", "CE"), ("BS", "IB"))
    }
    assert compared == {"IB minus CE", "BS minus CE", "BS minus IB", *of_subset}


def test_a_row_of_another_first_phase_is_marked_and_not_compared(write_record, tmp_path, capsys):
    write_record(CE, 70.0, 70.0)
    write_record(IB, 78.0, 78.0)
    write_record(Run("cifar10", "exp", 100, "IB+CB"), 79.0, 79.0, first=30.0)
    text = section(written(tmp_path, capsys), "## CIFAR-10")
    assert [cells(text, name)[-1] for name in ("CE", "IB", "IB+CB")] == ["A", "A", "B"]
    assert "| IB minus CE |" in text
    assert "IB+CB minus" not in text


def test_figures_of_another_experiment_are_shown_and_not_judged(write_record, tmp_path, capsys):
    for seed in (0, 1):
        for method in ("IB", "CB", "Focal"):
            write_record(Run("cifar10", "exp", 100, method, seed=seed), 70.0 + seed, 70.0 + seed)
    text = written(tmp_path, capsys)
    table_4 = section(text, "### Table 4")
    for method, published in {"CB": "74.57 (CB paper)", "Focal": "70.38 (CB paper)"}.items():
        row = cells(table_4, "cifar10", "exp", "100", method)
        assert (row[4], row[5], row[6], row[8]) == (published, "2", "70.50 ± 0.71", "not judged")
    assert "beta and gamma were searched" in table_4
    row = cells(section(text, "### Independent"), "cifar10", "exp", "100", "IB")
    assert (row[4], row[6:9]) == ("76.66 (BagofTricks-LT)", ["70.50 ± 0.71", "-6.16", "not judged"])


def test_table_3_has_our_classes_under_the_papers(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "step", 50, "IB"), 81.0, 80.5)
    rows = section(written(tmp_path, capsys), "### Table 3").splitlines()
    (at,) = [i for i, row in enumerate(rows) if row.startswith("| step | IB | published")]
    assert rows[at].endswith("| 94.0 | 97.7 | 86.7 | 83.2 | 93.8 | 56.9 | 71.0 | 75.1 | 76.5 | 81.7 | 81.66 |")
    for row, when, mean in ((rows[at + 1], "best", "81.00"), (rows[at + 2], "last", "80.50")):
        per_class = " | ".join(f"{value:.1f}" for value in SOURCE[when]["per_class"])
        assert row == f"|  |  | ours, {when} (n = 1) | {per_class} | {mean} |"
    write_record(Run("cifar10", "step", 50, "CE"), 81.0, 80.5, amp="bf16")
    assert "|  | CE, but amp bf16 | ours, best (n = 1) |" in section(written(tmp_path, capsys), "### Table 3")


# ------------------------------------------------------------------- which record may stand beside which figure

TINY, INAT = Run("tinyimagenet", "exp", 100, "IB"), Run("inaturalist", "none", 1, "IB")


def test_another_precision_is_a_labelled_row_without_a_verdict(write_record, tmp_path, capsys):
    for seed in (0, 1):
        write_record(dataclasses.replace(IB, seed=seed), 78.0 + seed, 78.0 + seed)
        bf16 = 77.5 + 1.1 * seed
        write_record(dataclasses.replace(IB, seed=seed), bf16, bf16, name=f"bf16_{seed}", first=11.0, amp="bf16")
    text = written(tmp_path, capsys)
    row = cells(section(text, "### Table 4"), "cifar10", "exp", "100", "IB, but amp bf16")
    assert (row[6], row[8]) == ("78.05 ± 0.78", "not judged")
    assert cells(text, "IB, but amp bf16 minus IB")[1:4] == ["2", "-0.45 ± 0.07", "-0.45 ± 0.07"]


CIFAR_TABLE = "## CIFAR-10, exponential imbalance, ratio 100, "
#: (run, settings that differ, heading of its table, its row): the first three were once taken for the paper's runs.
OTHERS = [
    (IB, {"pretrained": "X"}, CIFAR_TABLE + "full length", "IB, but pretrained X"),
    (TINY, {"image_size": 32, "pretrained": None, "crop": "padded"}, "## Tiny ImageNet, exponential imbalance",
     "IB, but crop padded, image_size 32, pretrained None"),
    (INAT, {"batch_size": 8, "image_size": 32}, "## iNaturalist 2018", "IB, but batch_size 8, image_size 32"),
    (Run("cifar10", "exp", 100, "IB", protocol="short"), {}, CIFAR_TABLE + "short length", "IB"),
    (IB, {"alpha": 10.0}, CIFAR_TABLE + "full length", "IB, but alpha 10.0"),
    (IB, {"epochs": 150}, CIFAR_TABLE + "150 epochs", "IB, but epochs 150"),
    (Run("cifar10", "exp", 100, "IB", subset=3), {}, CIFAR_TABLE + "full length", "IB, subset 3"),
]  # fmt: skip


@pytest.mark.parametrize(("run", "settings", "heading", "label"), OTHERS)
def test_other_lengths_settings_and_subsets_have_tables_of_their_own(
    run, settings, heading, label, write_record, tmp_path, capsys
):
    write_record(run, 70.0, 70.0, **settings)
    text = written(tmp_path, capsys)
    assert "### Table" not in text
    assert cells(section(text, heading), label)[1] == "1"


def test_what_all_rows_of_a_table_share_is_said_once(write_record, tmp_path, capsys):
    for run, more in ((CE, {}), (IB, {"alpha": 10.0})):
        write_record(run, 70.0, 70.0, epochs=150, amp="bf16", **more)
    text = section(written(tmp_path, capsys), "## CIFAR-10, exponential imbalance, ratio 100, 150 epochs")
    assert "All of these: amp bf16, epochs 150." in text
    assert cells(text, "CE")[1] == cells(text, "IB, but alpha 10.0")[1] == "1"
    assert cells(text, "IB, but alpha 10.0 minus CE")[1] == "1"


def test_methods_that_share_a_setting_are_compared_as_ever(write_record, tmp_path, capsys):
    """Six rows, too many for all pairs unasked: each against CE and IB, whether in float32 or all in bf16."""
    for method in ("CE", "IB", "IB+CB", "IB+Focal", "BS", "LA"):
        write_record(dataclasses.replace(CE, method=method), 70.0, 70.0, amp="bf16")
    for flags, pairs in (([], 9), (["--all_pairs"], 15)):
        text = section(written(tmp_path, capsys, *flags), "## CIFAR-10, exponential")
        assert text.count(" minus ") == pairs


def test_first_phases_are_told_apart_beside_a_method_without_one_and_in_rounded_figures(write_record, tmp_path, capsys):
    write_record(dataclasses.replace(CE, method="LDAM"), 70.0, 70.0)
    write_record(CE, 70.0, 70.0)
    for method, first in (("IB", 10.0), ("IB+CB", 20.0), ("IB+Focal", 10.00001)):
        record = record_of(dataclasses.replace(CE, method=method), 70.0, 70.0, first=first)
        (tmp_path / f"{method}.json").write_text(json.dumps(record))
    text = section(written(tmp_path, capsys), "## CIFAR-10, exponential")
    letters = {name: cells(text, name)[-1] for name in ("LDAM", "CE", "IB", "IB+CB", "IB+Focal")}
    assert letters == {"LDAM": "", "CE": "A", "IB": "A", "IB+CB": "B", "IB+Focal": "A"}
    assert "IB+CB minus CE" not in text
    assert "IB+Focal minus CE" in text


def changed(name, value):
    """Another value that the setting may have."""
    choices = FIELDS[name].metadata["argparse"].get("choices")
    if name == "dataset":
        return "cifar100" if value == "cifar10" else "cifar10"
    if name in ("arch", "pretrained", "train_list", "val_list"):
        return "other"
    if name in ("mean", "std"):
        return [0.4, 0.5, 0.6]
    if name == "flip":  # auto: on for these
        return "off"
    if choices:
        return next(choice for choice in choices if choice not in (value, "auto"))
    if name in ("milestones", "lr_factors"):
        return [item + 1 if name == "milestones" else item / 2 for item in value]
    if name == "image_size":
        return 32
    if isinstance(value, bool):
        return not value
    return {
        "num_classes": 7,
        "imb_factor": 0.03,
        "val_fraction": 0.5,
        "test_fraction": 0.5,
        "beta": 0.9,
        "ema": 0.9,
    }.get(name, value + 1 if isinstance(value, (int, float)) else None)


#: Runs of which every setting counts for one at least.
BASES = [
    IB, TINY, INAT, CE, Run("cifar10", "exp", 100, "IB", "start000"), Run("cifar100", "step", 10, "LDAM-DRW"),
    Run("cifar10", "exp", 50, "IB+CB"), Run("cifar10", "exp", 50, "Focal"), Run("cifar10", "exp", 100, "LA"),
    Run("cifar100", "exp", 100, "VS"), Run("cifar100", "exp", 100, "CE+DRS"),
]  # fmt: skip
#: The number of classes follows from the data set, and scripts refuse another.
EXEMPT = {"num_classes"}


def test_every_changed_setting_keeps_a_record_out_of_the_row_unless_it_changes_nothing():
    found_out = set()
    for base in BASES:
        own = recorded(records.command_settings(base))
        for name in fields_affecting("data", "model", "start", "schedule", "optimizer", "numerics"):
            value = changed(name, own.get(name, FIELDS[name].default))
            record = {**own, name: value}
            run, difference = records.describe(record)
            if (run, difference) == (dataclasses.replace(base, seed=0), ()):
                if name in EXEMPT or (name == "imb_factor" and own["imb_type"] == "none"):
                    continue
                before, after = from_record(own), from_record(record)
                assert name in fields_affecting("schedule"), f"{base.title}: {name} {value} goes unnoticed"
                assert [plan(before, e) for e in range(0, before.epochs, 9)] == [
                    plan(after, e) for e in range(0, after.epochs, 9)
                ]
                continue
            found_out.add(name)
            assert run != base or name in [setting for setting, _ in difference]
    assert found_out >= set(fields_affecting("data", "model", "start", "schedule", "optimizer", "numerics")) - EXEMPT


def runs_of_every_kind():
    """All tables but the other ratios of Table 4, the figures, the controls."""
    found = [run for table in (1, 2, 5, 6) for run in runs.cells_of_table(table)]
    found += [run for run in runs.cells_of_table(4) if (run.dataset, run.ratio) == ("cifar10", 100)]
    found += runs.cells_of_figure(2) + runs.cells_of_figure(3)
    found += runs.controls(runs.CONTROLS, [CE, Run("digits", "exp", 100, "CE")])
    return runs.spread_over(dict.fromkeys(found), [3], [1], "full") + runs.spread_over(found[::5], [0], [0], "short")


def test_settings_lead_back_to_the_run():
    for run in runs_of_every_kind():
        own = json.loads(json.dumps(recorded(records.command_settings(run))))
        assert records.describe(own) == (run, ())


def test_settings_that_are_newer_than_a_record_count_as_they_were_then():
    own = recorded(records.command_settings(IB))
    old = {
        name: value for name, value in own.items() if name not in ("flip", "auto_target", "schedule", "tf32", "vs_tau")
    }
    assert records.describe(old) == (IB, ())
    digits = recorded(records.command_settings(Run("digits", "exp", 100, "CE")))
    assert records.describe(digits)[1] == ()
    del digits["flip"]  # digits were mirrored then
    assert records.describe(digits)[1] == (("flip", "on"),)


def whole_record(run, **values):
    return {"settings": recorded(records.command_settings(run)), "class_counts": counts_of(run), **values}


def test_the_whole_data_sets_are_the_papers():
    for run in (*BASES, Run("digits", "exp", 100, "IB"), Run("cifar10", "none", 1, "CE")):
        assert records.identify(whole_record(run)) == (run, ())
        assert records.identify(whole_record(run, test_images=run.setup.test_images)) == (run, ())


#: What a record says -> why it does not stand beside the paper.
NOT_THE_PAPERS = {
    "a piece of Tiny ImageNet": (TINY, {"class_counts": [10] * 200}, "data 2000 training images of 200 classes"),
    "a part of iNaturalist": (INAT, {"class_counts": [5] * 8142}, "data 40710 training images of 8142 classes"),
    "a part of the test images": (IB, {"test_images": 600}, "data 600 test images"),
    "forced": (IB, {"forced": ["other images"]}, "IB, but --force other images"),
}


@pytest.mark.parametrize("kind", NOT_THE_PAPERS)
def test_other_data_and_force_keep_a_record_from_the_published_cell(kind, tmp_path, capsys):
    run, values, label = NOT_THE_PAPERS[kind]
    (tmp_path / "record.json").write_text(json.dumps({**record_of(run, 50.0, 50.0), **values}))
    text = written(tmp_path, capsys)
    assert label in text
    assert "(authors)" not in text


def test_batch_norm_over_a_part_of_each_batch_is_a_labelled_row_without_a_verdict(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0, processes=4)
    table = section(written(tmp_path, capsys), "### Table 4")
    assert cells(table, "cifar10", "exp", "100", "IB, but processes 4")[8] == "not judged"
    parts = [{"from_epoch": 0, "processes": 4}, {"from_epoch": 150, "processes": 1}]
    assert records.identify(whole_record(IB, trained_on=parts))[1] == (("processes", "4"),)
    assert records.identify(
        whole_record(IB) | {"settings": {**recorded(records.command_settings(IB)), "processes": 4, "sync_bn": True}}
    )[1] == (("sync_bn", "True"),)


# ------------------------------------------------------------------------------------------- own methods and data


def test_an_own_rule_on_the_papers_data_has_a_row_of_its_own(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "exp", 100, "BS+Resample"), 70.0, 70.0)
    text = written(tmp_path, capsys)
    assert cells(section(text, "## CIFAR-10"), "BS+Resample")[1] == "1"
    assert "Left out" not in text


def test_an_own_data_set_has_a_table_with_its_methods_and_their_settings(write_record, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(
        runs.OWN_SETUPS, "leaves", dataclasses.replace(runs.CIFAR, script="folder_train.py", arch="resnet18")
    )
    for seed in (0, 1):
        for method, accuracy in {"CE": 60.0, "BS": 65.0, "CE+cRT": 66.0}.items():
            run = Run("leaves", "none", 1, method, seed=seed)
            write_record(run, accuracy + seed, accuracy + seed / 2, macro_f1=50.0 + seed)
        write_record(Run("leaves", "none", 1, "BS", seed=seed), 70.0, 70.0, name=f"large{seed}", lr=0.01)
    monkeypatch.delitem(runs.OWN_SETUPS, "leaves")  # report is another process
    text = section(written(tmp_path, capsys), "## leaves, as the data are")
    assert [cells(text, name)[1] for name in ("CE", "BS", "BS, but lr 0.01", "CE+cRT")] == ["2"] * 4
    heads = cells(text, "method")
    assert heads[5] == "class mean, plateau"
    assert cells(text, "CE")[heads.index("macro-F1, plateau")] == "50.50 ± 0.71"
    assert cells(text, "BS minus CE")[1:4] == ["2", "+5.00 ± 0.00", "+5.00 ± 0.00"]
    assert "difference of class mean" in text


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_plain_ib_of_own_data_is_called_so_whatever_the_order_and_number(names, write_record, tmp_path, capsys):
    """A constant makes another method, even if most rows have it; one that is not in force is not named."""
    setup = dataclasses.replace(runs.CIFAR, script="folder_train.py", arch="resnet18")
    with mock.patch.dict(runs.OWN_SETUPS, leaves=setup):
        run = Run("leaves", "none", 1, "IB")
        write_record(run, 60.0, 60.0, name=names[0])
        for seed in range(3):
            detached = dataclasses.replace(run, seed=seed, variant="detached")
            write_record(detached, 61.0, 61.0 + seed, name=f"{names[1]}{seed}")
        write_record(Run("leaves", "none", 1, "CE"), 59.0, 59.0, alpha=5.0)
        write_record(dataclasses.replace(run, seed=7), 62.0, 62.0, name="auto", alpha="auto", auto_target="gradient")
    text = section(written(tmp_path, capsys), "## leaves, as the data are")
    assert [cells(text, name)[1] for name in ("CE", "IB", "IB, but alpha auto", "IB, but detach_ib True")] == [*"1113"]


def test_crt_is_compared_with_the_ce_whose_last_epoch_it_has_trained_again():
    ce, crt = (record_of(run, 60.0, 60.0, 60.0) for run in (CE, Run("cifar10", "exp", 100, "CE+cRT")))
    for record, top1 in ((ce, 60.0), (crt, 60.5)):
        record["history"][199]["test"]["acc1"] = top1
    assert share_first_phase(ce, crt)
    crt["history"][198]["test"]["acc1"] = 61.0
    assert not share_first_phase(ce, crt)


# ---------------------------------------------------------------------------------------- damaged and doubled


def test_incomplete_and_foreign_files_are_named_and_left_out(write_record, tmp_path, capsys):
    names = ["cut.json", "unfinished.json", "without.json", "wrong.json", "good.json"]
    for seed, name in enumerate(names):
        write_record(dataclasses.replace(IB, seed=seed), 78.0 + seed, 78.0, name=name.removesuffix(".json"))
    contents = {name: json.loads((tmp_path / name).read_text()) for name in names}
    (tmp_path / "cut.json").write_bytes((tmp_path / "cut.json").read_bytes()[:5000])
    contents["unfinished.json"]["epochs_done"] = 7
    contents["without.json"] = {n: v for n, v in contents["without.json"].items() if n not in ("best", "class_counts")}
    contents["wrong.json"]["settings"]["loss_type"] = "XX"
    for name in names[1:]:
        (tmp_path / name).write_text(json.dumps(contents[name]))
    (tmp_path / "list.json").write_text("[1, 2]")
    reproduce.main(["report", str(tmp_path)])
    err = capsys.readouterr().err
    text = (tmp_path / "report.md").read_text()
    expected = {
        "cut.json": "damaged or cut short", "unfinished.json": "unfinished, 7 of 200 epochs",
        "without.json": "lacks best, class_counts", "wrong.json": "loss_type is 'XX'",
    }  # fmt: skip
    for name, reason in expected.items():
        assert f"- {tmp_path / name}: {reason}\n" in section(text + "\n#", "## Left out")
        assert f"warning: left out: {tmp_path / name}: {reason}\n" in err
    assert cells(text, "cifar10", "exp", "100", "IB", "78.26 (authors)")[5:7] == ["1", "82.00"]


def test_two_runs_of_one_seed_are_left_out_and_one_found_twice_counts_once(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0)
    write_record(IB, 90.0, 90.0, name="zz_other")
    write_record(CE, 70.0, 70.0)
    write_record(CE, 70.0, 70.0, name="log_of_the_same")
    text = written(tmp_path, capsys)
    one, other = tmp_path / f"{IB.name}.json", tmp_path / "zz_other.json"
    assert f"- {one} and {other}: different runs of one seed" in text
    table = section(text, "### Table 4")
    assert cells(table, "cifar10", "exp", "100", "IB")[5] == ""
    assert cells(table, "cifar10", "exp", "100", "CE")[5] == "1"


def test_a_folder_without_records_and_no_folder(tmp_path):
    (tmp_path / "args.json").write_text("{}")
    for folder, line in ((tmp_path, "no record of a run in"), (tmp_path / "none", "no folder")):
        argv = ["report", folder, "--to", tmp_path / "to"]
        err = refused(argv, tmp_path, status=1, run=run_reproduce)
        assert err == f"reproduce.py: error: {line} {folder}"


# ------------------------------------------------------------------------------------- runs, pairs and figures


def test_runs_are_shown_with_commit_precision_hours_and_command(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0)
    write_record(CE, 70.0, 70.0, amp="bf16")
    text = section(written(tmp_path, capsys) + "\n#", "## The runs")
    assert cells(text, IB.name)[1:] == ["0", "float32", "cpu, all threads, Linux x86_64, 2 cores", "2.00", "0123456789"]
    assert cells(text, CE.name)[2] == "bf16"
    assert "python " + " ".join(IB.argv("reproduced")) in text
    assert " ".join(CE.argv("reproduced")) not in text, "that command would give another run"


def test_a_run_of_several_machines_names_each_with_its_epochs(tmp_path, capsys):
    record = record_of(IB, 78.0, 77.0)
    code = [{"commit": name * 40, "clean": True} for name in "ab"]
    parts = [(100, "NVIDIA H200", code[0]), (134, "cpu", code[0]), (150, "cpu", code[1])]
    record["trained_on"] = [
        {"from_epoch": start, "device": device, "code": code, "processes": 1, "versions": {"tf32": tf32}}
        for (start, device, code), tf32 in zip(parts, ["on", "off", "off"], strict=True)
    ]
    (tmp_path / "record.json").write_text(json.dumps(record))
    row = cells(section(written(tmp_path, capsys), "## The runs"), IB.name)
    assert row[3].startswith("not recorded (100 epochs), then NVIDIA H200 (34 epochs), then cpu (66 epochs), ")
    assert row[2] == "TF32", "in a part of the epochs"
    assert row[5] == "not recorded (100 epochs), then aaaaaaaaaa (50 epochs), then bbbbbbbbbb (50 epochs)"


def test_any_two_methods_are_compared_by_seed_with_holms_p(write_record, tmp_path, capsys):
    ib, ce, bs = [80.0, 81.0, 79.0], [70.0, 70.5, 69.5], [79.9, 81.1, 79.05]
    for seed in range(3):
        for method, values in {"IB": ib, "CE": ce, "BS": bs}.items():
            write_record(Run("cifar10", "exp", 100, method, seed=seed), values[seed], values[seed])
    text = written(tmp_path, capsys)
    differences = [one - other for one, other in zip(ib, ce, strict=True)]
    half = 4.3027 * statistics.stdev(differences) / 3**0.5
    p = float(stats.ttest_rel(ib, ce).pvalue)
    interval = f"{10 - half:+.2f} to {10 + half:+.2f}"
    expected = ["3", "+10.00 ± 0.50", "+10.00 ± 0.50", interval, f"{2 * p:.3f}", "adds"]  # BS minus CE has the lower p
    assert cells(text, "IB minus CE")[1:] == expected
    assert cells(text, "BS minus IB")[-1] == "equal within ±0.5"


def test_csv_and_latex_have_the_figures_of_the_report(write_record, tmp_path, capsys):
    for seed, best in enumerate([70.0, 71.0]):
        write_record(Run("cifar10", "exp", 100, "IB", "weights-only", seed=seed), best, best - 1)
    reproduce.main(["report", str(tmp_path), "--csv", "--latex"])
    assert "report.csv" in capsys.readouterr().out
    (row,) = csv.DictReader((tmp_path / "report.csv").read_text().splitlines())
    assert (row["method"], row["n"], row["length"]) == ("IB (weights-only)", "2", "full")
    assert [row[f"{when}_acc1"] for when in ("best", "plateau", "last")] == ["70.5000", "69.5000", "69.5000"]
    assert row["plateau_acc1_sd"] == "0.7071"
    latex = (tmp_path / "report.tex").read_text()
    assert r"IB (weights-only) & 2 & 70.50 $\pm$ 0.71 & 69.50 $\pm$ 0.71 & 69.50 $\pm$ 0.71 &" in latex
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") == 1


def test_of_equally_good_epochs_the_first_is_the_best():
    scores = [50.0, 70.0, 60.0, 70.0]
    assert best_epoch([{"epoch": epoch, "score": score} for epoch, score in enumerate(scores)])["epoch"] == 1


def test_only_epochs_with_the_validation_set_of_the_last_one_may_be_the_best():
    """A fork may bring other left-out images, or none."""
    sets = [None, {"seen": 20}, {"seen": 20}, {"seen": 50}, None]
    history = [{"epoch": epoch, "score": 90.0 - epoch, "val": val} for epoch, val in enumerate(sets)]
    assert [best_epoch(history[:n])["epoch"] for n in (1, 2, 3, 4, 5)] == [0, 1, 1, 3, 0]


def test_the_plateau_is_the_mean_of_the_last_tenth():
    record = record_of(IB, 78.0, 77.0)
    for i, epoch in enumerate(record["history"]):
        epoch["test"]["acc1"] = float(i % 100)
    assert plateau(record["history"])["acc1"] == statistics.fmean(range(80, 100))
    assert plateau(record["history"][100:])["epochs"] == 20, "of a run whose checkpoint had no history"
    crt = record_of(Run("cifar10", "exp", 100, "CE+cRT"), 60.0, 66.0)
    assert len(crt["history"]) == 210
    for epoch in crt["history"][200:]:
        epoch["test"]["acc1"] = 90.0
    assert plateau(crt["history"])["acc1"] == 90.0, "the ten epochs of the new head, not one of CE"


def test_figure_3_takes_the_starts_of_plain_ib_only(write_record, tmp_path):
    for variant, best in {"": 70.0, "start020": 60.0, "detached": 50.0}.items():
        write_record(Run("cifar10", "exp", 10, "IB", variant, protocol="short"), best, best)
    rows, left_out = group(records.read(tmp_path)[0])
    assert left_out == []
    assert figures.starts(rows, "cifar10", "short") == {10: [(4, [60.0]), (20, [70.0])]}


def test_a_figure_has_four_methods_at_most_with_names_a_reader_knows(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(style, "save", lambda figure, to, name: kept.update({name: figure}) or pathlib.Path(name))
    methods = [("CE", ""), ("IB", ""), ("IB+CB", ""), ("IB+Focal", ""), ("BS", ""), ("LA", "")]
    methods += [("IB", "l1-auto"), ("IB", "weights-only"), ("IB", "weights-at-ib"), ("IB", "detached")]
    rows = {
        Row(Run("cifar10", "exp", 100, method, variant)): [record_of(IB, 78.0, 78.0), record_of(IB, 77.0, 77.0)]
        for method, variant in methods
    }
    captions = figures.draw(rows, tmp_path)
    assert list(kept) == [
        "methods_cifar10_exp_100_full", "methods_cifar10_exp_100_full_2",
        "controls_cifar10_exp_100_full", "controls_cifar10_exp_100_full_2",
    ]  # fmt: skip
    looks = {}
    for name, figure in kept.items():
        above, below = figure.axes
        handles, labels = above.get_legend_handles_labels()
        assert 2 <= len(labels) <= 4
        assert not {"l1-auto", "weights-only", "weights-at-ib"} & {part for text in labels for part in text.split()}
        for handle, text in zip(handles, labels, strict=True):
            assert looks.setdefault(text, handle.get_color()) == handle.get_color(), "one colour in every figure"
        switch = any(list(line.get_xdata()) == [100.5, 100.5] for line in above.get_lines())
        assert switch == (name != "methods_cifar10_exp_100_full_2"), "BS and LA have one phase"
        assert below.get_xticklabels()[0].get_text() == "airplane (5000)"
        assert figure.get_figwidth() == 3.3
    above, below = kept["methods_cifar10_exp_100_full"].axes
    epochs, accuracy = above.get_lines()[0].get_data()
    assert (epochs[0], epochs[-1]) == (99, 200)
    assert (accuracy[0], accuracy[-1]) == (10, 77.5), "the mean over the seeds"
    sizes, per_class = below.get_lines()[0].get_data()
    assert list(sizes) == counts_of(IB)
    assert list(per_class) == pytest.approx(SOURCE["last"]["per_class"])
    first = captions[pathlib.Path("methods_cifar10_exp_100_full")]
    assert "band: ± one sample standard deviation" in first
    assert "published (CE 70.87, IB 78.26" in first


def test_many_rows_of_plain_ib_fill_panels_and_are_told_apart(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(style, "save", lambda figure, to, name: kept.update({name: figure}) or pathlib.Path(name))
    rows = {Row(dataclasses.replace(IB, subset=subset)): [record_of(IB, 78.0, 78.0)] for subset in range(5)}
    figures.draw(rows, tmp_path)
    labels = [figure.axes[0].get_legend_handles_labels()[1] for figure in kept.values()]
    assert labels == [["IB", "IB, subset 1", "IB, subset 2", "IB, subset 3"], ["IB", "IB, subset 4"]]


def test_no_two_methods_look_alike():
    looks = [look[1:] for look in style.METHODS.values()] + style.OTHERS
    assert len(set(looks)) == len(looks)
    assert {(name, "") for name in runs.METHODS} <= style.METHODS.keys()


def test_a_hundred_classes_are_drawn_as_groups(tmp_path, monkeypatch):
    kept = {}
    monkeypatch.setattr(style, "save", lambda figure, to, name: kept.update({name: figure}) or pathlib.Path(name))
    rows, _ = group(records.read(RESULTS / "cifar100_lt100")[0])
    figures.draw(rows, tmp_path)
    _, below = kept["methods_cifar100_exp_100_full"].axes
    assert [text.get_text() for text in below.get_xticklabels()] == [
        "many\n35 classes", "medium\n35 classes", "few\n30 classes",
    ]  # fmt: skip
    few = {row.run.method: plateau(found[0]["history"])["few"] for row, found in rows.items()}
    assert [bar.get_height() for bar in below.patches[2::3]] == pytest.approx(list(few.values()))


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/report.md")), ids=lambda p: p.name)
def test_the_committed_reports_are_those_of_the_committed_records(folder, tmp_path, monkeypatch):
    def touch(figure, to, name):
        path = pathlib.Path(to) / f"{name}.png"
        path.touch()
        return path

    monkeypatch.setattr(style, "save", touch)
    if (folder / "figure2.json").exists():
        (tmp_path / "figure2.json").write_bytes((folder / "figure2.json").read_bytes())
    report.write([folder], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text == (folder / "report.md").read_text()
    assert "Left out" not in text
    images = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert all((folder / name).exists() and (folder / name).with_suffix(".pdf").exists() for name in images)
