"""The norm of a gradient against autograd's own, and the alpha that gives it a wanted size."""

import copy
import math

import pytest
import torch
from script_runner import tiny

import models
from losses import CrossEntropyLoss, IBLoss
from training import gradients
from training.precision import Precision
from utils import DataError

WEIGHT = torch.linspace(0.5, 1.5, 10)


def batches(number=4, size=16):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, 3, 32, 32, generator=generator), torch.randint(10, (size,), generator=generator))
        for _ in range(number)
    ]


def model():
    torch.manual_seed(1)
    return tiny()


def automatic(**options):
    return IBLoss(WEIGHT, alpha="auto", auto_target="gradient", **options)


def slow_norm(network, criterion, data):
    """The mean over the batches of the norm of all parameters' gradients, by backward()."""
    norms = []
    for images, target in data:
        network = copy.deepcopy(network).train()
        network.zero_grad()
        logits, features = network(images)
        criterion(logits, target, features).backward()
        norms.append(math.sqrt(sum(float((p.grad.double() ** 2).sum()) for p in network.parameters())))
    return sum(norms) / len(norms)


@pytest.mark.parametrize("options", [{}, {"norm": "none"}, {"detach": True}])
def test_norms_are_those_of_backward(options):
    fixed = IBLoss(WEIGHT, alpha=1.0, **options)
    found = gradients.gradient_norms(model(), batches(), automatic(**options))
    expected = [slow_norm(model(), criterion, batches()) for criterion in (CrossEntropyLoss(), fixed)]
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ratio", [1 / 3, 1.0, 3.0])
def test_the_gradient_has_the_wanted_size(ratio):
    criterion = automatic(auto_ratio=ratio)
    said = gradients.match_gradient(model(), batches(), criterion)
    alpha = float(criterion.current_alpha)
    ce, loss = (slow_norm(model(), of, batches()) for of in (CrossEntropyLoss(), IBLoss(WEIGHT, alpha=alpha)))
    assert loss / ce == pytest.approx(ratio, rel=1e-5)
    assert said.pop("again") is None
    assert said == pytest.approx({"ce": ce, "loss": loss, "ratio": ratio}, rel=1e-5)


def test_a_doubled_loss_gets_half_the_alpha():
    alphas = []
    for weight in (WEIGHT, 2 * WEIGHT):
        criterion = IBLoss(weight, alpha="auto", auto_target="gradient")
        gradients.match_gradient(model(), batches(), criterion)
        alphas.append(float(criterion.current_alpha))
    assert alphas[0] == pytest.approx(2 * alphas[1], rel=1e-6)


def test_the_next_batches_measure_again(monkeypatch):
    monkeypatch.setattr(gradients, "BATCHES", 2)
    criterion = automatic()
    again = gradients.match_gradient(model(), batches(4), criterion)["again"]
    alpha = float(criterion.current_alpha)
    ce, loss = (slow_norm(model(), of, batches(4)[2:]) for of in (CrossEntropyLoss(), IBLoss(WEIGHT, alpha=alpha)))
    assert again == pytest.approx(loss / ce, rel=1e-5)


def test_what_is_measured_is_the_part_that_is_trained():
    """cRT: the body in evaluation mode, the head's gradient alone."""
    network, (images, target) = model(), batches()[0]
    network(images)  # other running statistics than those of a batch
    logits, features = network.eval()(images)
    for found, criterion in zip(
        gradients.gradient_norms(models.HeadOnly(copy.deepcopy(network)), batches()[:1], automatic()),
        (CrossEntropyLoss(), IBLoss(WEIGHT, alpha=1.0)),
        strict=True,
    ):
        parts = torch.autograd.grad(criterion(logits, target, features), network.linear.parameters(), retain_graph=True)
        assert found == pytest.approx(float(torch.cat([part.flatten() for part in parts]).norm()), rel=1e-5)


class EmptyBatchNorm(torch.nn.SyncBatchNorm):
    """Gives a batch without images back, and no gradients, as SyncBatchNorm does."""

    def forward(self, x):
        return x if len(x) == 0 else torch.nn.functional.batch_norm(x, None, None, self.weight, self.bias, True)


def test_all_ranks_reduce_as_many_numbers(monkeypatch):
    model, sizes = models.resnet20(2), []
    model.bn1 = EmptyBatchNorm(16)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    monkeypatch.setattr(gradients.distributed, "all_reduce_sum", lambda sums: sizes.append(sums.numel()) or sums + 1)
    for size in (3, 0):
        batch = torch.randn(size, 3, 8, 8), torch.zeros(size, dtype=torch.int64)
        gradients.gradient_norms(model, [batch], CrossEntropyLoss())
    assert [size for size in sizes if size > 1] == [parameters] * 4


def test_fp16_is_measured_in_float32():
    """Its unscaled gradients would underflow."""
    found = gradients.gradient_norms(model(), batches(), automatic(), Precision("fp16", "cpu"))
    assert found == gradients.gradient_norms(model(), batches(), automatic())


def test_the_model_stays_as_it_was():
    network = model()
    network.conv1.eval()
    before = copy.deepcopy(network.state_dict())
    gradients.match_gradient(network, batches(), automatic())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert network.training
    assert not network.conv1.training
    assert all(parameter.grad is None for parameter in network.parameters())


def test_no_gradient_is_one_line():
    criterion = IBLoss(torch.zeros(10), alpha="auto", auto_target="gradient")
    with pytest.raises(DataError, match="give --alpha a value"):
        gradients.match_gradient(model(), batches(), criterion)
