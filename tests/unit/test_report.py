"""reproduce.py report: the figures of known records, what is set against what, and what is left out."""

import collections
import copy
import dataclasses
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

import pytest

import reproduce
from experiment import plots
from experiment.resume import plan
from experiment.settings import FIELDS, fields_affecting, from_record, recorded
from imbalance import class_counts
from paper import figures, records, report, runs
from paper import statistics as rule
from paper.rows import Row, group
from paper.runs import Run
from training.recipe import Recipe

RESULTS = pathlib.Path(__file__).parent.parent.parent / "results"
SOURCE = json.loads(
    next((RESULTS / "cifar10_lt100_short").glob("*_IB_IBReweight_exp_0.01_short/summary.json")).read_text()
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


def record_of(run, best, last, **settings):
    """A complete record of a Run with these accuracies, its settings those of its command, but for `settings`."""
    record = copy.deepcopy(SOURCE)
    record["settings"] = {**recorded(records.command_settings(run)), "num_classes": 10, **settings}
    record["name"] = run.name
    record["epochs_done"] = record["settings"]["epochs"]
    record["history"] = [copy.deepcopy(record["history"][0]) for _ in range(record["epochs_done"])]
    record["class_counts"] = counts_of(run)
    stages = Recipe.from_settings(from_record(record["settings"])).stages()
    for i, epoch in enumerate(record["history"]):
        accuracy = last if i == record["epochs_done"] - 1 else best
        epoch |= {"epoch": i, "seconds": 36.0, "stage": dataclasses.asdict(stages[i])}
        epoch["test"] |= {"acc1": accuracy, "class_mean": accuracy}
    for when, i in (("best", 0), ("last", -1)):
        epoch = record["history"][i]
        record[when] |= {"epoch": epoch["epoch"], **{name: epoch["test"][name] for name in records.TEST_FIGURES}}
    record["code"] = {"commit": "0123456789abcdef", "clean": True}
    return record


@pytest.fixture
def write_record(tmp_path):
    """A function that writes such a record."""

    def write(run, best, last, name=None, **settings):
        (tmp_path / f"{name or run.name}.json").write_text(json.dumps(record_of(run, best, last, **settings)))

    return write


def written(folder, capsys):
    reproduce.main(["report", str(folder)])
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


def test_full_runs_stand_beside_the_published_cell(write_record, tmp_path, capsys):
    best, last = [77.0, 78.5, 78.0], [76.0, 77.0, 78.0]
    for seed in range(3):
        write_record(dataclasses.replace(IB, seed=seed), best[seed], last[seed])
    text = written(tmp_path, capsys)
    table_2 = section(text, "### Table 2")
    row = cells(table_2, "cifar10", "exp", "100", "IB")
    limits = []
    for values in (best, last):  # their spread and the paper's ± 0.57, two degrees of freedom each
        spread = math.sqrt((2 * statistics.variance(values) + 2 * 0.57**2) / 4)
        limits.append(2.7764 * spread * math.sqrt(1 / 3 + 1 / 3))
    assert row[4:8] == ["78.17 ± 0.57 (authors)", "3", "77.83 ± 0.76", "-0.34"]
    assert row[8:] == ["77.00 ± 1.00", "-1.17", "77.00 ± 1.00", f"{limits[0]:.2f} / {limits[1]:.2f}", "no"]
    assert set(cells(table_2, "cifar10", "exp", "100", "IB (no-factor)")[5:]) == {""}, "blank where nothing was run"
    table_4 = section(text, "### Table 4")
    assert cells(table_4, "cifar10", "exp", "100", "IB")[4] == "78.26 (authors)"
    assert set(cells(table_4, "cifar10", "exp", "100", "CE")[5:]) == {""}
    assert "| cifar100 |" not in table_4, "only where something has run"
    assert 'Compared: 1. If nothing differed, at most 0.05 false "yes" were expected.' in table_4
    assert "best 0.67 (4 degrees of freedom)" in table_4


def test_without_two_seeds_of_anything_there_is_no_verdict(write_record, tmp_path, capsys):
    write_record(CE, 60.0, 59.0)
    text = written(tmp_path, capsys)
    row = cells(section(text, "### Table 4"), "cifar10", "exp", "100", "CE")
    assert row[5:8] == ["1", "60.00", "-10.87"]
    assert row[11:] == ["unknown", "?"]
    assert "no row has two seeds" in text


def test_one_run_is_judged_by_the_spread_of_the_others(write_record, tmp_path, capsys):
    write_record(CE, 60.0, 59.0)
    for seed, best in enumerate([78.0, 78.5, 78.2]):
        write_record(dataclasses.replace(IB, seed=seed), best, best)
    table = section(written(tmp_path, capsys), "### Table 4")
    assert cells(table, "cifar10", "exp", "100", "CE")[-1] == "yes"
    assert cells(table, "cifar10", "exp", "100", "IB")[-1] == "no"
    assert "Compared: 2." in table


def test_best_and_last_must_agree(write_record, tmp_path, capsys):
    for seed, best in enumerate([78.0, 78.5, 78.2]):
        write_record(dataclasses.replace(IB, seed=seed), best, best - 10)
    assert cells(section(written(tmp_path, capsys), "### Table 4"), "cifar10", "exp", "100", "IB")[-1] == "?"


def test_figures_of_another_experiment_are_shown_and_not_judged(write_record, tmp_path, capsys):
    for seed in (0, 1):
        for method in ("IB", "CB", "Focal"):
            write_record(Run("cifar10", "exp", 100, method, seed=seed), 70.0 + seed, 70.0 + seed)
    text = written(tmp_path, capsys)
    table_4 = section(text, "### Table 4")
    for method, published in {"CB": "74.57 (CB paper)", "Focal": "70.38 (CB paper)"}.items():
        row = cells(table_4, "cifar10", "exp", "100", method)
        assert (row[4], row[5], row[6], row[-1]) == (published, "2", "70.50 ± 0.71", "not judged")
    assert "beta and gamma were searched" in table_4
    independent = section(text, "### Independent")
    row = cells(independent, "cifar10", "exp", "100", "IB")
    assert (row[4], row[6:8], row[-1]) == ("76.66 (BagofTricks-LT)", ["70.50 ± 0.71", "-6.16"], "not judged")
    assert cells(independent, "cifar10", "exp", "100", "CE+DRW-IB")[4] == "74.82 (BagofTricks-LT)"


def test_table_3_has_our_classes_under_the_papers(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "step", 50, "IB"), 81.0, 80.5)
    rows = section(written(tmp_path, capsys), "### Table 3").splitlines()
    (at,) = [i for i, row in enumerate(rows) if row.startswith("| step | IB | published")]
    assert rows[at].endswith("| 94.0 | 97.7 | 86.7 | 83.2 | 93.8 | 56.9 | 71.0 | 75.1 | 76.5 | 81.7 | 81.66 |")
    for row, when, mean in ((rows[at + 1], "best", "81.00"), (rows[at + 2], "last", "80.50")):
        per_class = " | ".join(f"{value:.1f}" for value in SOURCE[when]["per_class"])
        assert row == f"|  |  | ours, {when} (n = 1) | {per_class} | {mean} |"


