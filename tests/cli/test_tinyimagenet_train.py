"""tinyimage_train.py through main(argv): recipes, runs, weights to start from."""

import collections
import csv
import functools
import io
import json
import os
import shutil
from unittest import mock
from urllib.error import URLError

import image_runs
import pytest
import script_runner
import torch
from conftest import golden
from script_runner import assert_same_weights, load_checkpoint, log_folder, model_folder, read_csv, run_script
from tinyimagenet_maker import FOLDER, make_layout, pack
from torch import nn
from torchvision.models import WeightsEnum

import imbalance_tinyimagenet as tiny
import models
import tinyimage_train
from experiment.parser import parse

#: A run on 200 classes of 1 to 3 training images, 290 in all, and one validation image each.
RUN = ["--imb_factor", "0.4", "--image_size", "16", "--epochs", "3", "--threads", "1", "--seed", "0", "-j", "1"]
SCRIPT = "tinyimage_train.py"
IB = ["--loss_type", "IB", "--train_rule", "IBReweight", "--start_ib_epoch", "2"]
#: What the official README's two commands share.
PUBLISHED = (
    "--dataset tinyimagenet -a resnet18 --imb_type exp --imb_factor 0.01 --epochs 100 --lr 0.1 --num_classes 200"
)
NO_WEIGHTS = ["--pretrained", "none"]
#: What names the folders of a run, beside loss, rule and experiment.
NAMED = {"dataset": "tinyimagenet", "arch": "resnet18", "imb": "exp_0.4"}


def small(num_classes=1000, use_norm=False, feature_norm="l1"):
    """Stands for resnet18 where the model does not matter: a convolution, a batch norm, a head named fc."""
    layers = {"conv1": nn.Conv2d(3, 16, 4, stride=4, bias=False), "bn1": nn.BatchNorm2d(16), "relu": nn.ReLU()}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten()}
    layers["fc"] = models.NormedLinear(16, num_classes) if use_norm else nn.Linear(16, num_classes)
    return models.with_feature_norm(nn.Sequential(collections.OrderedDict(layers)), "fc", feature_norm)


@pytest.fixture(autouse=True)
def small_resnet18(monkeypatch):
    monkeypatch.setitem(models.IMAGENET_MODELS, "resnet18", small)


run_in = functools.partial(image_runs.run_in, script=tinyimage_train)
refused = functools.partial(script_runner.refused, run=functools.partial(run_script, tinyimage_train))


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """The archive of 200 classes."""
    root = tmp_path_factory.mktemp("raw")
    make_layout(root, classes=200, train=3, val=1)
    return pack(root, root / tiny.ARCHIVE)


@pytest.fixture(scope="module")
def data(raw, tmp_path_factory):
    """A data folder with the archive in order."""
    folder = tmp_path_factory.mktemp("work") / "data"
    tiny.arrange(folder, raw)
    return folder


@pytest.fixture
def work(data, tmp_path):
    """A folder to run in, with the data."""
    (tmp_path / "data").symlink_to(data)
    return tmp_path


# ------------------------------------------------------------------------------------------------- recipes


def dry_run(tmp_path, *args):
    out = run_in(tmp_path, *args, "--dry_run")
    assert os.listdir(tmp_path) == []
    return list(csv.DictReader(io.StringIO(out)))


def test_golden_learning_rates(tmp_path):
    rows = {key: value for key, value in golden("lr.json").items() if key.startswith("tinyimagenet/")}
    assert len(rows) == 10
    for key, expected in rows.items():
        _, loss, start = key.split("/")
        found = dry_run(tmp_path, "--loss_type", loss, "--start_ib_epoch", start)
        assert [float(row["lr"]) for row in found] == expected, key
        assert [int(row["epoch_from_0"]) for row in found] == list(range(100))


def test_published_commands(tmp_path):
    common = PUBLISHED.split()
    plain = dry_run(tmp_path, *common, "--loss_type", "CE", "--train_rule", "None")
    assert plain == dry_run(tmp_path)
    assert {(row["loss"], row["class_weights"], row["sampler"]) for row in plain} == {("CE", "none", "none")}
    balanced = dry_run(tmp_path, *common, *IB, "--start_ib_epoch", "50")
    assert balanced[:50] == plain[:50]
    assert {(row["loss"], row["class_weights"]) for row in balanced[50:]} == {("IB", "IB")}


