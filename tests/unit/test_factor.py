"""The experiment on the influence factor: which run is which, the chosen ratios, contrasts by hand, shares by p."""

import json

import pytest
import torch
from script_runner import tiny

import imbalance_cifar
import models
from experiment import checkpoint
from experiment.parser import parse
from experiment.settings import recorded
from loaders.in_memory import InMemoryBatches
from losses import CrossEntropyLoss, IBLoss
from paper import factor, records
from training.gradients import match_gradient
from training.recipe import Recipe

BASE = {"dataset": "cifar10", "arch": "resnet32", "loss_type": "IB", "train_rule": "IBReweight", "epochs": 20}


def record(settings, test, val=None):
    """A record of 20 epochs whose last two have these accuracies."""
    epochs = [50.0] * 18 + list(test)
    figures = [{"acc1": a, "acc5": a, "class_mean": a, "loss": 1.0} for a in epochs]
    history = [
        {
            "epoch": i,
            "stage": {"lr": 0.1, "loss": "IB"},
            "test": t,
            "val": val and {"class_mean": val, "acc1": val},
            "gradient": None,
        }
        for i, t in enumerate(figures)
    ]
    best = max(figures, key=lambda test: test["acc1"])
    return {
        "settings": {**BASE, **settings}, "history": history, "best": {"epoch": 0, **best},
        "last": {"epoch": 19, **figures[-1]}, "epochs_done": 20, "classes": [], "class_counts": [], "group_rule": "",
    }  # fmt: skip


def automatic(ratio, seed=0, **settings):
    return {"alpha": "auto", "auto_target": "gradient", "auto_ratio": ratio, "seed": seed, **settings}


@pytest.mark.parametrize(
    ("settings", "arm"),
    [
        (automatic(3.0, ib_norm="none"), "W"), (automatic(3.0), "A"), (automatic(3.0, detach_ib=True), "D"),
        ({"alpha": 1000.0}, "IB"), ({"loss_type": "CE", "train_rule": "None"}, "CE"),
        ({"alpha": 1000.0, "detach_ib": True}, None), ({"alpha": "auto"}, None),
    ],
)  # fmt: skip
def test_runs_are_told_apart_by_what_they_do(settings, arm):
    place = factor.place_of(record(settings, (70, 71)))
    assert (place and place.arm) == arm


def test_contrasts_are_the_paired_means_at_the_chosen_ratios(tmp_path):
    """Attached: ratio 3 is better on the left-out images though not on the test set."""
    weights = {"ib_norm": "none"}
    chosen = {**record({}, (0, 0))["best"], "epoch": 0, "acc1": 75.0}
    made = [
        record(automatic(1.0), (80, 80), val=60.0) | {"best": chosen}, record(automatic(3.0), (72, 74), val=61.0),
        record(automatic(1.0, **weights), (70, 70), val=50.0), record(automatic(3.0, **weights), (90, 90), val=49.0),
        record(automatic(3.0, seed=1), (75, 75)), record(automatic(1.0, seed=1, **weights), (71, 73)),
    ]  # fmt: skip
    for number, one in enumerate(made):
        summary = tmp_path / "summary"
        summary.write_text(json.dumps(one))
        records.collect(summary, tmp_path / f"{number}.json")
    found = factor.read(tmp_path)
    assert factor.choose(found) == {"A": 3.0, "W": 1.0}
    contrast = factor.contrasts(found, "cifar10")["A - W, at the chosen ratios"]
    assert (contrast.n, contrast.mean) == (2, pytest.approx((73 - 70 + 75 - 72) / 2))
    lines = factor.tables(found, "cifar10")
    assert any("A - W, at the chosen ratios | 2 | +3.00" in line for line in lines)
    # the records' best is the left-out images' choice; the test set's own is 80
    assert "| A | 0 | 20 |  |  |  |  | 60.00 | 0 | 75.00 | 80.00 | 80.00 | 80.00 |" in lines


def test_the_norms_of_a_checkpoint_are_those_that_set_its_alpha(tmp_path):
    """Measured on the batches on which alpha was matched, the ratio is the one that was asked for."""
    argv = ["--dataset", "digits", "-a", "resnet20", "-b", "8", "--loss_type", "IB", "--start_ib_epoch", "0"]
    settings = parse("cifar_train.py", [*argv, "--alpha", "auto", "--auto_ratio", "0.5", "--seed", "3"])
    torch.manual_seed(0)
    model, data = models.resnet20(10), imbalance_cifar.IMBALANCEDIGITS()
    recipe = Recipe.from_settings(settings)
    criterion = recipe.criterion(recipe.stage(0), data.get_cls_num_list())
    found = match_gradient(model, InMemoryBatches(data, 8, seed=3).train_epoch(1), criterion)
    state = {"epoch": 1, "state_dict": model.state_dict(), "criterion": criterion.state_dict()}
    checkpoint.save(str(tmp_path / checkpoint.NEWEST), {**state, "settings": recorded(settings)})
    epochs, ce, loss = factor.norms_after(str(tmp_path / checkpoint.NEWEST), "nowhere")
    assert (epochs, ce, loss) == (1, pytest.approx(found["ce"]), pytest.approx(0.5 * found["ce"]))


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
