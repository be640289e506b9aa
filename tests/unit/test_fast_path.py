"""The loop as the scripts run it (channels last, in place, fused SGD, tensors augmented by the batch) does not change
the method's numbers; and the same on a GPU, where there is one."""

import copy

import pytest
import torch
from script_runner import TINY, TWO_EPOCHS, assert_same_weights, model_folder, read_logs, run_ok

import losses
import models
from benchmarks import plain
from imbalance_cifar import IMBALANCEDIGITS
from loaders.in_memory import InMemoryBatches
from training.loop import train_one_epoch
from training.optimizer import make_optimizer

STEPS, LR = 4, 0.02  # the lr of the first epoch of the published warm-up


def two_paths():
    """The same batches, and (model, optimizer) of the fast and of the plain path with the same initial values."""
    digits = IMBALANCEDIGITS(imb_factor=1)
    source = InMemoryBatches(digits, 8).train_epoch(0)
    batches = [next(source) for _ in range(STEPS)]
    torch.manual_seed(0)
    model = models.resnet20()
    plain_model = plain.out_of_place(copy.deepcopy(model)).train()
    model.to(memory_format=torch.channels_last)
    optimizer = make_optimizer("sgd", model, LR, {"momentum": 0.9, "weight_decay": 2e-4})
    plain_optimizer = torch.optim.SGD(plain_model.parameters(), LR, momentum=0.9, weight_decay=2e-4)
    return batches, (model, optimizer), (plain_model, plain_optimizer)


def fast_step(model, optimizer, images, target):
    return train_one_epoch(model, [(images, target)], losses.CrossEntropyLoss(), optimizer, 10)["loss"]


def plain_step(model, optimizer, images, target):
    return plain.train_step(model, images.contiguous(), target, optimizer)[0]


def test_every_float32_step_is_that_of_the_plain_loop():
    """Each step taken from the plain loop's weights and momentum: the same loss, nearly the same update.

    torch's batch norm sums a channels-last tensor one number after another, which loses two digits: the update is off
    by half a percent (see docs/speed.md).
    """
    batches, (model, optimizer), plains = two_paths()
    for batch in batches:
        model.load_state_dict(plains[0].state_dict())
        optimizer.load_state_dict(copy.deepcopy(plains[1].state_dict()))
        before = flat(model)
        assert fast_step(model, optimizer, *batch) == pytest.approx(plain_step(*plains, *batch), rel=1e-4)
        update, expected = flat(model) - before, flat(plains[0]) - before
        assert (update - expected).norm() < 2e-2 * expected.norm()


def flat(model):
    """All parameters, one after the other."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# ------------------------------------------------------------------------------------------------- on a GPU

IB = [*TINY, *TWO_EPOCHS, "--loss_type", "IB", "--train_rule", "IBReweight"]


@pytest.mark.gpu
def test_gpu_run_is_close_to_the_cpu_run(tmp_path):
    run_ok([*IB, "--exp_str", "cpu"], tmp_path)
    run_ok([*IB, "--exp_str", "gpu", "--gpu", "0"], tmp_path, cuda=True)
    cpu, gpu = (
        [float(row["loss"]) for row in read_logs(tmp_path / "log" / f"digits_tiny_IB_IBReweight_exp_0.01_{name}")[
            "log_train.csv"
        ]]
        for name in ("cpu", "gpu")
    )  # fmt: skip
    assert gpu == pytest.approx(cpu, rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [[], ["--amp", "fp16"], ["--amp", "bf16"]], ids=["float32", "fp16", "bf16"])
def test_deterministic_gpu_runs_are_equal_and_resume_to_the_same_bits(tmp_path, extra):
    args = [*IB, *extra, "--deterministic", "--gpu", "0"]
    run_ok([*args, "--exp_str", "a"], tmp_path, cuda=True)
    run_ok([*args, "--exp_str", "b"], tmp_path, cuda=True)
    folders = [model_folder(tmp_path, "IB", "IBReweight", exp) for exp in ("a", "b", "c")]
    assert_same_weights(*(folder / "ckpt.pth.tar" for folder in folders[:2]))
    fork = ["--exp_str", "c", "--resume", str(folders[0] / "ckpt.epoch001.pth.tar")]
    run_ok([*args, *fork], tmp_path, cuda=True)
    assert_same_weights(folders[0] / "ckpt.pth.tar", folders[2] / "ckpt.pth.tar")