def test_table_5_has_a_row_for_each_lr(write_record, tmp_path, capsys):
    write_record(Run("tinyimagenet", "exp", 100, "IB"), 42.0, 41.0)
    write_record(Run("tinyimagenet", "exp", 100, "IB", "paper-lr"), 40.0, 39.0)
    table = section(written(tmp_path, capsys), "### Table 5")
    assert cells(table, "tinyimagenet", "exp", "100", "IB")[4:7] == ["42.65 (authors)", "1", "42.00"]
    assert cells(table, "tinyimagenet", "exp", "100", "IB (paper-lr)")[4:7] == ["42.65 (authors)", "1", "40.00"]


# ------------------------------------------------------------------- which record may stand beside which figure

TINY, INAT = Run("tinyimagenet", "exp", 100, "IB"), Run("inaturalist", "none", 1, "IB")
#: The records that were once taken for the paper's runs.
DOCTORED = [
    (IB, {"weight_decay": 0.0, "momentum": 0.0}),
    (IB, {"warmup_epochs": 0}),
    (IB, {"val_fraction": 0.5}),
    (IB, {"pretrained": "X"}),
    (TINY, {"image_size": 32, "pretrained": None, "crop": "padded"}),
    (INAT, {"batch_size": 8, "image_size": 32}),
    (IB, {"alpha": 10.0}),
    (IB, {"epochs": 150}),
]


