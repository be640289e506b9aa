"""The settings: each declared once, and what is derived from that."""

import dataclasses
import itertools
import json
import os

import pytest
import torch

from experiment import flags, settings
from experiment.parser import SCRIPTS, build_parser, parse
from experiment.resume import Start
from experiment.run import Run
from experiment.settings import FIELDS, IDENTITY, SHARED, from_record, recorded
from training.recipe import READS, Recipe
from training.registry import LOSSES, RULES, all_constants

ARGV = {script: ["--data_dir", "somewhere"] if script == "folder_train.py" else [] for script in SCRIPTS}


#: Settings with which a run is still the same run.
NOT_IDENTITY = {
    "batch_norm", "check_images", "checkpoint_seconds", "compile", "cuda_graph", "data_dir", "deterministic",
    "dry_run", "evaluate", "exp_str", "export_split", "force", "gpu", "keep_epochs", "overwrite", "posthoc_la",
    "predict", "print_freq", "processes", "recipe", "resume", "root_log", "root_model", "save_logits", "tau_norm",
    "tau_norm_bias", "threads", "top", "workers",
}  # fmt: skip


def test_what_settings_affect_decides_what_is_part_of_the_identity_and_shared():
    assert set(SHARED) < set(IDENTITY)
    assert {"mixup", "ema", "optimizer", "augment", "image_size", "crop"} <= set(SHARED)
    assert {"lr", "alpha", "epochs", "train_rule"} <= set(IDENTITY) - set(SHARED)
    assert set(FIELDS) - set(IDENTITY) == NOT_IDENTITY


def test_a_setting_of_the_training_has_a_flag_of_its_name():
    """A variant of `paper/runs.py` names settings, and its command flags."""
    trains = [name for name, field in FIELDS.items() if field.metadata["affects"] in ("schedule", "optimizer")]
    assert [name for name in trains if f"--{name}" not in FIELDS[name].metadata["flags"]] == []


class Watched:
    """Settings that note what is read of them."""

    def __init__(self, of, names):
        vars(self).update(of=of, names=names)

    def __getattr__(self, name):
        self.names.add(name)
        return getattr(self.of, name)


def test_what_a_recipe_and_the_registry_read_affects_the_schedule():
    read = set(all_constants())
    for loss, rule, schedule in itertools.product(LOSSES, RULES, ("step", "cosine")):
        of = dataclasses.replace(settings.Settings(), loss_type=loss, train_rule=rule, schedule=schedule)
        Recipe(Watched(of, read)).stages()
    assert read - {*all_constants()} == set(READS)
    assert settings.UNPLANNED == ()


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_record_comes_back_as_the_settings_that_wrote_it(script):
    mine = parse(script, [*ARGV[script], "--alpha", "auto", "--milestones", "3", "7", "--seed", "4"])
    again = from_record(json.loads(json.dumps(recorded(mine))))
    assert again == mine


def test_a_mean_of_three_channels_comes_back_and_is_from_0_to_1(capsys):
    mine = parse("folder_train.py", ["--data_dir", "somewhere", "--mean", "0.5", "0.4", "0.3"])
    assert from_record(json.loads(json.dumps(recorded(mine)))).mean == (0.5, 0.4, 0.3)
    with pytest.raises(SystemExit):
        parse("folder_train.py", ["--data_dir", "somewhere", "--mean", "123.675", "116.28", "103.53"])
    assert "--mean: 123.675 is not allowed: it must be at least 0 and at most 1" in capsys.readouterr().err


def test_given_flags_are_known():
    mine = parse("cifar_train.py", ["--lr=0.1", "-b", "64", "--detach_ib", "--mile", "5"])
    assert mine.given == {"lr", "batch_size", "detach_ib", "milestones"}


@pytest.mark.parametrize(
    ("argv", "unused"),
    [
        (["--gamma", "2"], ["--gamma"]),
        (["--loss_type", "IB", "--alpha", "10", "--start_ib_epoch", "250", "--epochs", "300"], []),
        (["--loss_type", "IB", "--alpha", "10", "--start_ib_epoch", "400", "--epochs", "300"], ["--alpha"]),
        (["--train_rule", "IBReweight", "--beta", "0.9", "--la_tau", "2"], ["--beta", "--la_tau"]),
        (["-e", "--resume", "x", "--gamma", "2"], []),
        (["--optimizer", "adamw", "--momentum", "0.5"], ["--momentum"]),
    ],
)
def test_constants_that_no_epoch_uses_are_named(argv, unused, capsys):
    parse("cifar_train.py", argv)
    said = [line for line in capsys.readouterr().err.splitlines() if "has no effect" in line]
    assert sorted(line.split()[1] for line in said) == unused


