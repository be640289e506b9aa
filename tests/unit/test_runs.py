"""The runs behind the paper's cells: how many, with which flags; every one passes --dry_run."""

import collections
import importlib
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
from script_runner import REPOSITORY, refused, run_reproduce

import imbalance_cifar
import reproduce
from experiment.parser import parse
from experiment.settings import recorded
from paper import executors, records, runs
from paper.driver import Driver
from paper.runs import Run
from training import registry
from training.recipe import Recipe


def listed(*args, capsys):
    reproduce.main(["list", *map(str, args)])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines()]


def flag(line, name):
    return line[line.index(name) + 1]


def stages(run):
    script, *argv = run.argv("out")
    return Recipe(parse(script, argv)).stages()


def dry_run(line, capsys):
    """The rows that the script of a listed command prints with --dry_run."""
    importlib.import_module(line[1].removesuffix(".py")).main([*line[2:], "--dry_run"])
    out, err = capsys.readouterr()
    assert err == ""
    return out.splitlines()


# -------------------------------------------------------------------------------------------------- lists


def test_table_4_is_116_runs_a_seed(capsys):
    lines = listed("--table", 4, capsys=capsys)
    assert len(lines) == len({tuple(line) for line in lines}) == 116
    assert len(listed("--table", 4, "--seeds", 0, 1, 2, capsys=capsys)) == 3 * 116
    assert len(listed("--table", 3, 4, capsys=capsys)) == 116 + 6  # LDAM, LDAM-DRW; on step Focal and CB too
    settings = [parse("cifar_train.py", line[2:]) for line in lines]
    expected = {
        (dataset, imb_type, 1 / ratio, *runs.METHODS[method])
        for cell in runs.published()
        if cell["table"] == "4"
        for dataset, imb_type, ratio, method in [(cell[n] for n in ("dataset", "imb_type", "ratio", "method"))]
    }
    assert {(s.dataset, s.imb_type, s.imb_factor, s.loss_type, s.train_rule) for s in settings} == expected
    assert {(s.arch, s.epochs, s.batch_size, s.lr, s.start_ib_epoch, s.milestones, s.drw_epoch) for s in settings} == {
        ("resnet32", 200, 128, 0.1, 100, (160, 180), 160)
    }


def test_every_line_passes_its_dry_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = listed("--table", 1, 4, 5, 6, capsys=capsys)
    for line in lines + listed("--table", 2, 3, "--protocol", "short", capsys=capsys):
        assert len(dry_run(line, capsys)) == int(flag(line, "--epochs")) + 1
    assert list(tmp_path.iterdir()) == []


def every_run():
    found = [run for table in range(1, 7) for run in runs.cells_of_table(table)]
    found += [run for figure in (2, 3) for run in runs.cells_of_figure(figure)]
    found += runs.controls(runs.CONTROLS, [Run("cifar10", "exp", 100, "CE"), Run("tinyimagenet", "step", 10, "CE")])
    found += runs.grid(["digits"], ["exp", "none"], [100], runs.METHODS)
    return runs.spread_over(dict.fromkeys(found), [3], [0, 1], "full") + runs.spread_over(found, [0], [0], "short")


def test_names_are_the_scripts_own_and_tell_runs_apart():
    names = set()
    for run in every_run():
        script, *argv = run.argv("out")
        assert parse(script, argv).name == run.name
        names.add(run.name)
    assert len(names) == len(set(every_run()))


def test_names_of_runs_that_have_been_trained_stay():
    assert Run("cifar10", "exp", 100, "CE").name == "cifar10_resnet32_CE_None_exp_0.01_full_s0"
    assert Run("cifar100", "exp", 100, "IB+Focal").name == "cifar100_resnet32_IBFocal_IBReweight_exp_0.01_full_s0"
    run = Run("cifar10", "exp", 100, "IB", "weights-only", seed=1, protocol="short")
    assert run.name == "cifar10_resnet32_IB_IBReweight_exp_0.01_short_s1_weights-only"
    assert (run.fork_epoch(), run.trunk.name) == (20, "cifar10_resnet32_CE_None_exp_0.01_short_s1")


