"""Counted accuracies against accuracies worked out by hand; an evaluation leaves the model as it was."""

import math

import numpy as np
import pytest
import torch
from script_runner import tiny
from sklearn.metrics import f1_score

from experiment.screen import print_classes
from training import metrics
from training.loop import evaluate


def counted(logits, target, num_classes):
    found = metrics.MetricAccumulator(num_classes, "cpu")
    for z, y in zip(logits.chunk(3), target.chunk(3), strict=True):
        found.add(z, y, torch.nn.functional.cross_entropy(z, y, reduction="sum"))
        found.seen += len(y)
    return found


@pytest.fixture
def outputs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(50, 7, generator=generator), torch.randint(0, 6, (50,), generator=generator)


def test_totals_equal_those_of_one_pass_over_uneven_batches(outputs):
    logits, target = outputs
    figures = counted(logits, target, 7).read()
    ranks = (logits > logits.gather(1, target[:, None])).sum(1)
    assert figures["seen"] == 50
    assert figures["acc1"] == pytest.approx(100 * (ranks < 1).float().mean().item())
    assert figures["acc5"] == pytest.approx(100 * (ranks < 5).float().mean().item())
    assert figures["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-6)


def test_class_accuracy_and_a_class_without_images(outputs, monkeypatch):
    logits, target = outputs
    per_class, matrix = counted(logits, target, 7).per_class()
    for label in range(6):
        mine = logits.argmax(1)[target == label] == label
        assert per_class[label] == pytest.approx(100 * mine.float().mean().item())
    assert per_class[6] is None
    assert matrix == [[int(((target == i) & (logits.argmax(1) == j)).sum()) for j in range(7)] for i in range(7)]
    monkeypatch.setattr(metrics, "MAX_CONFUSION_CLASSES", 6)
    assert counted(logits, target, 7).per_class() == (per_class, None)


def test_fewer_than_five_classes_are_all_in_the_top_five():
    figures = counted(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64), 3).read()
    assert figures["acc5"] == 100


def test_the_first_batch_whose_loss_is_not_finite():
    for of_batches, first in (([1.0, math.nan, 2.0], 1), ([math.inf, 1.0], 0), ([1.0, 2.0, 3.0], 3)):
        found = metrics.MetricAccumulator(3, "cpu", by_class=False)
        for loss in of_batches:
            found.add(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor(loss))
        assert found.first_bad() == first


def test_the_mean_factor_of_each_class_is_that_of_its_samples():
    found = metrics.MetricAccumulator(4, "cpu", by_class=False)
    found.add_factors(torch.tensor([1.0, 3.0, 10.0]), torch.tensor([0, 0, 2]))
    found.add_factors(torch.tensor([5.0]), torch.tensor([0]))
    assert found.mean_factors() == [3.0, None, 10.0, None]


def test_groups_are_means_of_class_accuracies_and_an_empty_one_is_none():
    names = ("class_mean", "many", "medium", "few")
    figures = {n: metrics.CLASS_FIGURES[n]([90.0, 50.0, 30.0, None], None, [500, 101, 19, 5]) for n in names}
    assert figures == {"class_mean": pytest.approx(170 / 3), "many": 70.0, "medium": None, "few": 30.0}


def test_macro_f1_is_scikit_learns_over_the_classes_with_images():
    rng = np.random.default_rng(0)
    target, predicted = rng.integers(0, 4, 60), rng.integers(0, 5, 60)  # class 4 is predicted and has no images
    confusion = [[int(((target == i) & (predicted == j)).sum()) for j in range(5)] for i in range(5)]
    expected = 100 * f1_score(target, predicted, labels=range(4), average="macro")
    assert metrics.macro_f1([], confusion, []) == pytest.approx(expected)
    assert metrics.CLASS_FIGURES["macro_f1"]([], None, []) is None


# ---------------------------------------------------------------------------------------------- evaluation


def test_of_many_classes_the_ten_worst_and_the_ten_best_are_printed(capsys):
    accuracy = [float(k % 211) / 3 for k in range(0, 210 * 7, 7)]  # of 210 classes, all different
    accuracy[5] = None  # without test images
    print_classes([f"class{k}" for k in range(210)], [k + 1 for k in range(210)], {"per_class": accuracy})
    first, head, *rows = capsys.readouterr().out.splitlines()
    assert first == "the 10 worst and best of 210 classes; the logs have all of them"
    assert head.split() == ["class", "train", "acc"]
    ranked = sorted((k for k in range(210) if k != 5), key=lambda k: accuracy[k])
    assert [row.split() for row in rows] == [
        [f"class{k}", str(k + 1), f"{accuracy[k]:.2f}"] for k in [*ranked[:10], *ranked[-10:]]
    ]


def test_an_evaluation_depends_on_no_order_or_batch_and_leaves_every_buffer_to_the_bit():
    """The model comes in training mode, as after an epoch: with batch statistics both would fail."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(60, 3, 32, 32, generator=generator, dtype=torch.float64) * 3 + 2
    target = torch.randint(0, 10, (60,), generator=generator)
    torch.manual_seed(0)
    model = tiny().double().train()
    model(images + torch.randn(60, 3, 1, 1, generator=generator))  # running statistics that are not these batches'
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert {name.split(".")[-1] for name in buffers} == {"running_mean", "running_var", "num_batches_tracked"}

    found = []
    for order in (torch.arange(60), target.argsort(), torch.randperm(60, generator=generator)):
        for size in (60, 16, 1):
            model.train()
            batches = zip(images[order].split(size), target[order].split(size), strict=True)
            found.append(evaluate(model, batches, [200, 100, 50, 20, 10] * 2))
            del found[-1]["seconds"]
            assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    losses = [figures.pop("loss") for figures in found]
    assert all(figures == found[0] for figures in found)
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)

    with torch.no_grad():
        logits = model.eval()(images)[0]
    assert (found[0]["seen"], found[0]["acc1"]) == (60, 100 * (logits.argmax(1) == target).sum().item() / 60)
    assert losses[0] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-6)