@pytest.mark.parametrize(
    ("argv", "warns"),
    [
        (["--loss_type", "BS", "--train_rule", "cRT"], True),
        (["--loss_type", "LA", "--train_rule", "DRS"], True),
        (["--loss_type", "BS", "--train_rule", "DRW"], False),
        (["--loss_type", "LDAM", "--train_rule", "DRS"], False),
    ],
)
def test_a_prior_that_is_corrected_twice_is_named(argv, warns, capsys):
    parse("cifar_train.py", argv)
    assert ("the prior counts twice" in capsys.readouterr().err) == warns


def test_flips_are_those_of_the_flag_or_of_the_data_set():
    flips = {}
    for flip in ("on", "off", "auto"):
        run = Run(parse("cifar_train.py", ["--flip", flip]), Start(), torch.device("cpu"))
        flips[flip] = run.loading["flip"]
    assert flips == {"on": True, "off": False, "auto": None}


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for script in SCRIPTS:
        text = build_parser(script).format_help()
        assert max(map(len, text.splitlines())) <= 80


# -------------------------------------------------------------------------------- against the official code

#: The flags of the official opts.py (pseulki/IB-Loss at e15d390), name in the code and default; False: a switch.
OFFICIAL = {
    ("--dataset",): ("dataset", "cifar10"),
    ("-a", "--arch"): ("arch", "resnet32"),
    ("--num_classes",): ("num_classes", 10),
    ("--loss_type",): ("loss_type", "CE"),
    ("--imb_type",): ("imb_type", "exp"),
    ("--imb_factor",): ("imb_factor", 0.01),
    ("--train_rule",): ("train_rule", "None"),
    ("--start_ib_epoch",): ("start_ib_epoch", 100),
    ("--rand_number",): ("rand_number", 0),
    ("--exp_str",): ("exp_str", "0"),
    ("-j", "--workers"): ("workers", 4),
    ("--epochs",): ("epochs", 200),
    ("--start-epoch",): ("start_epoch", 0),
    ("-b", "--batch-size"): ("batch_size", 128),
    ("--lr", "--learning-rate"): ("lr", 0.1),
    ("--momentum",): ("momentum", 0.9),
    ("--wd", "--weight-decay"): ("weight_decay", 2e-4),
    ("-p", "--print_freq"): ("print_freq", 100),
    ("--resume",): ("resume", ""),
    ("-e", "--evaluate"): ("evaluate", False),
    ("--pretrained",): ("pretrained", False),
    ("--seed",): ("seed", None),
    ("--gpu",): ("gpu", None),
    ("--root_log",): ("root_log", "log"),
    ("--root_model",): ("root_model", "checkpoint"),
}
#: All defaults that differ here, and why: docs/differences.md. Fewer than four cores have fewer workers.
DIFFERS = {
    ("-p", "--print_freq"): 10,
    ("--num_classes",): None,
    ("--pretrained",): "none",
    ("-j", "--workers"): min(4, len(os.sched_getaffinity(0))),
}


def test_flags_and_defaults_are_the_official_ones_but_for_the_documented_ones():
    actions = {flag: action for action in build_parser("cifar_train.py")._actions for flag in action.option_strings}
    ours = {flags: (actions[flags[-1]].dest, actions[flags[0]].default) for flags in OFFICIAL}
    assert ours == {flags: (name, DIFFERS.get(flags, default)) for flags, (name, default) in OFFICIAL.items()}
    page = flags.PAGE.with_name("differences.md").read_text()
    table = page[page.index("## Flags") :]
    assert all(f"| {', '.join(f'`{flag}`' for flag in flags)} |" in table for flags in DIFFERS)


def test_official_flags_take_what_they_took():
    parser = build_parser("cifar_train.py")
    for names, (name, default) in OFFICIAL.items():
        for flag in names:
            given = [] if default is False else [str(3 if default is None else default)]
            found = getattr(parser.parse_args([flag, *given]), name)
            assert bool(found) if default is False else found == (3 if default is None else default), flag


def test_the_page_of_flags_is_made_of_the_settings():
    page = flags.PAGE.read_text()
    assert page.count("| `-") > len(FIELDS)
    assert page == flags.page(page), "run: python -m experiment.flags"