def lr_at(rows, *epochs):
    return [pytest.approx(float(rows[epoch]["lr"]), rel=1e-12) for epoch in epochs]


def test_paper_recipe(tmp_path):
    for loss in ("CE", "IB"):
        rows = dry_run(tmp_path, "--recipe", "paper", "--loss_type", loss)
        assert len(rows) == 100
        assert lr_at(rows, 4, 49, 50, 89, 90, 99) == [0.1, 0.1, 0.01, 0.01, 0.001, 0.001]
        assert [rows[49]["loss"], rows[50]["loss"]] == ["CE", loss]
    moved = dry_run(tmp_path, "--recipe", "paper", "--loss_type", "IB", "--start_ib_epoch", "40", "--milestones", "60")
    assert lr_at(moved, 39, 40, 59, 60) == [0.1, 0.1, 0.1, 0.01]
    assert moved[40]["loss"] == "IB"


def test_ldam_recipe(tmp_path):
    rows = dry_run(tmp_path, "--recipe", "ldam", "--loss_type", "LDAM", "--train_rule", "DRW")
    assert len(rows) == 120
    assert lr_at(rows, 4, 89, 90, 119) == [0.1, 0.1, 0.01, 0.01]
    assert [rows[89]["class_weights"], rows[90]["class_weights"]] == ["none", "CB"]
    settings = parse(SCRIPT, ["--recipe", "ldam"])
    assert (settings.image_size, settings.crop, settings.pretrained) == (64, "padded", None)
    assert parse(SCRIPT, ["--recipe", "ldam", "--image_size", "48"]).image_size == 48


# ---------------------------------------------------------------------------------------------------- runs


def test_from_the_raw_archive_to_a_model(raw, tmp_path):
    """Two epochs of CE and one of IB, records, evaluation; the archive arranged on the way."""
    (tmp_path / "data").mkdir()
    shutil.copy(raw, tmp_path / "data")
    out = run_in(tmp_path, *RUN, *IB, *NO_WEIGHTS)
    assert "total 290" in out
    assert (tmp_path / "data" / FOLDER / "val" / "n00001000").is_dir()
    log, saved = (folder(tmp_path, "IB", "IBReweight", **NAMED) for folder in (log_folder, model_folder))
    train, test = read_csv(log / "log_train.csv"), read_csv(log / "log_test.csv")
    assert [row["criterion"] for row in train] == ["CE", "CE", "IB"]
    assert all(float(row["loss"]) > 0 for row in train)
    assert [row["epoch_from_0"] for row in test] == ["0", "1", "2"]
    # words.txt's names are printed for the user, the ids in the checkpoint
    assert list(read_csv(log / "class_accuracy.csv")[0])[:2] == ["epoch_from_0", "digit (n00001000)"]
    assert len(read_csv(log / "class_accuracy.csv")[0]) == 201
    assert "digit (n00001199)" in out
    state = load_checkpoint(saved / "ckpt.pth.tar")
    assert state["classes"][:2] == ["n00001000", "n00001001"]
    assert state["epoch"] == 3
    assert state["state_dict"]["fc.weight"].shape == (200, 16)
    assert json.loads((log / "summary.json").read_text())["split"]["total"] == 290
    run_in(tmp_path, *RUN, *IB, *NO_WEIGHTS, "-e", "--resume", "auto")
    evaluation = json.loads((log / "evaluate" / "evaluation.json").read_text())
    assert evaluation["acc1"] == float(test[2]["acc1"])
    assert evaluation["seen"] == 200
    wrong = read_csv(log / "evaluate" / "errors.csv")
    assert all((tmp_path / "data" / row["file"]).is_file() for row in wrong)
    assert len(wrong) == round(200 - 2 * evaluation["acc1"])
    assert "nothing to do" in run_in(tmp_path, *RUN, *IB, *NO_WEIGHTS)


