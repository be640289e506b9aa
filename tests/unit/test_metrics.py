"""Counted accuracies against accuracies worked out by hand."""

import pytest
import torch

from training import metrics


def counted(logits, target, num_classes, batches=3, confusion=True):
    found = metrics.MetricAccumulator(num_classes, "cpu", confusion)
    for z, y in zip(logits.chunk(batches), target.chunk(batches), strict=True):
        found.add(z, y, torch.nn.functional.cross_entropy(z, y, reduction="sum"))
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


@pytest.mark.parametrize("confusion", [True, False])
def test_class_accuracy_and_a_class_without_images(outputs, confusion):
    logits, target = outputs
    per_class, matrix = counted(logits, target, 7, confusion=confusion).per_class()
    for label in range(6):
        mine = logits.argmax(1)[target == label] == label
        assert per_class[label] == pytest.approx(100 * mine.float().mean().item())
    assert per_class[6] is None
    if confusion:
        expected = [[int(((target == i) & (logits.argmax(1) == j)).sum()) for j in range(7)] for i in range(7)]
        assert matrix == expected
    else:
        assert matrix is None


def test_fewer_than_five_classes_are_all_in_the_top_five():
    figures = counted(torch.randn(9, 3), torch.zeros(9, dtype=torch.int64), 3).read()
    assert figures["acc5"] == 100


def test_groups_are_means_of_class_accuracies_and_an_empty_one_is_none():
    figures = metrics.group_accuracy([90.0, 50.0, 30.0, None], [500, 101, 19, 5])
    assert figures == {"class_mean": pytest.approx(170 / 3), "many": 70.0, "medium": None, "few": 30.0}