def test_runs_of_a_family_train_their_shared_epochs_alike():
    families = collections.defaultdict(list)
    for run in every_run():
        families[run.family].append(run)
    shared = 0
    for family in families.values():
        trunk = stages(family[0].trunk)
        for run in family:
            own = stages(run)
            assert own[: run.fork_epoch()] == trunk[: run.fork_epoch()]
            if run != run.trunk:
                shared += 1
                is_last = run.fork_epoch() == len(trunk) - 1  # the epoch before the last has a copy, the last has none
                assert is_last or own[run.fork_epoch()] != trunk[run.fork_epoch()], "they could share more"
    assert shared > 100


@pytest.mark.parametrize(
    ("method", "trunk", "fork_epoch"),
    [("CE+DRW-IB", "CE", 160), ("CE+DRS", "CE", 160), ("CE+cRT", "CE", 199), ("LDAM-DRW", "LDAM", 160)],
)
def test_what_the_baselines_share(method, trunk, fork_epoch):
    run = Run("cifar100", "exp", 100, method)
    assert (run.trunk.method, run.fork_epoch()) == (trunk, fork_epoch)
    last = stages(run)[-1]
    expected = {"LDAM-DRW": ("CB", "none"), "CE+DRW-IB": ("IB", "none"), "CE+DRS": ("none", "Resample")}
    expected["CE+cRT"] = ("none", "Balanced")
    assert (last.class_weights, last.sampler) == expected[method]


@pytest.mark.parametrize(
    ("dataset", "protocol", "first", "second"), [("digits", "short", 40, 2), ("tinyimagenet", "full", 100, 10)]
)
def test_crt_trains_a_head_after_the_whole_ce_run(dataset, protocol, first, second):
    ce, crt = (stages(Run(dataset, "exp", 10, method, protocol=protocol)) for method in ("CE", "CE+cRT"))
    assert crt[:first] == ce
    assert [(s.trains, s.lr == 0.1) for s in crt[first:]] == [("head", epoch == 0) for epoch in range(second)]


def test_short_is_a_fifth_with_the_same_warm_up(capsys):
    (line,) = listed("--figure", 3, "--ratio", 100, "--protocol", "short", capsys=capsys)[1:2]
    names = ("--epochs", "--start_ib_epoch", "--exp_str")
    assert [flag(line, name) for name in names] == ["40", "4", "short_s0_start020"]
    assert "--keep_warmup" in line
    settings = parse("cifar_train.py", line[2:])
    assert settings.milestones == (32, 36)
    assert settings.warmup_epochs == 5


# ---------------------------------------------------------------------------------------- controls, variants


