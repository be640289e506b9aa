"""What a training step costs, counted: operators, reads by the host, compiled graphs, memory layouts."""

import collections
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from script_runner import TINY, TWO_EPOCHS, run_ok
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import models
from experiment import fit
from loaders.in_memory import InMemoryBatches
from training.loop import evaluate, train_one_epoch
from training.optimizer import sgd
from training.precision import Compiled, Precision

REPOSITORY = Path(__file__).resolve().parents[2]
#: Operators that start no kernel on a GPU: views, fresh memory, marks of the profiler.
FREE = {
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided",
    "permute", "resize_", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that are called, by name; those in FREE do not count."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        self.count[name] += name not in FREE
        return function(*args, **(kwargs or {}))


def subject(depth=32, classes=10):
    """A model as the scripts train it, and its optimizer."""
    torch.manual_seed(0)
    model = models.CIFAR_MODELS[f"resnet{depth}"](classes).to(memory_format=torch.channels_last)
    return model, sgd(model, 0.1, 0.9, 2e-4)


def batch(size=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 32, 32, generator=generator).to(memory_format=torch.channels_last)
    return images, torch.randint(10, (size,), generator=generator)


CRITERIA = {"CE": losses.CrossEntropyLoss, "IB": lambda: losses.IBLoss(torch.ones(10))}


# --------------------------------------------------------------------------------------------------- operators


def operators_of_a_step(criterion, amp="none"):
    """How many operators a second batch adds to an epoch, by name."""
    counts = []
    for batches in (1, 2):
        model, optimizer = subject()
        with Operators() as operators:
            train_one_epoch(model, [batch()] * batches, criterion, optimizer, 10, Precision(amp))
        counts.append(operators.count)
    return counts[1] - counts[0]


@pytest.mark.parametrize(
    ("loss", "amp", "budget"), [("CE", "none", 261), ("IB", "none", 314), ("CE", "bf16", 331), ("IB", "bf16", 386)]
)
def test_a_step_stays_within_its_operators(loss, amp, budget):
    """Of ResNet-32; on a GPU each is a kernel or more, and small images leave it waiting for the next one."""
    found = operators_of_a_step(CRITERIA[loss](), amp)
    assert sum(found.values()) <= budget, found


def test_an_evaluation_step_stays_within_its_operators():
    model, _ = subject()
    counts = []
    for batches in (1, 2):
        with Operators() as operators:
            evaluate(model, [batch()] * batches, [1] * 10)
        counts.append(operators.count)
    assert sum((counts[1] - counts[0]).values()) <= 128, counts[1] - counts[0]


def test_a_batch_in_memory_stays_within_its_operators():
    data = SimpleNamespace(
        data=np.zeros((8, 32, 32, 3), np.uint8), targets=[0] * 8, mean=(0.5,) * 3, std=(0.2,) * 3, flip=True
    )
    source = InMemoryBatches(data, 4).train_epoch(0)
    next(source)
    with Operators() as operators:
        next(source)
    assert sum(operators.count.values()) <= 22, operators.count


def test_batch_norms_counter_rises_by_the_batches_though_no_step_touches_it():
    model, optimizer = subject(20)
    assert "num_batches_tracked" in model.bn1._buffers
    for epoch in (1, 2):
        train_one_epoch(model, [batch()] * 3, losses.CrossEntropyLoss(), optimizer, 10)
        counters = {name: int(b) for name, b in model.named_buffers() if name.endswith("num_batches_tracked")}
        assert len(counters) == 19
        assert set(counters.values()) == {3 * epoch}


def test_batch_norm_that_is_not_trained_counts_no_batches():
    model, optimizer = subject(20)
    model.bn1.train = lambda mode=True: model.bn1
    model.bn1.training = False
    train_one_epoch(model, [batch()] * 2, losses.CrossEntropyLoss(), optimizer, 10)
    assert int(model.bn1.num_batches_tracked) == 0
    assert int(model.layer1[0].bn1.num_batches_tracked) == 2


def test_batch_norms_counter_is_back_after_a_step_that_failed():
    model, optimizer = subject(20)
    batches = [batch(), (torch.zeros(4, 5, 32, 32), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(RuntimeError, match="channels"):
        train_one_epoch(model, batches, losses.CrossEntropyLoss(), optimizer, 10)
    assert int(model.bn1.num_batches_tracked) == 1


def test_batch_norm_with_a_cumulative_mean_counts_by_itself():
    model, optimizer = subject(20)
    expected = torch.nn.BatchNorm2d(16, momentum=None)
    model.bn1.momentum = None
    with torch.no_grad():
        model.conv1.weight.copy_(torch.eye(16, 3)[:, :, None, None].expand(16, 3, 3, 3))
        before = [model.conv1(batch(seed=seed)[0]) for seed in range(3)]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train_one_epoch(model, [batch(seed=seed) for seed in range(3)], losses.CrossEntropyLoss(), optimizer, 10)
    for x in before:
        expected(x)
    torch.testing.assert_close(model.bn1.running_mean, expected.running_mean)
    assert int(model.bn1.num_batches_tracked) == 3


# -------------------------------------------------------------------------------------------- reads by the host

READS = ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__")


def count_reads(counts, monkeypatch):
    """Count every read of a tensor into `counts`, by the function of this repository that it comes from."""

    def watched(name, real):
        def spy(self, *args, **kwargs):
            frame = sys._getframe(1)
            while frame.f_code.co_name == "spy" or not frame.f_code.co_filename.startswith(str(REPOSITORY)):
                frame = frame.f_back
            path = Path(frame.f_code.co_filename).relative_to(REPOSITORY)
            counts[f"{path}:{frame.f_code.co_name}"] += 1
            return real(self, *args, **kwargs)

        return spy

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, watched(name, getattr(torch.Tensor, name)))


@pytest.mark.parametrize(("every", "lines"), [(1000, 0), (2, 2)])
def test_an_epoch_is_read_from_the_device_at_its_end_and_where_a_line_is_printed(
    every, lines, tmp_path, capsys, monkeypatch
):
    """Of 5 batches, in the IB phase: training's figures and factors, the test's figures and table; once a line."""
    counts, train, epochs = collections.Counter(), fit.train_one_epoch, []

    def train_counted(*args):
        epochs.append(1)
        if len(epochs) == 2:
            count_reads(counts, monkeypatch)
        return train(*args)

    def report(*args):  # the end of the epochs
        monkeypatch.undo()

    with mock.patch.object(fit, "train_one_epoch", train_counted), mock.patch.object(fit, "_report", report):
        run_ok([*TWO_EPOCHS, *TINY, "--loss_type", "IB", "-p", every], tmp_path, capsys)
    assert counts == {
        "training/metrics.py:read": 2 + lines,
        "training/metrics.py:mean_factors": 1,
        "training/metrics.py:per_class": 4,  # one table, and three lists of it
    }


# ------------------------------------------------------------------------------------------------------ compiled


def compiled(model, counter):
    """The model as --compile trains it, without a compiler: torch's tracing, run by eager operators."""
    compile_ = torch.compile
    with mock.patch("torch.compile", lambda m, mode, dynamic: compile_(m, backend=counter, dynamic=dynamic)):
        return Compiled(model, torch.device("cpu"))


@pytest.mark.parametrize("loss", ["CE", "IB"])
def test_compile_makes_one_graph_for_all_epochs_and_changes_no_figure(loss):
    """Two epochs with an evaluation between them; the last batch of an epoch is smaller."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter, figures = CompileCounterWithBackend("aot_eager"), []
    batches = [batch(8, 0), batch(8, 1), batch(3, 2)]
    for compiles in (False, True):
        model, optimizer = subject(20)
        trained, found = compiled(model, counter) if compiles else model, []
        for _ in range(2):
            found.append(train_one_epoch(trained, batches, CRITERIA[loss](), optimizer, 10))
            found.append(evaluate(model, batches, [1] * 10))
        figures.append(found)
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    for plain, ours in zip(*figures, strict=True):
        assert ours["seen"] == plain["seen"] == 19
        assert ours["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        assert ours["acc1"] == pytest.approx(plain["acc1"])


# ------------------------------------------------------------------------------------------------ memory layouts


def layouts_broken(model, images):
    """Names of the parts whose activations, or the gradients in them, are not channels-last."""
    broken = []

    def look(name, tensor):
        if tensor is not None and tensor.ndim == 4 and not tensor.is_contiguous(memory_format=torch.channels_last):
            broken.append(name)

    for name, part in model.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda part, inputs, out, name=name: look(name, out))
    logits, _ = model(images)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        look(f"gradient of {name}", parameter.grad)
    return broken


@pytest.mark.parametrize("arch", ["resnet20", "resnet18"])
def test_every_activation_and_gradient_is_channels_last(arch):
    """One that is not costs a copy in each convolution after it."""
    model = {**models.CIFAR_MODELS, **models.IMAGENET_MODELS}[arch](10).to(memory_format=torch.channels_last)
    assert layouts_broken(model, batch()[0]) == []


def test_a_layer_that_loses_the_layout_is_noticed():
    class Contiguous(torch.nn.Module):
        def forward(self, x):
            return x.contiguous()

    model, _ = subject(20)
    model.layer2[0].bn1 = torch.nn.Sequential(model.layer2[0].bn1, Contiguous())
    assert "layer2.0.bn1.1" in layouts_broken(model, batch()[0])
