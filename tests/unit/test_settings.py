"""The settings: each declared once, and what is derived from that."""

import dataclasses
import json

import pytest

from experiment import settings
from experiment.parser import SCRIPTS, build_parser, parse
from experiment.settings import FIELDS, IDENTITY, SHARED, from_record, recorded
from training.recipe import Recipe
from training.registry import LOSSES, RULES
from utils import UsageError

ARGV = {script: ["--data_dir", "somewhere"] if script == "folder_train.py" else [] for script in SCRIPTS}


def test_settings_are_read_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse("cifar_train.py", []).lr = 1.0


def test_every_setting_says_what_it_affects_and_the_lists_follow():
    assert all(field.metadata["affects"] in settings.KINDS for field in FIELDS.values())
    assert set(SHARED) < set(IDENTITY)
    assert {"lr", "alpha", "epochs", "train_rule"} <= set(IDENTITY) - set(SHARED)
    assert not {"data_dir", "threads", "resume", "keep_epochs", "compile"} & set(IDENTITY)


def test_what_a_recipe_and_the_registry_read_affects_the_schedule():
    schedule = set(settings.fields_affecting("schedule"))
    constants = {name for entry in LOSSES.values() for name in entry.constants}
    starts = {entry.start for entry in RULES.values() if entry.start}
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"constants"}
    assert constants | starts | fields | {"beta"} <= schedule
    # and nothing of the schedule is left unread
    assert schedule == constants | starts | fields | {"beta"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_record_comes_back_as_the_settings_that_wrote_it(script):
    mine = parse(script, [*ARGV[script], "--alpha", "auto", "--milestones", "3", "7", "--seed", "4"])
    again = from_record(json.loads(json.dumps(recorded(mine))))
    assert again == mine


def test_an_older_record_lacks_the_newer_settings():
    record = {"dataset": "cifar10", "arch": "resnet32", "lr": 0.2, "milestones": [1], "use_norm": False, "processes": 2}
    found = from_record(record)
    assert (found.lr, found.milestones, found.schedule, found.processes) == (0.2, (1,), "step", 2)


BAD = {
    "lr": "x", "milestones": "abc", "loss_type": "XX", "epochs": 2.5, "seed": -1, "imb_factor": 7, "detach_ib": "yes",
    "lr_factors": [0.1, None], "alpha": [1], "dataset": 3.0, "ib_norm": None,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in BAD if name not in ("dataset", "ib_norm")])
def test_a_value_that_no_flag_takes_is_refused(name):
    with pytest.raises(ValueError, match=f"{name} is"):
        from_record({name: BAD[name]})


def test_given_flags_are_known():
    mine = parse("cifar_train.py", ["--lr=0.1", "-b", "64", "--detach_ib", "--mile", "5"])
    assert mine.given == {"lr", "batch_size", "detach_ib", "milestones"}


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["--pretrained", "imagenet"], "no ImageNet weights"),
        (["--schedule", "cosine", "--milestones", "3"], "cosine"),
        (["--posthoc_la", "1"], "-e"),
        (["--save_logits"], "-e"),
        (["-e"], "--resume"),
        (["--ib_norm", "none", "--loss_type", "IB", "--epsilon", "0"], "--epsilon"),
        (["--resume", "auto", "--overwrite"], "exclude"),
    ],
)
def test_combinations_that_cannot_work(argv, part):
    with pytest.raises(UsageError, match=part):
        parse("cifar_train.py", argv)


def test_names_of_folders():
    assert parse("cifar_train.py", []).name == "cifar10_resnet32_CE_None_exp_0.01_0"
    assert parse("folder_train.py", ["--data_dir", "a/birds"]).name == "birds_resnet50_CE_None_none_0"


def test_help_fits_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for script in SCRIPTS:
        text = build_parser(script).format_help()
        assert max(map(len, text.splitlines())) <= 80
        assert "(default: 160 180)" in text or script != "cifar_train.py"
