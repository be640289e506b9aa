"""The runs behind the paper's cells: how many, with which flags; every one passes --dry_run; settings lead back."""

import collections
import csv
import json
import pathlib
import shlex
import subprocess
import sys

import pytest

import cifar_train
import inat_train
import reproduce
import tinyimage_train
from paper import runs
from paper.runs import Run
from training import options as flags
from training.options import recipe_of, settings_of, store_name

REPOSITORY = pathlib.Path(__file__).parent.parent
PARSERS = {
    "cifar_train.py": lambda argv: flags.complete(cifar_train.build_parser().parse_args(argv)),
    "tinyimage_train.py": tinyimage_train.parse,
    "inat_train.py": lambda argv: flags.complete(inat_train.build_parser().parse_args(argv)),
}


def listed(*args, capsys):
    reproduce.main(["list", *map(str, args)])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def flag(line, name):
    return line[line.index(name) + 1]


# ---------------------------------------------------------------------------------------------- published


def test_published_cells_of_each_table():
    count = collections.Counter((row["table"], row["metric"][:5]) for row in runs.published())
    assert {table: n for (table, _), n in count.items() if table in "1245"} == {"1": 12, "2": 4, "4": 116, "5": 20}
    assert count["3", "class"] == 160
    assert count["6", "top1"] == count["6", "top5"] == 5


def test_class_means_of_table_3_are_table_4s_where_the_paper_agrees_with_itself():
    rows = runs.published()
    for imb_type, method in [("exp", "IB"), ("exp", "IB+CB"), ("exp", "IB+Focal"), ("step", "CE"), ("step", "IB")]:
        per_class = [r["value"] for r in rows if (r["table"], r["imb_type"], r["method"]) == ("3", imb_type, method)]
        (cell,) = [
            r["value"] for r in rows
            if (r["table"], r["dataset"], r["imb_type"], r["ratio"], r["method"])
            == ("4", "cifar10", imb_type, 50, method)
        ]  # fmt: skip
        assert len(per_class) == 10
        assert sum(per_class) / 10 == pytest.approx(cell, abs=0.0051)


def test_doubtful_cells_carry_a_note_and_every_cell_its_author():
    rows = {(r["table"], r["dataset"], r["imb_type"], r["ratio"], r["method"]): r for r in runs.published()}
    assert "58.71" in rows["4", "cifar100", "exp", 10, "LDAM-DRW"]["note"]
    assert "impossible" in rows["5", "tinyimagenet", "exp", 10, "CE"]["note"]
    assert all(row["whose"] for row in rows.values())
    assert all(
        "other" in row["note"] for row in rows.values() if row["method"] in ("BS", "LA") and row["note"][0] != "a"
    )


# -------------------------------------------------------------------------------------------------- lists


def test_table_4_is_116_runs_a_seed(capsys):
    lines = listed("--table", 4, capsys=capsys)
    assert len(lines) == len({tuple(line) for line in lines}) == 116
    assert len(listed("--table", 4, "--seeds", 0, 1, 2, capsys=capsys)) == 3 * 116
    assert len(listed("--table", 3, 4, capsys=capsys)) == 116 + 6  # LDAM, LDAM-DRW; on step Focal and CB too


CELLS = {
    ("cifar10", "exp", "200", "CE"): "--loss_type CE --train_rule None --imb_factor 0.005",
    ("cifar100", "exp", "50", "CB"): "--loss_type Focal --train_rule CBReweight --imb_factor 0.02",
    ("cifar100", "step", "10", "LDAM-DRW"): "--loss_type LDAM --train_rule DRW --imb_factor 0.1 --drw_epoch 160",
    ("cifar10", "step", "20", "IB+CB"): "--loss_type IB --train_rule CBReweight --imb_factor 0.05",
    ("cifar100", "exp", "100", "IB+Focal"): "--loss_type IBFocal --train_rule IBReweight --imb_factor 0.01",
}


@pytest.mark.parametrize("cell", CELLS, ids=" ".join)
def test_flags_of_five_cells(cell, capsys):
    dataset, imb_type, ratio, method = cell
    (line,) = listed(
        "--table", 4, "--dataset", dataset, "--imb_type", imb_type, "--ratio", ratio, "--method", method,
        capsys=capsys,
    )  # fmt: skip
    expected = f"{CELLS[cell]} --dataset {dataset} --imb_type {imb_type} -a resnet32 --epochs 200 --batch-size 128"
    expected += " --lr 0.1 --start_ib_epoch 100 --rand_number 0 --seed 0 --exp_str full_s0 --resume auto"
    words = expected.split()
    assert line[:2] == ["python", "cifar_train.py"]
    assert all(flag(line, name) == value for name, value in zip(words[::2], words[1::2], strict=True))
    assert line[line.index("--milestones") : line.index("--milestones") + 3] == ["--milestones", "160", "180"]


