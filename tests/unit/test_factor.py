"""The experiment on the influence factor: which run is which, the chosen ratios, contrasts by hand, shares by p."""

import dataclasses
import json
import re

import pytest
import torch
from script_runner import tiny

import imbalance_cifar
import models
from experiment import checkpoint
from experiment.parser import parse
from experiment.settings import recorded
from imbalance import class_counts
from loaders.in_memory import InMemoryBatches
from losses import CrossEntropyLoss, IBLoss
from paper import factor, records
from paper.runs import Run
from training.gradients import match_gradient
from training.recipe import Recipe
from utils import DataError

IB, CE = Run("cifar10", "exp", 100, "IB"), Run("cifar10", "exp", 100, "CE")
RATIOS = ("third", "1", "3")
PLAIN = {"lr": 0.1, "loss": "CE", "class_weights": "none", "sampler": "none"}
PILOT = ("--epochs", "160", "--milestones", "--lr_factors")


def record(run, plateau, *extra, val=None, best=90.0, **settings):
    """A record of a Run with further flags: 50 before, and `plateau` in its last tenth; `best`: of its best epoch."""
    wanted, images = records.command_settings(run, extra), [500] * 100 if run.dataset == "cifar100" else [5000] * 10
    n = wanted.epochs
    figures = [50.0] * (n - n // 10) + [plateau] * (n // 10)
    history = [
        {
            "epoch": i,
            "stage": {"lr": 0.1, "loss": "IB"},
            "test": {"acc1": value, "acc5": value, "class_mean": value, "loss": 1.0},
            "val": val and {"class_mean": val, "acc1": val},
            "gradient": None,
        }
        for i, value in enumerate(figures)
    ]
    return {
        "settings": {**recorded(wanted), **settings}, "history": history, "best": {"epoch": 7, "acc1": best},
        "last": history[-1]["test"], "epochs_done": n, "classes": [], "group_rule": "",
        "class_counts": class_counts(images, "exp", 1 / run.ratio),
    }  # fmt: skip


def arm(name, seed=0):
    return dataclasses.replace(IB, variant=name, seed=seed)


@pytest.fixture
def read(tmp_path):
    """A function that reads records back from a folder."""

    def read(*made):
        for number, one in enumerate(made):
            summary = tmp_path / "summary"
            summary.write_text(json.dumps(one))
            records.collect(summary, tmp_path / f"{number}.json")
        return factor.read(tmp_path)

    return read


@pytest.mark.parametrize(
    ("run", "extra", "place"),
    [
        (arm("weights-grad3"), PILOT, ("W", 3.0, 0)),
        (arm("attached-gradthird", seed=2), (), ("A", 1 / 3, 2)),
        (arm("detached-grad1"), ("--amp", "bf16", "--val_left_out", "500"), ("D", 1.0, 0)),
        (IB, (), ("IB", 0.0, 0)),
        (CE, (), ("CE", 0.0, 0)),
        (dataclasses.replace(CE, variant="ib-lr"), (), ("CE, lr of IB", 0.0, 0)),
        (arm("detached"), (), None),
        (arm("l1-auto"), (), None),
        (arm("start020"), (), None),
        (dataclasses.replace(IB, ratio=10), (), None),
        (IB, ("--epsilon", "0.02"), None),
        (dataclasses.replace(CE, protocol="short"), (), None),
        (Run("digits", "exp", 100, "CE"), (), None),
    ],
)
def test_runs_are_told_apart_by_what_they_do(run, extra, place):
    assert factor.place_of(record(run, 70.0, *extra)) == place


@pytest.mark.parametrize(
    ("forced", "place"),
    [
        ("amp is 'none' there and 'bf16' here", ("CE", 0.0, 0)),
        ("amp is 'none' there and 'bf16' here; seed is 1 there and 0 here", None),
        ("seed is 1 there and 0 here", None),
    ],
)
def test_force_may_have_passed_over_another_precision_only(forced, place):
    assert factor.place_of({**record(CE, 70.0, "--amp", "bf16"), "forced": [forced]}) == place


def pilot(scores, seed=0):
    """Records of a pilot: name of an arm -> (test, left-out images)."""
    return [record(arm(name, seed), test, *PILOT, val=val) for name, (test, val) in scores.items()]


def test_an_arm_takes_the_ratio_of_the_left_out_images_once_all_three_are_there(read):
    """Attached: ratio 3, though it is worse on the test set. Detached has two ratios only."""
    made = pilot({
        "attached-gradthird": (79, 60), "attached-grad1": (80, 60.5), "attached-grad3": (73, 61),
        "weights-gradthird": (70, 49), "weights-grad1": (70, 50), "weights-grad3": (90, 50),
        "detached-grad1": (70, 50), "detached-grad3": (70, 50),
    })  # fmt: skip
    assert factor.choose(read(*made)) == {"A": 3.0, "W": 1.0}
    whole = record(arm("attached-grad3"), 60.0, val=20.0)  # its first 160 epochs are the pilot's
    whole["history"][:160] = next(one for one in made if one["settings"]["auto_ratio"] == 3.0)["history"]
    assert factor.choose(read(*made, whole)) == {"A": 3.0, "W": 1.0}
    whole["settings"]["amp"] = "bf16"  # beside float32: no choice
    assert factor.choose(read(*made, whole)) == {"W": 1.0}


def test_contrasts_are_paired_means_over_seeds_of_one_precision_first_phase_and_length(read, capsys):
    made = pilot({
        "attached-gradthird": (79, 60), "attached-grad1": (80, 60), "attached-grad3": (73, 61),
        "weights-gradthird": (70, 49), "weights-grad1": (70, 50), "weights-grad3": (90, 49),
    })  # fmt: skip
    for seed, (attached, weights) in enumerate([(73, 70), (75, 72.5)]):
        made += [record(arm("attached-grad3", seed), attached, val=61)]
        made += [record(arm("weights-grad1", seed), weights, val=50)]
    made += [record(IB, 76), record(CE, 70), record(dataclasses.replace(IB, seed=1), 76, "--amp", "bf16")]
    made += [record(dataclasses.replace(CE, seed=1), 70)]
    made += [record(dataclasses.replace(run, seed=2), 70) for run in (IB, CE)]
    for one, before in zip(made[-2:], (50.0, 51.0), strict=True):
        one["history"][0] = {**one["history"][0], "stage": PLAIN, "test": {"acc1": before}}
    found = read(*made)
    got = {name: (c.n, round(c.mean, 2), c.verdict) for name, c in factor.contrasts(found).items()}
    assert got == {
        "A - W, at the chosen ratios 3 and 1": (2, 2.75, "judged at 3 or 6 seeds"),
        "A - W, at ratio 1, to epoch 160": (1, 30.0, "one seed"),  # W's whole run has 50 there
        "IB - CE, +6.00, minus the published 7.39": (1, -1.39, "one seed"),
    }
    messages = capsys.readouterr().err
    assert [f"of seed {seed} have two precisions or two" in messages for seed in (0, 1, 2)] == [False, True, True]
    first, *_ = factor.tables(found)["contrasts"][1]
    assert (first[:3], first[4]) == (["A - W, at the chosen ratios 3 and 1", 2, "+2.75"], ""), "no p at two seeds"
    assert factor.tables(found)["ratios"][1] == [
        ["1/3", "+9.00 (1)", "", ""],
        ["1", "+30.00 (1)", "", ""],
        ["3", "-40.00 (1)", "", ""],
    ]


def test_a_verdict_counts_all_contrasts_of_the_plan_and_the_gain_has_its_own_words(read):
    """Differences of 10, 10.1, 10.2: t = 175 with 2 degrees of freedom, p = 3.2e-5, times the plan's 7 contrasts."""
    made = []
    for seed, value in enumerate((80.0, 80.1, 80.2)):
        made += pilot({"attached-grad1": (value, 60), "weights-grad1": (70, 60)}, seed)
        made += [record(dataclasses.replace(IB, seed=seed), value - 5), record(dataclasses.replace(CE, seed=seed), 70)]
    of_files = read(*made)
    _, (gain,) = factor.tables(of_files)["gain"]
    assert gain == ["IB", "+7.39", 3, *["+5.10 ± 0.10"] * 3]
    found = factor.contrasts(of_files)
    adds = found["A - W, at ratio 1, to epoch 160"]
    assert (adds.verdict, adds.p) == ("adds", pytest.approx(7 * 3.27e-5, rel=0.02))
    assert found["IB - CE, +5.10, minus the published 7.39"].verdict == "below the published"


def test_between_two_looks_the_first_three_seeds_stand(read):
    values = (80.0, 80.1, 80.2, 59.7)
    made = [record(arm("attached-grad1", seed), value, *PILOT) for seed, value in enumerate(values)]
    made += [record(arm("weights-grad1", seed), 70, *PILOT) for seed in range(4)]
    of_files, name = read(*made), "A - W, at ratio 1, to epoch 160"
    found = {key: (c.n, round(c.mean, 2), c.verdict) for key, c in factor.contrasts(of_files).items()}
    assert found == {name: (3, 10.1, "adds"), f"{name}, all seeds so far": (4, 5.0, "judged at 3 or 6 seeds")}


def test_an_arm_that_chose_ratio_1_is_compared_to_epoch_160_until_its_whole_run_is_there(read):
    scores = {f"{name}-grad{ratio}": (70, 50 + (ratio == "1")) for name in ("attached", "weights") for ratio in RATIOS}
    made = pilot(scores)
    assert list(factor.contrasts(read(*made))) == ["A - W, at ratio 1, to epoch 160"]
    made += [record(arm(f"{name}-grad1"), 70, val=50) for name in ("attached", "weights")]
    for one in made[-2:]:
        one["history"][:160] = made[1]["history"]
    assert list(factor.contrasts(read(*made))) == ["A - W, at the chosen ratios 1 and 1"]


def test_the_epoch_that_the_left_out_images_choose_is_not_the_best_of_the_test_set(read):
    heads, (line,) = factor.tables(read(record(arm("attached-grad1"), 80.0, *PILOT, val=60.0, best=75.0)))["runs"]
    assert line[:5] == ["A", "1", 0, 160, "float32"]
    assert dict(zip(heads[5:], line[5:], strict=True)) == {
        "left-out": "60.00", "their epoch": "7", "test there": "75.00", "best": "80.00", "to 160": "80.00",
        "plateau": "", "last": "80.00",
    }  # fmt: skip
    whole = [record(dataclasses.replace(IB, seed=seed), 70.0 + seed, val=60.0, best=75.0 + seed) for seed in (0, 1)]
    *_, mean = factor.tables(read(*whole))["published"][1]
    assert (mean[0], mean[2], mean[4]) == ("mean", "75.50 ± 0.71", "70.50 ± 0.71")


def test_differences_beside_the_plan_have_their_mean_and_interval(read):
    """Of 1 and 2: Student's t with 1 degree of freedom, 12.706 times 0.5. One run without left-out images."""
    made = [record(dataclasses.replace(CE, seed=seed), 70.0) for seed in (0, 1)]
    made += [record(dataclasses.replace(IB, seed=0), 71.0, val=60.0, best=75.0)]
    made += [record(dataclasses.replace(IB, seed=1), 72.0)]
    lines = {name: line for name, *line in factor.tables(read(*made))["unplanned"][1]}
    assert lines["IB - CE, plateau"] == [2, "+1.50", "-4.85 to +7.85"]
    assert lines["IB - the published 78.26, epoch of the left-out images"] == [1, "-3.26", ""]
    assert lines["IB - the published 78.26, last"] == [2, "-6.76", "-13.11 to -0.41"]


def test_two_runs_of_one_place_and_an_incomplete_record_are_named(read, tmp_path, capsys):
    (tmp_path / "cut.json").write_text('{"settings": ')
    with pytest.raises(DataError, match="two runs of A, ratio 1, seed 0"):
        read(*pilot({"attached-grad1": (80, 60)}), record(arm("attached-grad1"), 81, *PILOT, val=60))
    with pytest.raises(DataError, match="one data set"):
        factor.read(tmp_path / "nothing")
    with pytest.raises(DataError, match="one data set"):
        read(*pilot({"attached-grad1": (80, 60)}), record(Run("cifar100", "exp", 100, "CE"), 38))
    read_again = factor.read
    (tmp_path / "1.json").unlink()
    read_again(tmp_path)
    assert "cut.json: damaged or cut short" in capsys.readouterr().err


@pytest.fixture(scope="module")
def of_an_arm(tmp_path_factory):
    """(checkpoint of a run whose gradient was to be half of CE's, the norm of CE's when alpha was set)."""
    argv = ["--dataset", "digits", "-a", "resnet20", "-b", "8", "--loss_type", "IB", "--start_ib_epoch", "0"]
    settings = parse("cifar_train.py", [*argv, "--alpha", "auto", "--auto_ratio", "0.5", "--seed", "3"])
    torch.manual_seed(0)
    model, data = models.resnet20(10), imbalance_cifar.IMBALANCEDIGITS()
    recipe = Recipe(settings)
    criterion = recipe.criterion(recipe.stage(0), data.get_cls_num_list())
    found = match_gradient(model, InMemoryBatches(data, 8, seed=3).train_epoch(1), criterion)
    state = {"epoch": 1, "state_dict": model.state_dict(), "criterion": criterion.state_dict()}
    path = str(tmp_path_factory.mktemp("of_an_arm") / checkpoint.NEWEST)
    checkpoint.save(path, {**state, "settings": recorded(settings)})
    return path, found["ce"]


def test_the_norms_of_a_checkpoint_are_those_that_set_its_alpha(of_an_arm):
    """Measured on the batches on which alpha was matched, the ratio is the one that was asked for."""
    path, ce = of_an_arm
    assert factor.norms_after(path, "nowhere") == (1, pytest.approx(ce), pytest.approx(0.5 * ce))


def test_the_norms_of_records_and_checkpoints_are_printed_and_the_figure_is_drawn(of_an_arm, read, tmp_path, capsys):
    made = pilot({"attached-gradthird": (70, 60), "weights-grad1": (71, 60)})
    for one, again in zip(made, (None, 0.35), strict=True):
        one["history"][100]["gradient"] = {"ce": 2.5, "loss": 0.75, "ratio": 0.3, "again": again}
    read(*made)
    path, ce = of_an_arm
    factor.main([str(tmp_path), "--data_dir", "nowhere", "--arms", path])
    out = capsys.readouterr().out
    assert "| A | 1/3 | 0 | 2.50 | 0.75 | 0.30 |  |\n| W | 1 | 0 | 2.50 | 0.75 | 0.30 | 0.35 |\n" in out
    (line,) = [line for line in out.splitlines() if line.startswith(path)]
    assert line.startswith(f"{path}, after 1 epochs: gradient of CE ")
    numbers = [float(number) for number in re.findall(r"\d+\.\d+", line.removeprefix(path))]
    assert numbers == pytest.approx([ce, 0.5 * ce, 0.5], abs=6e-4)
    assert (tmp_path / "factor.png").read_bytes().startswith(b"\x89PNG")


def test_shares_of_the_gradient_are_those_of_a_slow_formula():
    torch.manual_seed(0)
    model = tiny().eval()
    with torch.no_grad():
        model.linear.weight.mul_(200)
    images = torch.randn(40, 3, 32, 32)
    logits, features = (part.detach() for part in model(images))
    target = logits.argmax(1)
    target[:10] = 3
    expected = torch.zeros(5)
    for z, h, y in zip(logits, features, target, strict=True):
        p = z.softmax(0)
        size = float(((p - torch.nn.functional.one_hot(y, 10)).abs().sum() * h).item())  # of CE
        expected[sum(float(p[y]) >= bound for bound in factor.BINS[1:-1])] += size
    shares = factor.gradient_shares(model, [(images, target)], CrossEntropyLoss())
    torch.testing.assert_close(torch.tensor(shares), 100 * expected / expected.sum(), rtol=1e-3, atol=1e-3)
    detached = factor.gradient_shares(model, [(images, target)], IBLoss(detach=True))
    assert detached[-1] > shares[-1]  # the detached factor lifts the images that are fitted
