"""Fig. 2: the influence of a checkpoint's training images, against the gradient that it stands for."""

import json

import numpy as np
import pytest
import torch
from script_runner import refused, run_reproduce

import imbalance_cifar
import models
import reproduce
from experiment import checkpoint
from experiment.parser import parse
from experiment.settings import recorded
from loaders.in_memory import InMemoryBatches
from paper import influence
from training.ema import Ema

ARGV = ["--dataset", "digits", "-a", "resnet20", "--imb_factor", "0.1", "--rand_number", "2", "--ib_norm", "l2"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a digits run whose loss wants another norm than Fig. 2; its weights are drawn, not trained."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    settings = recorded(parse("cifar_train.py", ARGV))
    state = {"epoch": 1, "state_dict": models.resnet20(10).state_dict(), "settings": settings}
    checkpoint.save(str(folder / checkpoint.NEWEST), state)
    return str(folder / checkpoint.NEWEST)


def digits():
    return imbalance_cifar.IMBALANCEDIGITS(imb_factor=0.1, rand_number=2)


def test_the_influence_is_the_l1_norm_of_the_gradient_in_the_last_layers_weights(trained):
    model = models.resnet20(10, feature_norm="l1")
    model.load_state_dict(checkpoint.load(trained)["state_dict"])
    data = digits().subset(np.arange(0, 400, 40))
    values, target = influence.influences(model.eval(), InMemoryBatches(data, 4).eval_epoch())
    assert target.tolist() == data.targets
    images = torch.cat([images for images, _ in InMemoryBatches(data, 4).eval_epoch()])
    for image, label, value in zip(images, target, values, strict=True):
        logits, _ = model(image[None])
        loss = torch.nn.functional.cross_entropy(logits, label[None])
        (gradient,) = torch.autograd.grad(loss, model.linear.weight)
        assert value.item() == pytest.approx(gradient.abs().sum().item(), rel=1e-3)


def test_a_run_with_ema_is_read_by_its_average(trained, tmp_path):
    average = models.resnet20(10)
    path = str(tmp_path / "ema.pth.tar")
    checkpoint.save(path, {**checkpoint.load(trained), "ema": Ema(average, 0.9).state_dict()})
    *_, model, _ = influence.trained(path, "nowhere")
    assert model.linear.weight.equal(average.linear.weight)


def test_the_most_influential_images_of_the_first_and_the_last_class(trained):
    found = influence.of_checkpoint(trained, "nowhere")
    model = models.resnet20(10)
    model.load_state_dict(checkpoint.load(trained)["state_dict"])
    values, target = influence.influences(model.eval(), InMemoryBatches(digits(), 64).eval_epoch())
    parts = [values[target == label].sort(descending=True).values for label in (0, 9)]
    largest = max(part.max() for part in parts)
    assert found["classes"] == ["0", "9"]
    assert found["images"] == [len(part) for part in parts] == [124, 12]
    assert [len(part) for part in found["influence"]] == [50, 12]
    for mine, part in zip(found["influence"], parts, strict=True):
        assert mine == pytest.approx((part[:50] / largest).tolist(), abs=5e-5)
    assert max(map(max, found["influence"])) == 1


def test_the_report_draws_it(trained, tmp_path, capsys):
    reproduce.main(["report", str(tmp_path), "--influence", trained, trained])
    assert "figure2.png" in capsys.readouterr().out
    content = json.loads((tmp_path / "figure2.json").read_text())
    assert content["balanced"] == content["long-tailed"] == influence.of_checkpoint(trained, "nowhere")
    assert "![figure2](figure2.png)" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figure2.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"dataset": "tinyimagenet"}, "does not say on which data"),
        ({"dataset": "digits", "loss_type": "XX"}, "loss_type is 'XX'"),
    ],
)
def test_a_foreign_checkpoint_is_one_line(settings, reason, trained, tmp_path):
    state = checkpoint.load(trained)
    state["settings"] = settings
    torch.save(state, tmp_path / "foreign.pth.tar")
    argv = ["report", tmp_path, "--influence", tmp_path / "foreign.pth.tar", trained]
    refused(argv, tmp_path, "foreign.pth.tar", reason, status=1, run=run_reproduce)
