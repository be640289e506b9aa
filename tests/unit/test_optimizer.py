"""The optimizers: SGD's momentum from the first step on and from other layouts; every one continues where it was."""

import copy
import dataclasses
from unittest import mock

import pytest
import torch

import models
from experiment.settings import Settings
from training import distributed
from training.ema import Ema
from training.optimizer import OPTIMIZERS, make_optimizer
from training.recipe import Recipe
from training.stages import Stages, redraw_head
from utils import epoch_seed


def make(name, model, lr=0.1, momentum=0.9, weight_decay=2e-4):
    return make_optimizer(name, model, lr, {"momentum": momentum, "weight_decay": weight_decay})


def step(model, optimizer, images, target):
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(images)[0], target).backward()
    optimizer.step()


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)


def fresh(channels_last=True):
    torch.manual_seed(0)
    model = models.resnet20()
    return model.to(memory_format=torch.channels_last) if channels_last else model


def assert_equal(one, two):
    for (name, mine), theirs in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name


def test_zeroed_buffers_give_the_bits_of_buffers_made_by_the_first_step():
    ours, plain = fresh(), fresh()
    optimizer = make("sgd", ours)
    plain_optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=2e-4, fused=True)
    for seed in range(3):
        step(ours, optimizer, *batch(seed))
        step(plain, plain_optimizer, *batch(seed))
    assert_equal(ours, plain)


def test_a_first_step_that_overflows_is_skipped_and_leaves_zero_momentum():
    """The scaler of fp16 skips the fused step; torch's own buffers would be memory that nobody wrote."""
    model = torch.nn.Linear(4, 2)
    before = copy.deepcopy(model.state_dict())
    optimizer, scaler = make("sgd", model, weight_decay=0.0), torch.amp.GradScaler("cpu", init_scale=2.0)
    for value in (float("inf"), 1.0):
        optimizer.zero_grad()
        scaler.scale((model(torch.ones(1, 4)) * value).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if value != 1.0:
            assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
            assert all((state["momentum_buffer"] == 0).all() for state in optimizer.state.values())
    expected = before["weight"] - 0.1  # a gradient of ones, momentum 0 before it
    torch.testing.assert_close(model.weight.detach(), expected)


def test_a_loaded_state_stays_fused_and_takes_the_parameters_layout():
    """An official one, of an older torch. Contiguous momentum beside channels-last parameters gives a wrong update."""
    plain = fresh(channels_last=False)
    plain_optimizer = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9, weight_decay=2e-4)
    for seed in range(2):
        step(plain, plain_optimizer, *batch(seed))
    state = copy.deepcopy(plain_optimizer.state_dict())
    older = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "params")
    state["param_groups"] = [{key: group[key] for key in older} for group in state["param_groups"]]
    ours = fresh()
    ours.load_state_dict(plain.state_dict())
    optimizer = make("sgd", ours)
    optimizer.load_state_dict(state)
    for group in optimizer.param_groups:
        assert group["fused"]
        for parameter in group["params"]:
            assert optimizer.state[parameter]["momentum_buffer"].stride() == parameter.stride()
    step(ours, optimizer, *batch(2))
    step(plain, plain_optimizer, *batch(2))
    for mine, theirs in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


def test_a_state_without_momentum_gets_zeros():
    model = torch.nn.Linear(2, 2)
    optimizer = make("sgd", model, weight_decay=0.0)
    optimizer.load_state_dict({**optimizer.state_dict(), "state": {}})
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in model.parameters())


def test_settings_of_the_optimizer_are_its_own_and_not_the_checkpoints():
    model = torch.nn.Linear(2, 2)
    theirs, ours = make("sgd", model), make("sgd", model, lr=0.2, momentum=0.5, weight_decay=5e-4)
    ours.load_state_dict(theirs.state_dict())
    (group,) = ours.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"], group["fused"]) == (0.2, 0.5, 5e-4, True)


@pytest.mark.parametrize("name", [*OPTIMIZERS, "adafactor"])
def test_an_optimizer_with_a_loaded_state_goes_on_to_the_same_bits(name, monkeypatch):
    """Adafactor's state has other shapes than its parameters."""
    monkeypatch.setitem(OPTIMIZERS, "adafactor", lambda model, lr: torch.optim.Adafactor(model.parameters(), lr))
    whole, stopped = fresh(), fresh()
    optimizers = make(name, whole, 0.01), make(name, stopped, 0.01)
    for seed in range(2):
        step(whole, optimizers[0], *batch(seed))
        step(stopped, optimizers[1], *batch(seed))
    resumed = fresh()
    resumed.load_state_dict(stopped.state_dict())
    optimizer = make(name, resumed, 0.01)
    optimizer.load_state_dict(copy.deepcopy(optimizers[1].state_dict()))
    for seed in (2, 3):
        step(whole, optimizers[0], *batch(seed))
        step(resumed, optimizer, *batch(seed))
    assert_equal(whole, resumed)


def test_the_state_of_another_optimizer_is_refused():
    model = torch.nn.Linear(2, 2)
    for saved, here in (("sgd", "adamw"), ("adamw", "sgd")):
        with pytest.raises(ValueError, match="another optimizer"):
            make(here, model).load_state_dict(make(saved, model).state_dict())


def test_adamw_has_torchs_betas_and_the_weight_decay_that_is_asked_for():
    model = torch.nn.Linear(2, 2)
    theirs = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.05, fused=True)
    assert make("adamw", model, 0.01, weight_decay=0.05).defaults == theirs.defaults


def test_groups_keep_the_ratio_of_their_lrs_and_what_they_count():
    """Two groups, through a schedule and a resume; the counter is one that the optimizer does not know."""
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))

    def grouped(model, lr):
        groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 10 * lr, "k": 0}]
        return torch.optim.SGD(groups, lr)

    with mock.patch.dict(OPTIMIZERS, grouped=grouped):
        one, two = (make_optimizer("grouped", layers, 0.1, {}) for _ in range(2))
    recipe = Recipe(dataclasses.replace(Settings(), milestones=(1,), lr_factors=(0.5,), warmup_epochs=0, lr=0.1))
    stages = Stages(recipe, layers, one, [1, 1])
    for epoch, lr in ((0, 0.1), (1, 0.05)):
        stages.begin(epoch)
        assert [group["lr"] for group in one.param_groups] == pytest.approx([lr, 10 * lr])
    one.param_groups[1]["k"] = 7
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.param_groups[1]["k"] == 7
    assert [group["lr"] for group in two.param_groups] == pytest.approx([0.1, 1.0])  # until the stage begins


def test_a_new_head_forgets_numbers_and_tensors_of_its_optimizer_state():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for parameter in model.parameters():
        optimizer.state[parameter] = {"step": 3, "average": torch.ones_like(parameter)}
    redraw_head(model, optimizer)
    for state in optimizer.state.values():
        assert state["step"] == 0
        assert not state["average"].any()


def test_a_new_head_starts_the_average_again():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    ema = Ema(model, 0.9)
    ema.update()
    redraw_head(model, torch.optim.SGD(model.parameters(), 0.1), ema)
    ema.update()
    assert_equal(ema.module, model)


def test_each_rank_has_a_random_state_of_its_own():
    model = torch.nn.Linear(2, 2)
    stages = Stages(Recipe(Settings()), model, make("sgd", model), [1, 1], seed=5)
    for rank in (0, 1):
        with mock.patch.object(distributed, "rank", return_value=rank):
            stages.begin(0)
        assert torch.initial_seed() == epoch_seed(5, 0) + rank