@pytest.mark.parametrize("dataset", ["cifar10", "tinyimagenet", "inaturalist"])
def test_every_control_passes_its_dry_run_with_the_lr_of_ib(dataset, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for line in listed("--control", *runs.CONTROLS, "--dataset", dataset, "--protocol", "short", capsys=capsys):
        rows = dry_run(line, capsys)[1:]
        imb_type = flag(line, "--imb_type")
        ib = stages(Run(dataset, imb_type, 1 if imb_type == "none" else 100, "IB", protocol="short"))
        assert [float(row.split(",")[1]) for row in rows] == [stage.lr for stage in ib]
        assert {row.split(",")[2] for row in rows} == ({"CE"} if flag(line, "--loss_type") == "CE" else {"CE", "IB"})


def test_the_factor_is_nine_arms_of_one_first_phase(capsys):
    lines = listed("--control", "factor", capsys=capsys)
    settings = [parse("cifar_train.py", line[2:]) for line in lines]
    arms = {(s.ib_norm, s.detach_ib, s.auto_ratio) for s in settings}
    assert arms == {
        (norm, detach, ratio)
        for norm, detach in (("none", False), ("l1", False), ("l1", True))
        for ratio in (1 / 3, 1.0, 3.0)
    }
    assert {(s.alpha, s.auto_target) for s in settings} == {("auto", "gradient")}
    found = runs.controls(["factor"], [Run("cifar10", "exp", 100, "CE")])
    assert {(run.trunk.method, run.fork_epoch()) for run in found} == {("CE", 100)}
    assert found[0].title == "IB (class weights, gradient x 1/3)"


def test_the_two_by_two_is_what_it_says(capsys):
    names = ("l1-auto", "weights-only", "weights-at-ib", "detached")
    lines = {flag(line, "--exp_str"): line for line in listed("--control", *names, capsys=capsys)}
    settings = {name: parse("cifar_train.py", lines[f"full_s0_{name}"][2:]) for name in names}
    settings["ib"] = parse("cifar_train.py", Run("cifar10", "exp", 100, "IB").argv("out")[1:])
    found = {name: (s.ib_norm, s.alpha, s.auto_target, s.detach_ib) for name, s in settings.items()}
    assert found == {
        "ib": ("l1", 1000.0, "ce", False),
        "l1-auto": ("l1", "auto", "ce", False),
        "weights-only": ("none", "auto", "ce", False),
        "weights-at-ib": ("none", "auto", "ib", False),
        "detached": ("l1", 1000.0, "ce", True),
    }


def test_ablations_and_subsets(capsys):
    (no_factor,) = [line for line in listed("--table", 2, capsys=capsys) if "--ib_norm" in line]
    assert flag(no_factor, "--ib_norm") == "none"
    assert "--alpha" not in no_factor
    (subset,) = listed("--ratio", 100, "--method", "IB", "--subsets", 4, capsys=capsys)
    assert [flag(subset, "--rand_number"), flag(subset, "--exp_str")] == ["4", "full_s0_r4"]


def test_table_5_has_the_official_lr_and_the_papers(capsys):
    lines = listed("--table", 5, capsys=capsys)
    assert len(lines) == 2 * 16 + 4
    ldam = [line for line in lines if "LDAM" in line]
    assert [(flag(line, "--recipe"), flag(line, "--epochs"), flag(line, "--train_rule")) for line in ldam] == [
        ("ldam", "120", "DRW")
    ] * 4
    for method in ("CE", "IB"):
        official, printed = (stages(Run("tinyimagenet", "exp", 100, method, v)) for v in ("", "paper-lr"))
        assert [printed[epoch].lr for epoch in (49, 50, 89, 90)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
        assert [official[epoch].lr for epoch in (49, 50, 90)] == pytest.approx(
            [0.1, 0.1, 0.01] if method == "CE" else [0.1, 1e-3, 1e-4]
        )
    assert sum("paper" in line for line in lines) == 16


# ------------------------------------------------------------------------------------------------ selections


#: On a machine with two GPUs.
BAD = {
    "list --ratio 0": "at least 1",
    "list --ratio x": "invalid",
    "list --table 9": "invalid choice",
    "list --table 2 --dataset cifar100": "leave out one",
    "list --dataset inaturalist --imb_type exp": "--imb_type none",
    "list --table 4 --method CE VS": "--method VS: the table or figure has no such run",
    "list --seeds 2147483648": "at most 2147483647",
    "list --table 2 -- --seed 5": "reproduce.py sets --seed itself",
    "list --method XE": "--method XE: choose from CE",
    "list --dataset svhn": "--dataset svhn: choose from",
    "list --dataset folder": "needs -- --data_dir",
    "list --dataset folder -- --data_dir x/cifar10": "cifar10 is a data set of the paper: name this one with",
    "list --dataset folder cifar10 -- --data_dir x": "another data set",
    "list --dataset folder -- --data_dir x --imb_type exp": "give --imb_type and --ratio before --",
    "list --dataset folder --ratio 50 -- --data_dir x": "--ratio needs --imb_type",
    "list --dataset inaturalist --ratio 100": "--ratio needs --imb_type",
    "list --dataset digits --control ib-lr -- --schedule cosine": "--control ib-lr lowers the lr at a milestone",
    "list --dataset folder --control ib-lr -- --data_dir x --schedule cosine": "--control ib-lr lowers the lr at a",
    "list --dataset digits --control ib-lr -- --milestones 120 150 160": "CE (ib-lr) sets --milestones itself",
    "list --figure 3 -- --start_ib_epoch 30": "IB (start000) sets --start_ib_epoch itself",
    "run --table 2 --out=": "argument --out: an empty value",
    "run --table 2 --address 1.2.3.4:5": "--address and --gpus_per_run need --executor ray",
    "run --table 2 -- --root_m X": "reproduce.py sets --root_model itself",
    "run --table 2 -- --gpu 1": "reproduce.py sets --gpu itself",
    "run --table 2 -- -e --resume X": "reproduce.py sets --resume itself",
    "run --table 2 -- -a resnet44": "reproduce.py sets --arch itself",
    "run --table 2 -- --no_such_flag": "--no_such_flag",
    "run --table 2 --gpus 3": "--gpus 3: this machine has 2",
    "run --table 2 --gpus 1 --executor ray": "--gpus is for this machine",
    "run --table 2 --part 3/2": "the first part of five is 1/5",
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_command_is_one_line_and_writes_nothing(words, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "OWN_SETUPS", {})
    monkeypatch.setattr(executors, "visible_cards", lambda: ["0", "1"])
    refused(words.split(), tmp_path, BAD[words], run=run_reproduce)


#: Flags of `list`, and settings of the lines: the value in each.
LISTED = {
    "--ratio 100 --method CE -- --milestones 9 30 80": {"lr_factors": [(0.01,) * 3]},
    "--ratio 100 --method CE -- --milestones 9 --lr_factors 0.5": {"lr_factors": [(0.5,)]},
    "--imb_type none --method CE IB --dataset cifar10 inaturalist": {"imb_factor": [1.0] * 4},  # one line a method
    "--dataset digits --method CE": {"imb_factor": [0.01, 0.02, 0.05, 0.1]},  # at 200 a class would be empty
    "--ratio 100 --method CE --seeds 1 0 1 --subsets 2 2": {"exp_str": ["full_s1_r2", "full_s0_r2"]},
    "--ratio 100 --method CE --dataset digits -- --schedule cosine": {"schedule": ["cosine"]},  # parsed: no milestones
    "--control weights-only --method CE IB": {"exp_str": ["full_s0", "full_s0", "full_s0_weights-only"]},
    "--dataset folder --imb_type exp --ratio 10 --method CE -- --data_dir x": {
        "imb_type": ["exp"], "imb_factor": [0.1],
    },
    "--dataset folder --method CE --protocol short -- --data_dir x --epochs 20": {  # one fall where two meet
        "milestones": [(3,)], "lr_factors": [(pytest.approx(1e-4),)],
    },
}  # fmt: skip


@pytest.mark.parametrize("words", LISTED)
def test_a_command_lists_each_run_once_with_its_settings(words, capsys, monkeypatch):
    monkeypatch.setattr(runs, "OWN_SETUPS", {})
    found = [parse(line[1], line[2:]) for line in listed(*words.split(), capsys=capsys)]
    assert {name: [getattr(of, name) for of in found] for name in LISTED[words]} == LISTED[words]


def test_list_is_quick_and_imports_no_torch():
    code = "import sys, reproduce; reproduce.main(['list', '--table', '4']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 116


# ------------------------------------------------------------------------------------ own methods, own data, a folder


@pytest.mark.parametrize(
    ("asked", "method", "pair"),
    [
        ("cRT", "CE+cRT", ("CE", "cRT")),
        ("IBFocal+IBReweight", "IB+Focal", ("IBFocal", "IBReweight")),
        ("LA+cRT", "LA+cRT", ("LA", "cRT")),
        ("IB+None", "IB+None", ("IB", "None")),
        ("IB+IBReweight", "IB", ("IB", "IBReweight")),
    ],
)
def test_a_method_is_any_loss_and_rule_of_the_registry(asked, method, pair, capsys):
    (line,) = listed("--ratio", 100, "--method", asked, capsys=capsys)
    assert (flag(line, "--loss_type"), flag(line, "--train_rule")) == pair
    run = Run("cifar10", "exp", 100, method)
    assert (runs.pair_of(method), runs.name_of_method(*pair)) == (pair, method)
    assert records.describe(recorded(records.command_settings(run))) == (run, ())
    assert run.family[6] in (pair[0], "CE", run.title)
    assert stages(run)[: run.fork_epoch()] == stages(run.trunk)[: run.fork_epoch()]


def test_an_own_data_set_of_small_images_is_trained_as_cifar_is(capsys, monkeypatch):
    monkeypatch.setattr(runs, "OWN_SETUPS", {})
    monkeypatch.setitem(imbalance_cifar.DATASETS, "svhn", imbalance_cifar.DATASETS["cifar10"])
    (line,) = listed("--dataset", "svhn", "--method", "IB", capsys=capsys)
    assert [flag(line, name) for name in ("--dataset", "-a", "--imb_factor", "--epochs")] == [
        "svhn", "resnet32", "0.01", "200",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("extra", "lengths"),
    [
        ("--epochs 60", {"start_ib_epoch": 30, "drw_epoch": 48, "milestones": (48, 54), "lr_factors": (0.01, 0.01)}),
        ("--epochs 60 --start_ib_epoch 20", {"start_ib_epoch": 20, "milestones": (48, 54)}),
        ("--epochs 60 --milestones 40 50", {"milestones": (40, 50), "lr_factors": (0.01, 0.01), "drw_epoch": 48}),
        ("--epochs 4", {"start_ib_epoch": 2, "milestones": (3,), "lr_factors": (0.01,)}),
        ("--epochs 4 --lr_factors 0.1 0.2", {"milestones": (3,), "lr_factors": (0.1,)}),
        ("--epochs 6", {"milestones": (5,), "lr_factors": (pytest.approx(1e-4),)}),
        ("--epochs 60 --schedule cosine", {"schedule": "cosine", "start_ib_epoch": 30}),
    ],
)
def test_a_folders_lengths_follow_its_epochs_unless_given(extra, lengths, capsys, monkeypatch):
    monkeypatch.setattr(runs, "OWN_SETUPS", {})
    argv = ["--dataset", "folder", "--method", "CE", "IB", "cRT", "--seeds", "0", "1", "--"]
    argv += ["--data_dir", "some/leaves", "-a", "resnet18", "--pretrained", *extra.split()]
    lines = listed(*argv, capsys=capsys)
    assert [line[1] for line in lines] == ["folder_train.py"] * 6
    settings = parse("folder_train.py", lines[1][2:])
    assert (settings.dataset, settings.arch, settings.imb_type, settings.pretrained, settings.data_dir) == (
        "leaves", "resnet18", "none", "imagenet", "some/leaves",
    )  # fmt: skip
    assert {name: getattr(settings, name) for name in lengths} == lengths
    crt = parse("folder_train.py", lines[2][2:])
    assert (crt.drw_epoch, crt.epochs) == (settings.epochs, settings.epochs + 10)


def test_a_sampler_from_the_first_epoch_on_shares_no_epochs_with_ce():
    run = Run("cifar10", "exp", 100, "IB+Resample")
    assert run.trunk == run
    assert stages(run)[0].sampler == "Resample"


def test_a_fork_starts_from_a_run_that_has_not_left_the_common_epochs(tmp_path):
    drw, ce, ib = (Run("cifar10", "exp", 100, method) for method in ("CE+DRW", "CE", "IB"))
    driver = Driver([drw, ce, ib], tmp_path, tmp_path / "results", SimpleNamespace(), ["--drw_epoch", "80"])
    for run in (drw, ce):
        assert driver.fork_point(ib) is None
        path = tmp_path / "checkpoint" / run.name / "ckpt.epoch100.pth.tar"
        path.parent.mkdir(parents=True)
        path.touch()
    assert driver.fork_point(ib) == path


@pytest.mark.parametrize(
    ("entries", "like", "method", "fork_epoch", "epochs"),
    [
        (registry.LOSSES, "CE", "Own", 200, 200),
        (registry.LOSSES, "IB", "Own", 100, 200),
        (registry.RULES, "DRW", "CE+Own", 160, 200),
        (registry.RULES, "cRT", "CE+Own", 199, 210),
    ],
)
def test_an_own_loss_or_rule_is_a_method_that_shares_the_epochs_before_it(
    entries, like, method, fork_epoch, epochs, monkeypatch, capsys
):
    monkeypatch.setitem(entries, "Own", entries[like])
    (line,) = listed("--dataset", "cifar10", "--method", "Own", "--ratio", "100", capsys=capsys)
    assert (flag(line, "--loss_type"), flag(line, "--train_rule")) == runs.pair_of(method)
    ce, own = Run("cifar10", "exp", 100, "CE"), Run("cifar10", "exp", 100, method)
    assert own.trunk == (own if like == "CE" else ce)
    assert (own.fork_epoch(), own.settings["epochs"]) == (fork_epoch, epochs)


def test_losses_and_rules_of_the_papers_methods_are_as_in_the_registry():
    for loss, rule in runs.METHODS.values():
        entry = registry.RULES[rule]
        assert runs.rule_of(rule) == (entry.sampler, entry.start, entry.trains)
        assert runs.has_first_phase(loss) == registry.LOSSES[loss].first_phase_ce


def test_ce_keeps_what_methods_of_a_later_command_start_from(tmp_path):
    ce = Run("cifar10", "exp", 100, "CE")
    command = Driver([ce], tmp_path, tmp_path / "results", SimpleNamespace(threads=1)).command(ce)
    assert command[command.index("--keep_epochs") + 1 :][:2] == ["160", "199"]