@pytest.mark.parametrize("protocol", ["full", "short"])
@pytest.mark.parametrize("table", [1, 2, 3, 4, 5, 6])
def test_every_line_passes_its_dry_run(table, protocol, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scripts = {script.__name__ + ".py": script for script in (cifar_train, tinyimage_train, inat_train)}
    for line in listed("--table", table, "--protocol", protocol, capsys=capsys):
        scripts[line[1]].main([*line[2:], "--dry_run"])
        out, err = capsys.readouterr()
        assert len(out.splitlines()) == int(flag(line, "--epochs")) + 1
        assert err == ""
    assert list(tmp_path.iterdir()) == []


def every_run():
    found = [run for table in range(1, 7) for run in runs.cells_of_table(table)]
    found += [run for figure in (2, 3) for run in runs.cells_of_figure(figure)]
    found += runs.controls(runs.CONTROLS, [Run("cifar10", "exp", 100, "CE")])
    found += runs.grid(["digits"], ["exp"], [100], runs.METHODS)
    return runs.spread_over(dict.fromkeys(found), [3], [0, 1], "full") + runs.spread_over(found, [0], [0], "short")


def test_names_are_the_scripts_own_and_settings_lead_back_to_the_run():
    names = set()
    for run in every_run():
        script, *argv = run.argv("out")
        options = PARSERS[script](argv)
        assert store_name(options) == run.name
        names.add(run.name)
        assert runs.describe(json.loads(json.dumps(settings_of(options)))) == (run, "")
    assert len(names) == len(set(every_run()))


def test_a_run_with_another_setting_is_not_taken_for_the_papers():
    options = PARSERS["cifar_train.py"]([*Run("cifar10", "exp", 100, "IB").argv("out")[1:], "--gamma", "3"])
    assert runs.describe(settings_of(options))[1] == "", "gamma is nothing to IB"
    options.alpha = 10.0
    run, difference = runs.describe(settings_of(options))
    assert (run.method, difference) == ("IB", "alpha 10.0")
    options.loss_type = "Other"
    assert runs.describe(settings_of(options))[0] is None


def test_runs_of_a_family_train_their_shared_epochs_alike():
    families = collections.defaultdict(list)
    for run in every_run():
        families[run.family].append(run)
    shared = 0
    for family in families.values():
        script, *argv = family[0].trunk.argv("out")
        trunk = recipe_of(PARSERS[script](argv)).stages()
        for run in family:
            options = PARSERS[script](run.argv("out")[1:])
            stages = recipe_of(options).stages()
            assert stages[: run.fork_epoch] == trunk[: run.fork_epoch]
            if run != run.trunk:
                shared += 1
                assert stages[run.fork_epoch] != trunk[run.fork_epoch], "they could share more"
    assert shared > 100


def test_short_is_a_fifth_with_the_same_warm_up(capsys):
    (line,) = listed("--figure", 3, "--ratio", 100, "--protocol", "short", capsys=capsys)[1:2]
    assert [flag(line, name) for name in ("--epochs", "--start_ib_epoch", "--exp_str")] == [
        "40",
        "4",
        "short_s0_start020",
    ]
    assert "--keep_warmup" in line
    options = PARSERS["cifar_train.py"](line[2:])
    assert options.milestones == [32, 36]
    assert options.warmup_epochs == 5


def test_controls_and_ablations_are_what_they_say(capsys):
    lines = {
        flag(line, "--exp_str"): line
        for line in listed("--control", "ib-lr", "weights-only", "detached", capsys=capsys)
    }
    stages = recipe_of(PARSERS["cifar_train.py"](lines["full_s0_ib-lr"][2:])).stages()
    ib = recipe_of(PARSERS["cifar_train.py"](Run("cifar10", "exp", 100, "IB").argv("out")[1:])).stages()
    assert [s.lr for s in stages] == pytest.approx([s.lr for s in ib])
    assert {s.loss for s in stages} == {"CE"}
    assert [flag(lines["full_s0_weights-only"], name) for name in ("--ib_norm", "--alpha")] == ["none", "auto"]
    assert "--detach_ib" in lines["full_s0_detached"]
    (no_factor,) = [line for line in listed("--table", 2, capsys=capsys) if "--ib_norm" in line]
    assert flag(no_factor, "--ib_norm") == "none"
    assert "--alpha" not in no_factor
    (subset,) = listed("--ratio", 100, "--method", "IB", "--subsets", 4, capsys=capsys)
    assert [flag(subset, "--rand_number"), flag(subset, "--exp_str")] == ["4", "full_s0_r4"]


def test_tables_5_and_6(capsys):
    lines = listed("--table", 5, capsys=capsys)
    assert len(lines) == 20
    ldam = [line for line in lines if "LDAM" in line]
    assert [(flag(line, "--recipe"), flag(line, "--epochs"), flag(line, "--train_rule")) for line in ldam] == [
        ("ldam", "120", "DRW")
    ] * 4
    lines = listed("--table", 6, capsys=capsys)
    assert [line[1] for line in lines] == ["inat_train.py"] * 5
    assert {flag(line, "--imb_type") for line in lines} == {"none"}


def test_json_has_the_same_commands(capsys):
    lines = listed("--table", 2, capsys=capsys)
    reproduce.main(["list", "--table", "2", "--json"])
    content = json.loads(capsys.readouterr().out)
    assert [entry["command"] for entry in content] == lines
    assert {entry["shared_epochs_with"] for entry in content} == {Run("cifar10", "exp", 100, "CE").name}
    assert {entry["shared_epochs"] for entry in content} == {100}


def test_list_is_quick_and_imports_no_torch():
    code = "import sys, reproduce; reproduce.main(['list', '--table', '4']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 116


def test_an_empty_selection_is_an_error(capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["list", "--table", "2", "--dataset", "cifar100"])
    assert stop.value.code == 2
    assert "leave out one of the restrictions" in capsys.readouterr().err


def test_published_csv_is_regular():
    with open(runs.PUBLISHED, newline="") as file:
        assert {len(row) for row in csv.reader(file)} == {12}
    known = {run.variant for run in every_run()}
    assert {row["variant"] for row in runs.published()} <= known