@pytest.mark.parametrize(("run", "settings"), DOCTORED, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_doctored_records_are_kept_out_and_labelled(run, settings, write_record, tmp_path, capsys):
    write_record(run, 70.0, 70.0, **settings)
    text = written(tmp_path, capsys)
    assert "### Table" not in text
    label = ", ".join(f"{name} {settings[name]}" for name in sorted(settings))
    assert cells(text, f"IB, but {label}")[1] == "1"
    print(f"{run.dataset}: {label}: kept out, labelled")


def test_another_precision_is_a_labelled_row_without_a_verdict(write_record, tmp_path, capsys):
    for seed in (0, 1):
        write_record(dataclasses.replace(IB, seed=seed), 78.0 + seed, 78.0 + seed)
        write_record(dataclasses.replace(IB, seed=seed), 77.5 + seed, 77.5 + seed, name=f"bf16_{seed}", amp="bf16")
    text = written(tmp_path, capsys)
    table_4 = section(text, "### Table 4")
    assert cells(table_4, "cifar10", "exp", "100", "IB")[5:7] == ["2", "78.50 ± 0.71"]
    row = cells(table_4, "cifar10", "exp", "100", "IB, but amp bf16")
    assert (row[6], row[-1]) == ("78.00 ± 0.71", "not judged")
    assert "Compared: 1." in table_4, "and it adds nothing to the spread"
    assert cells(text, "IB minus IB, but amp bf16")[1:4] == ["2", "+0.50", "+0.50"]


def test_short_runs_other_settings_and_subsets_are_never_set_against_published_figures(write_record, tmp_path, capsys):
    write_record(Run("cifar10", "exp", 100, "IB", protocol="short"), 70.0, 70.0)
    write_record(Run("cifar10", "exp", 100, "IB", seed=1), 70.0, 70.0, alpha=10.0)
    write_record(Run("cifar10", "exp", 100, "IB", subset=3), 70.0, 70.0)
    text = written(tmp_path, capsys)
    assert "### Table" not in text
    assert "not to be set against published figures" in text
    assert cells(text, "IB, but alpha 10.0")[1] == "1"
    assert cells(text, "IB, subset 3")[1] == "1"


def changed(name, value):
    """Another value that the setting may have."""
    choices = FIELDS[name].metadata["argparse"].get("choices")
    if name == "dataset":
        return "cifar100" if value == "cifar10" else "cifar10"
    if name in ("arch", "pretrained", "train_list", "val_list"):
        return "other"
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
    return {"num_classes": 7, "imb_factor": 0.03, "val_fraction": 0.5, "test_fraction": 0.5, "beta": 0.9}.get(
        name, value + 1 if isinstance(value, (int, float)) else None
    )


#: Runs of which every setting counts for one at least.
BASES = [
    IB, TINY, INAT, CE, Run("cifar10", "exp", 100, "IB", "start000"), Run("cifar100", "step", 10, "LDAM-DRW"),
    Run("cifar10", "exp", 50, "IB+CB"), Run("cifar10", "exp", 50, "Focal"), Run("cifar10", "exp", 100, "LA"),
    Run("cifar100", "exp", 100, "VS"), Run("cifar100", "exp", 100, "CE+DRS"),
]  # fmt: skip
#: The number of classes follows from the data set, and scripts refuse another.
EXEMPT = {"num_classes"}


def test_every_changed_setting_keeps_a_record_out_of_the_row_unless_it_changes_nothing():
    kinds = collections.Counter()
    found_out = set()
    for base in BASES:
        own = recorded(records.command_settings(base))
        for name in fields_affecting("data", "model", "start", "schedule", "optimizer", "numerics"):
            value = changed(name, own.get(name, FIELDS[name].default))
            record = {**own, name: value}
            run, difference = records.describe(record)
            if (run, difference) == (dataclasses.replace(base, seed=0), ()):
                if name in EXEMPT:
                    kinds["exempt"] += 1
                    continue
                before, after = from_record(own), from_record(record)
                assert name in fields_affecting("schedule"), f"{base.title}: {name} {value} goes unnoticed"
                assert [plan(before, e) for e in range(0, before.epochs, 9)] == [
                    plan(after, e) for e in range(0, after.epochs, 9)
                ]
                kinds["changes nothing in any epoch"] += 1
                continue
            found_out.add(name)
            assert run != base or name in [setting for setting, _ in difference]
            kinds["labelled" if difference else "another run, or none of the paper"] += 1
    print(f"\n{sum(kinds.values())} records with one setting changed: {dict(kinds)}; {len(found_out)} settings")
    assert found_out >= set(fields_affecting("data", "model", "start", "schedule", "optimizer", "numerics")) - EXEMPT


def test_settings_that_affect_nothing_leave_a_record_where_it_is():
    for base in BASES:
        own = recorded(records.command_settings(base))
        for name in fields_affecting("rounding", "nothing"):
            value = changed(name, own[name]) if name in own and isinstance(own[name], (bool, int, float)) else None
            if value is not None:
                assert records.describe({**own, name: value}) == (dataclasses.replace(base, seed=own["seed"]), ())


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
    "other counts": (IB, {"class_counts": [50] * 10}, "data 500 training images of 10 classes"),
    "a part of the test images": (IB, {"test_images": 600}, "data 600 test images"),
    "forced": (
        IB,
        {"forced": ["other images"]},
        "IB, but --force other images",
    ),
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
    assert cells(table, "cifar10", "exp", "100", "IB, but processes 4")[-1] == "not judged"
    parts = [{"from_epoch": 0, "processes": 4}, {"from_epoch": 150, "processes": 1}]
    assert records.identify(whole_record(IB, trained_on=parts))[1] == (("processes", "4"),)
    assert records.identify(
        whole_record(IB) | {"settings": {**recorded(records.command_settings(IB)), "processes": 4, "sync_bn": True}}
    )[1] == (("sync_bn", "True"),)


def test_a_method_that_the_paper_does_not_have_is_named(write_record, tmp_path, capsys):
    write_record(IB, 70.0, 70.0, train_rule="Resample")
    assert f"- {IB.name}.json: a method or a data set that the paper does not have" in written(tmp_path, capsys)


# ---------------------------------------------------------------------------------------- damaged and doubled


def test_half_records_are_named_and_left_out(write_record, tmp_path, capsys):
    for seed in range(5):
        write_record(dataclasses.replace(IB, seed=seed), 78.0 + seed, 78.0)
    names = [f"{dataclasses.replace(IB, seed=seed).name}.json" for seed in range(5)]
    cut, unfinished, short, without = (tmp_path / name for name in names[:4])
    cut.write_bytes(cut.read_bytes()[:5000])
    content = json.loads(unfinished.read_text())
    unfinished.write_text(json.dumps({**content, "epochs_done": 7}))
    short.write_text(json.dumps({**json.loads(short.read_text()), "history": content["history"][:9]}))
    kept = {name: value for name, value in content.items() if name not in ("best", "class_counts")}
    without.write_text(json.dumps(kept))
    (tmp_path / "figure2.json").write_text("{}")
    reproduce.main(["report", str(tmp_path)])
    err = capsys.readouterr().err
    left_out = section((tmp_path / "report.md").read_text() + "\n#", "## Left out")
    expected = {
        names[0]: "damaged or cut short", names[1]: "unfinished, 7 of 200 epochs",
        names[2]: "cut short, 9 of 200 epochs", names[3]: "lacks best, class_counts",
    }  # fmt: skip
    for name, reason in expected.items():
        assert f"- {name}: {reason}" in left_out
        assert f"warning: left out: {name}: {reason}" in err
    assert left_out.count("\n- ") == 4
    assert cells((tmp_path / "report.md").read_text(), "cifar10", "exp", "100", "IB", "78.26 (authors)")[5] == "1"


def in_history(value, name="acc1"):
    return lambda record: record["history"][5]["test"].update({name: value})


def in_stage(**values):
    return lambda record: record["history"][5]["stage"].update(values)


#: What is done to a record -> what its line says.
CONTRADICTIONS = {
    "last of 200 %": (lambda r: r["last"].update(acc1=200.0), "last: acc1 200.0 is no accuracy from 0 to 100"),
    "negative": (in_history(-5.0), "epoch 5: acc1 -5.0 is no accuracy from 0 to 100"),
    "null": (in_history(None), "epoch 5: acc1 null is no accuracy from 0 to 100"),
    "NaN": (in_history(math.nan, "few"), "epoch 5: few NaN is no accuracy from 0 to 100"),
    "class of 101 %": (lambda r: r["best"].update(per_class=[101.0]), "best: per_class 101.0 is no accuracy"),
    "invented best": (lambda r: r["best"].update(acc1=99.99), "best is not what the history has for that epoch"),
    "best of no epoch": (lambda r: r["best"].update(epoch=900), "best is not what the history has for that epoch"),
    "best of a worse epoch": (in_history(79.5), "best is not the best epoch of the history"),
    "last of another epoch": (lambda r: r["last"].update(epoch=3), "last is not what the history has for that epoch"),
    "reversed": (lambda r: r["history"].reverse(), "the epochs of its history do not rise by one"),
    "an epoch twice": (lambda r: r["history"][7].update(epoch=6), "the epochs of its history do not rise by one"),
    "trained with --force": (in_stage(lr=0.5), "epoch 5: trained with lr 0.5, its settings say 0.1"),
    "another loss": (in_stage(loss="LDAM"), "epoch 5: trained with loss LDAM, its settings say CE"),
    "a number for what was forced": (lambda r: r.update(forced=3), "damaged: a part has another form"),
    "text for its machines": (lambda r: r.update(trained_on="H200"), "damaged: a part has another form"),
    "text for class counts": (lambda r: r.update(class_counts="many"), "damaged: a part has another form"),
    "text for epochs": (lambda r: r.update(epochs_done="all"), "damaged: a part has another form"),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_a_record_that_contradicts_itself_is_left_out_with_one_line(kind, tmp_path, capsys):
    change, reason = CONTRADICTIONS[kind]
    for seed in (0, 1):
        record = record_of(dataclasses.replace(IB, seed=seed), 78.0 + seed, 77.0)
        if seed:
            change(record)
        (tmp_path / f"{seed}.json").write_text(json.dumps(record))
    reproduce.main(["report", str(tmp_path)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: left out: 1.json: {reason}")
    text = (tmp_path / "report.md").read_text()
    assert f"- 1.json: {reason}" in section(text + "\n#", "## Left out")
    assert cells(text, "cifar10", "exp", "100", "IB", "78.26 (authors)")[5:7] == ["1", "78.00"]


def test_a_validation_part_may_pick_an_epoch_that_is_not_the_best_on_the_test_set(tmp_path):
    record = record_of(IB, 78.0, 77.0, val_fraction=0.5)
    in_history(79.0)(record)
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert records.load(tmp_path / "record.json") == record


def test_files_that_are_no_records_at_all_are_named_without_waiting_for_a_pipe(write_record, tmp_path):
    write_record(IB, 78.0, 78.0, name="good")
    (tmp_path / "list.json").write_text("[1,2]")
    (tmp_path / "deep.json").write_text("[" * 200_000)
    os.mkfifo(tmp_path / "pipe.json")
    command = [sys.executable, "reproduce.py", "report", str(tmp_path)]  # a process, so that one that hangs ends
    done = subprocess.run(command, cwd=RESULTS.parent, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "warning: left out: deep.json: damaged or cut short",
        "warning: left out: list.json: damaged: a JSON list, not an object",
        "warning: left out: pipe.json: not a regular file",
    ]


def test_a_run_copied_under_another_seed_is_named_and_counts_for_none(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 77.0, name="true")
    write_record(IB, 78.0, 77.0, name="copied", seed=7)
    write_record(IB, 79.0, 77.0, name="other", seed=1)
    text = written(tmp_path, capsys)
    assert "- true.json and copied.json: the same history under different seeds; keep the true one" in text
    assert cells(section(text, "### Table 4"), "cifar10", "exp", "100", "IB")[5:7] == ["1", "79.00"]


def test_a_short_length_is_the_records_own(write_record, tmp_path, capsys):
    run = Run("cifar10", "exp", 100, "CE", protocol="short")
    write_record(run, 70.0, 70.0)
    assert "Shortened to 40 epochs, a fifth: not to be set" in written(tmp_path, capsys)
    write_record(run, 70.0, 70.0, epochs=2, milestones=[1], lr_factors=[0.1])
    assert "Shortened to 2 of 200 epochs: not to be set" in written(tmp_path, capsys)


def test_two_runs_of_one_seed_are_both_left_out_with_a_line(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0)
    write_record(IB, 90.0, 90.0, name="zz_doctored")
    text = written(tmp_path, capsys)
    assert f"- {IB.name}.json and zz_doctored.json: different runs of one seed" in text
    assert "### Table" not in text


def test_a_run_that_is_found_twice_counts_once(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0)
    write_record(IB, 78.0, 78.0, name="log_of_the_same")
    text = written(tmp_path, capsys)
    assert cells(section(text, "### Table 4"), "cifar10", "exp", "100", "IB")[5] == "1"
    assert "Left out" not in text


def test_the_notes_of_a_folder_come_first(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0)
    (tmp_path / "notes.md").write_text("The images are real, the files are not the official ones.\n")
    lines = written(tmp_path, capsys).splitlines()
    assert lines[:4] == ["# What has run", "", "The images are real, the files are not the official ones.", ""]


def test_a_folder_without_records_and_no_folder(tmp_path, capsys):
    (tmp_path / "args.json").write_text("{}")
    for folder, line in ((tmp_path, "no record of a run in"), (tmp_path / "none", "no folder")):
        with pytest.raises(SystemExit) as stop:
            reproduce.main(["report", str(folder), "--to", str(tmp_path / "to")])
        assert stop.value.code == 1
        assert capsys.readouterr().err == f"reproduce.py: error: {line} {folder}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["args.json"]


# ------------------------------------------------------------------------------------- runs, pairs and figures


def test_runs_are_shown_with_commit_precision_hours_and_command(write_record, tmp_path, capsys):
    write_record(IB, 78.0, 78.0)
    write_record(CE, 70.0, 70.0, amp="bf16")
    text = section(written(tmp_path, capsys) + "\n#", "## The runs")
    assert cells(text, IB.name)[1:] == ["0", "float32", "cpu, all threads, Linux x86_64, 2 cores", "2.00", "0123456789"]
    assert cells(text, CE.name)[2] == "bf16"
    assert "python " + " ".join(IB.argv("reproduced")) in text
    assert " ".join(CE.argv("reproduced")) not in text, "that command would give another run"


@pytest.mark.parametrize(
    ("tf32", "amp", "label"), [("on", "none", "TF32"), ("off", "none", "float32"), ("on", "bf16", "bf16")]
)
def test_the_precision_of_a_gpu_is_that_of_its_convolutions(tf32, amp, label, tmp_path, capsys):
    record = record_of(IB, 78.0, 78.0, amp=amp)
    record["versions"]["tf32"], record["device"] = tf32, "NVIDIA H200"
    (tmp_path / f"{IB.name}.json").write_text(json.dumps(record))
    text = section(written(tmp_path, capsys) + "\n#", "## The runs")
    assert cells(text, IB.name)[2:4] == [label, "NVIDIA H200, all threads, Linux x86_64, 2 cores"]


def test_an_unclean_checkout_and_an_unknown_commit_are_said(write_record, tmp_path, capsys):
    assert report._commit_text(None) == "not recorded"
    assert report._commit_text({"commit": "a" * 40, "clean": False}) == "aaaaaaaaaa, with changes"


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


def test_our_methods_are_compared_by_seed(write_record, tmp_path, capsys):
    ib, ce = [80.0, 81.0, 79.0], [70.0, 70.5, 69.5]
    for seed in range(3):
        write_record(dataclasses.replace(IB, seed=seed), ib[seed], ib[seed])
        write_record(dataclasses.replace(CE, seed=seed), ce[seed], ce[seed])
    write_record(Run("cifar10", "exp", 100, "BS", seed=0), 82.0, 82.0)
    text = written(tmp_path, capsys)
    limit = rule.paired_limit([one - other for one, other in zip(ib, ce, strict=True)])
    assert cells(text, "IB minus CE")[1:] == ["3", "+10.00", "+10.00", f"{limit:.2f} / {limit:.2f}", "yes"]
    assert cells(text, "IB minus BS")[1:] == ["1", "-2.00", "-2.00", "unknown", "?"]


def test_the_factor_is_compared_with_class_weights_at_both_sizes(write_record, tmp_path, capsys):
    for variant in ("", "l1-auto", "weights-only", "weights-at-ib"):
        write_record(dataclasses.replace(IB, variant=variant), 78.0, 78.0)
    text = written(tmp_path, capsys)
    assert cells(text, "IB minus IB (weights-at-ib)")[1] == "1"
    assert cells(text, "IB (l1-auto) minus IB (weights-only)")[1] == "1"


def test_figure_3_takes_the_starts_of_plain_ib_only(write_record, tmp_path):
    for variant, best in {"": 70.0, "start020": 60.0, "detached": 50.0}.items():
        write_record(Run("cifar10", "exp", 10, "IB", variant, protocol="short"), best, best)
    rows, left_out = group(records.read(tmp_path)[0])
    assert left_out == []
    assert figures.starts(rows, "cifar10", "short") == {10: [(4, [60.0]), (20, [70.0])]}
    assert figures.starts(rows, "cifar10", "full") == {}


def test_the_report_draws_figure_3(write_record, tmp_path, capsys, monkeypatch):
    kept = {}
    monkeypatch.setattr(plots, "save_figure", lambda pyplot, figure, to, name: kept.update({name: figure}) or name)
    for seed, best in ((0, 60.0), (1, 64.0)):
        write_record(Run("cifar10", "exp", 100, "IB", "start020", seed=seed, protocol="short"), best, best)
        write_record(Run("cifar10", "exp", 100, "IB", seed=seed, protocol="short"), best + 10, best + 10)
    written(tmp_path, capsys)
    (axes,) = kept["figure3_cifar10_short.png"].axes
    assert axes.get_title() == "CIFAR-10, short length: start of the IB phase (Fig. 3)"
    (line,) = [line for line in axes.get_lines() if len(line.get_xdata()) == 2 and line.get_marker() == "o"]
    assert [*zip(line.get_xdata(), line.get_ydata(), strict=True)] == [(4, 62.0), (20, 72.0)]


def test_figures_have_titles_and_tell_identical_methods_apart(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(plots, "save_figure", lambda pyplot, figure, to, name: kept.append((name, figure)) or name)
    methods = ("CE", "IB", "IB+CB", "IB+Focal", "BS", "LA")
    rows = {Row(Run("cifar10", "exp", 100, method)): [record_of(IB, 78.0, 78.0)] for method in methods}
    figures.draw(rows, tmp_path)
    ((name, figure),) = kept
    assert name == "methods_cifar10_exp_100_full.png"
    assert figure.get_suptitle() == "CIFAR-10, exponential imbalance, ratio 100, full length"
    for axes in figure.axes:
        lines = axes.get_lines()
        assert len({(line.get_linewidth(), line.get_linestyle()) for line in lines}) == len(methods)
        assert [line.get_linewidth() for line in lines] == sorted(
            (line.get_linewidth() for line in lines), reverse=True
        )


@pytest.mark.parametrize("folder", sorted(path.parent for path in RESULTS.glob("*/report.md")), ids=lambda p: p.name)
def test_the_committed_reports_are_those_of_the_committed_records(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "save_figure", lambda pyplot, figure, to, name: pathlib.Path(to) / name)
    if (folder / "figure2.png").exists():
        (tmp_path / "figure2.png").write_bytes(b"")
    report.write([folder], tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert text == (folder / "report.md").read_text()
    table = text.split("| run | seed |")[1].split("\n\n")[0].splitlines()[2:]
    names = [line.split(" | ")[0].removeprefix("| ") for line in table]
    assert sorted(names) == sorted(record["name"] for _, record in records.read(folder)[0])
    assert "Left out" not in text
    images = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert all((folder / name).exists() for name in images)
