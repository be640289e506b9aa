"""The average of the weights and mixed batches against slow formulas; both draw and keep what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from script_runner import tiny

import losses
from training.ema import Ema
from training.loop import train_one_epoch
from training.mixup import Mixup
from training.optimizer import sgd


def batches(number, size=6):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(number, size, 3, 32, 32, generator=generator)
    return list(zip(images, torch.randint(10, (number, size), generator=generator), strict=True))


def mixed(source, seed, epoch):
    loader = SimpleNamespace(train_epoch=lambda epoch, rates: iter(source))
    return Mixup(loader, 0.4, 10, seed).train_epoch(epoch)


def trained(after_step_of, number=4):
    """A model trained on some batches; `after_step_of(model)` gives what is called after each step."""
    torch.manual_seed(0)
    model = tiny()
    optimizer = sgd(model, 0.1, 0.9, 2e-4)
    train_one_epoch(model, batches(number), losses.CrossEntropyLoss(), optimizer, 10, after_step=after_step_of(model))
    return model


def test_the_average_is_that_of_the_weights_and_statistics_after_each_step():
    seen, averages = [], []

    def after_step_of(model):
        ema = Ema(model, 0.7)
        averages.append(ema)

        def update():
            ema.update()
            seen.append({name: tensor.clone().double() for name, tensor in model.state_dict().items()})

        return update

    trained(after_step_of)
    expected = seen[0]
    for state in seen[1:]:
        expected = {name: 0.7 * value + 0.3 * state[name] for name, value in expected.items()}
    expected["bn1.num_batches_tracked"] = torch.tensor(4)
    found = averages[0].module.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value.double(), rtol=1e-5, atol=1e-6)


def test_an_average_does_not_change_the_training():
    plain, averaged = trained(lambda model: None), trained(lambda model: Ema(model, 0.9).update)
    for (name, one), two in zip(plain.state_dict().items(), averaged.state_dict().values(), strict=True):
        assert torch.equal(one, two), name


def test_mixed_images_and_targets_have_the_same_shares_and_pairs():
    source = batches(3, size=8)
    for number, ((images, target), (made, soft)) in enumerate(zip(source, mixed(source, 5, 2), strict=True)):
        generator = np.random.default_rng([5, 2, number])
        share, other = generator.beta(0.4, 0.4), generator.permutation(8)
        for i in range(8):
            expected = share * images[i] + (1 - share) * images[other[i]]
            torch.testing.assert_close(made[i], expected, rtol=1e-5, atol=1e-6)
            row = torch.zeros(10)
            row[target[i]] += share
            row[target[other[i]]] += 1 - share
            torch.testing.assert_close(soft[i], row)


@pytest.mark.parametrize("loss", ["CrossEntropyLoss", "FocalLoss", "IBLoss"])
def test_a_mixed_epoch_has_the_figures_of_its_soft_targets(loss):
    criterion, source = getattr(losses, loss)(), batches(2)
    torch.manual_seed(0)
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    found = train_one_epoch(model, mixed(source, 0, 0), criterion, optimizer, 10)
    torch.manual_seed(0)
    model = tiny().train()
    outputs = [(*model(images), soft) for images, soft in mixed(source, 0, 0)]
    expected = sum(criterion(logits, soft, features).item() for logits, features, soft in outputs) / 2
    assert found["loss"] == pytest.approx(expected, rel=1e-5)
    labels = torch.cat([soft.argmax(1) for _, _, soft in outputs])
    hits = torch.cat([logits.argmax(1) for logits, _, _ in outputs]) == labels
    assert found["acc1"] == pytest.approx(100 * hits.double().mean().item())
    if loss == "IBLoss":
        factors = torch.cat([criterion.per_sample_and_factor(z, soft, h)[2] for z, h, soft in outputs])
        means = {k: factors[labels == k].mean().item() for k in labels.tolist()}
        of_classes = {k: mean for k, mean in enumerate(found["ib_factor"]) if mean is not None}
        assert of_classes == pytest.approx(means, rel=1e-4)