def ended_with(work, *args):
    """The last checkpoint of a run of two epochs."""
    run_in(work, *RUN, *NO_WEIGHTS, "--epochs", "2", "--overwrite", *args)
    (path,) = (work / "checkpoint").glob("*/ckpt.pth.tar")
    return load_checkpoint(path)


def test_resample_on_a_step_beside_a_held_out_part(work):
    """Of 3 images in 100 classes one is held out; the others have int(3 * 0.4) = 1, which stays."""
    state = ended_with(work, "--train_rule", "Resample", "--val_fraction", "0.3", "--imb_type", "step")
    assert state["class_counts"] == [2] * 100 + [1] * 100
    assert [record["stage"]["sampler"] for record in state["history"]] == ["Resample"] * 2
    assert [(record["train"]["seen"], record["val"]["seen"]) for record in state["history"]] == [(300, 100)] * 2


def test_padded_crops_and_the_normalised_head_of_the_ldam_recipe(work):
    args = ["--recipe", "ldam", "--loss_type", "LDAM", "--train_rule", "DRW", "--drw_epoch", "1", "--image_size", "16"]
    padded, resized = (ended_with(work, *args, *crop)["state_dict"] for crop in ([], ["--crop", "resized"]))
    assert not padded["conv1.weight"].equal(resized["conv1.weight"])
    assert "fc.bias" not in padded  # LDAM's s = 30 is for cosines, which the official script does not give it


# ---------------------------------------------------------------------------------------- ImageNet's weights


def imagenet_like(num_classes=1000):
    """A state dict as in torchvision's files: 1000 classes, no counters of batch norm."""
    with torch.random.fork_rng():
        torch.manual_seed(9)
        state = small(num_classes).state_dict()
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


def started_from(work, *args):
    """The weights that a run with lr 0 ends with."""
    run_in(work, *RUN, "--epochs", "1", "--lr", "0", "--wd", "0", "--overwrite", *args)
    return load_checkpoint(next((work / "checkpoint").glob("*/ckpt.pth.tar")))["state_dict"]


def test_imagenet_weights_are_the_default(work):
    with mock.patch.object(WeightsEnum, "get_state_dict", return_value=imagenet_like()) as get:
        state = started_from(work, "--loss_type", "LDAM")
    assert get.call_args.kwargs["check_hash"] is True
    assert state["conv1.weight"].equal(imagenet_like()["conv1.weight"])
    assert 200 in state["fc.weight"].shape
    default, *others = (parse(SCRIPT, args).pretrained for args in ([], ["--pretrained"], ["--pretrained", "imagenet"]))
    assert others == [default] * 2


def test_weights_of_a_file(work):
    torch.save(imagenet_like(), work / "imagenet.pth")
    state = started_from(work, "--pretrained", "imagenet.pth")
    assert state["conv1.weight"].equal(imagenet_like()["conv1.weight"])
    torch.save({"state_dict": imagenet_like(200)}, work / "tiny.pth.tar")
    state = started_from(work, "--pretrained", "tiny.pth.tar")
    assert state["fc.weight"].equal(imagenet_like(200)["fc.weight"])
    torch.save({name: t for name, t in imagenet_like().items() if name != "conv1.weight"}, work / "bad.pth")
    refused([*RUN, "--pretrained", "bad.pth", "--exp_str", "b"], work, "conv1.weight", status=1)


def test_no_network(work):
    with mock.patch.object(WeightsEnum, "get_state_dict", side_effect=URLError("no route")):
        refused(RUN, work, "resnet18", "no route", "--pretrained PATH", "--pretrained none", status=1)


def test_weights_are_not_asked_for_twice(work):
    with mock.patch.object(WeightsEnum, "get_state_dict", return_value=imagenet_like()):
        run_in(work, *RUN, "--keep_epochs", "2")
    saved, forked = (model_folder(work, exp=exp, **NAMED) for exp in ("0", "b"))
    with mock.patch.object(WeightsEnum, "get_state_dict", side_effect=AssertionError):
        run_in(work, *RUN, "-e", "--resume", "auto")
        run_in(work, *RUN, "--exp_str", "b", "--resume", saved / "ckpt.epoch002.pth.tar")
    assert_same_weights(saved / "ckpt.pth.tar", forked / "ckpt.pth.tar")
