"""A step replayed as a CUDA graph: on the CPU with a recording in its place, and on a GPU where there is one."""

import contextlib
from types import MappingProxyType, SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from script_runner import (
    FIVE,
    TINY,
    TWO_EPOCHS,
    assert_same_weights,
    log_folder,
    model_folder,
    read_logs,
    run_ok,
)
from small_training import LR, criterion_of, fresh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experiment import fit
from experiment.settings import Settings
from loaders import sampled_order
from loaders.in_memory import InMemoryBatches, TrainEpoch
from loaders.transforms import crop_and_flip, normalise
from training import distributed, loop
from training.cuda_graph import WARM_UP, StepGraph
from training.metrics import MetricAccumulator
from training.precision import Precision
from utils import Terminated, epoch_generator

SIZE, SEED = 8, 5
#: 43 images: five batches of 8 and one of 3. A shuffled epoch, a resampled one, one with another lr, one more.
RATES = torch.linspace(0.1, 1, 43, dtype=torch.float64)
EPOCHS = ((LR, None), (LR, RATES), (LR / 2, None), (LR / 2, None))
CASES = [("CE", 1, "none"), ("IB", 1000.0, "none"), ("IB", "auto", "none"), ("LDAM", 1, "none"), ("IB", "auto", "bf16")]


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU: the operators of a step, with the memory and the numbers that they were called with.

    `replay` calls them again, and writes every result where the first one is. As the recorded step has run, which a
    captured one has not, the first replay does nothing.
    """

    made = 0

    def __init__(self):
        super().__init__()
        self.calls, self.has_run = [], True
        Recording.made += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        if self.has_run:
            self.has_run = False
            return
        for function, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@contextlib.contextmanager
def graphs_on_the_cpu():
    """StepGraph with recordings; there is one stream only."""
    Recording.made = 0
    with mock.patch.multiple(
        torch.cuda, CUDAGraph=Recording, graph=lambda graph, **how: graph, Stream=mock.Mock(),
        current_stream=mock.Mock(), stream=lambda stream: contextlib.nullcontext(),
    ):  # fmt: skip
        yield


def noise():
    images, targets = np.random.RandomState(0).randint(0, 256, (43, 32, 32, 3)), [0, 0, 0, 1] * 10 + [0, 1, 1]
    return SimpleNamespace(data=images.astype(np.uint8), targets=targets, mean=(0.5,) * 3, std=(0.2,) * 3, flip=True)


def state_of(model, optimizer, criterion):
    """Every tensor that a step changes."""
    momentum = {f"momentum {n}": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    return {**model.state_dict(), **momentum, **criterion.state_dict()}


def written_out(loss, alpha, amp):
    """The epochs of a plain loop with slices: the state at the end; the loss so far after each batch; the figures."""
    model, optimizer, criterion = fresh(loss, alpha)
    data, losses, figures = noise(), [], []
    images, targets = torch.as_tensor(data.data), torch.tensor(data.targets)
    mean, std = (torch.tensor(values).repeat(32) for values in (data.mean, data.std))
    for epoch, (lr, rates) in enumerate(EPOCHS):
        metrics, optimizer.param_groups[0]["lr"] = MetricAccumulator(2, "cpu"), lr
        generator = epoch_generator(SEED, epoch)
        order = sampled_order(43, generator, rates)
        offsets = torch.randint(0, 9, (43, 2), generator=generator)
        flips = torch.rand(43, generator=generator) < 0.5
        for start in range(0, 43, SIZE):
            part = slice(start, start + SIZE)
            target = targets[order[part]]
            crops = crop_and_flip(images[order[part]], offsets[part], flips[part], 4)
            with torch.autocast("cpu", torch.bfloat16, enabled=amp == "bf16"):
                logits, features = model(normalise(crops, mean, std))
            loss = criterion(logits, target, features)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ranked = logits.detach().argsort(1, descending=True) == target[:, None]
            metrics.hits += ranked.sum(0)
            metrics.loss += loss.detach() * len(target)
            if criterion.needs_features:
                for k, factor in zip(target, criterion.factor(logits.detach(), target, features.detach()), strict=True):
                    metrics.factors[:, k] += torch.tensor([factor.double(), 1.0])
            metrics.count_batch(len(target))
            losses.append(metrics.loss.item())
        figures.append({**metrics.read(), "ib_factor": metrics.mean_factors() if criterion.needs_features else None})
    return state_of(model, optimizer, criterion), losses, figures


def trained(loss, alpha, amp, graph, device="cpu", changes=MappingProxyType({})):
    """The same by `train_one_epoch`, with changes of the optimizer's settings before some epochs.

    Also the addresses of all that a step reads or changes, after every batch.
    """
    model, optimizer, criterion = fresh(loss, alpha, device)
    source, losses, figures, addresses = InMemoryBatches(noise(), SIZE, device, seed=SEED), [], [], []

    def on_batch(batch, metrics):
        losses.append(metrics.loss.item())
        if graph is not None:
            held = {**state_of(model, optimizer, criterion), **vars(graph.batches), **vars(graph.metrics)}
            addresses.append({n: value.data_ptr() for n, value in held.items() if isinstance(value, torch.Tensor)})

    for epoch, (lr, rates) in enumerate(EPOCHS):
        optimizer.param_groups[0] |= {"lr": lr, **changes.get(epoch, {})}
        batches, precision = source.train_epoch(epoch, rates), Precision(amp, device)
        figures.append(loop.train_one_epoch(model, batches, criterion, optimizer, 2, precision, on_batch, graph))
    return state_of(model, optimizer, criterion), losses, figures, addresses


def assert_equal(actual, expected):
    state, losses, figures, *_ = actual
    expected_state, expected_losses, expected_figures, *_ = expected
    assert losses == expected_losses
    assert figures == expected_figures
    assert state.keys() == expected_state.keys()
    for name, tensor in expected_state.items():
        assert torch.equal(state[name], tensor), name


@pytest.mark.parametrize(("loss", "alpha", "amp"), CASES)
def test_a_step_replayed_on_fixed_memory_is_the_plain_one_to_the_bit(loss, alpha, amp):
    with graphs_on_the_cpu():
        actual = trained(loss, alpha, amp, StepGraph())
    assert_equal(actual, written_out(loss, alpha, amp))
    assert Recording.made == 2  # one for each lr
    addresses = actual[3]
    assert {"order", "offsets", "flips", "places", "conv1.weight", "momentum conv1.weight", "hits"} <= addresses[
        0
    ].keys()
    assert addresses[:12] == [addresses[0]] * 12


@pytest.mark.parametrize("change", [{"weight_decay": 0.1}, {"momentum": 0.1}, {"lr": 0.3}])
def test_what_the_optimizer_is_told_is_captured_anew(change):
    with graphs_on_the_cpu():
        actual = trained("CE", 1, "none", StepGraph(), changes={1: change})
    assert_equal(actual, trained("CE", 1, "none", None, changes={1: change}))
    assert Recording.made == 3


def test_other_images_and_another_criterion_are_captured_anew():
    model, optimizer, criterion = fresh("CE", 1)
    graph, other = StepGraph(), noise()
    other.data, other.targets = other.data[:40], other.targets[:40]
    with graphs_on_the_cpu():
        for data in (noise(), other, noise()):
            batches = InMemoryBatches(data, SIZE)
            figures = loop.train_one_epoch(model, batches.train_epoch(0), criterion, optimizer, 2, graph=graph)
            assert figures["seen"] == len(batches.targets)
        loop.train_one_epoch(model, batches.train_epoch(1), criterion_of("CE"), optimizer, 2, graph=graph)
    assert Recording.made == 4


def test_batches_that_are_not_drawn_from_memory_are_trained_without_a_graph():
    """As mixed images would be."""
    results = []
    for graph in (StepGraph(), None):
        model, optimizer, criterion = fresh("CE", 1)
        batches = (batch for batch in InMemoryBatches(noise(), SIZE).train_epoch(0))
        with graphs_on_the_cpu():
            results.append(loop.train_one_epoch(model, batches, criterion, optimizer, 2, graph=graph))
    assert results[0] == results[1]
    assert Recording.made == 0


def counted_by_the_host(real):
    """The places of a batch come from a Python number, which is right in every batch that is not replayed."""
    starts = {}

    def take(epoch, size):
        start = starts.setdefault(id(epoch), 0)
        epoch.places.copy_((torch.arange(SIZE) + start).clamp(max=42))
        starts[id(epoch)] = (start + size) % 43
        return real(epoch, size)

    return take


def made_anew(real):
    """The sum of the losses is another tensor in every batch."""

    def add(metrics, logits, target, loss):
        metrics.loss = metrics.loss.clone()
        real(metrics, logits, target, loss)

    return add


@pytest.mark.parametrize(
    ("owner", "name", "damage"), [(TrainEpoch, "take", counted_by_the_host), (MetricAccumulator, "add", made_anew)]
)
def test_what_a_graph_would_freeze_is_noticed(owner, name, damage):
    """By the test above: it fails for a step that is not written for a graph."""
    with graphs_on_the_cpu(), mock.patch.object(owner, name, damage(getattr(owner, name))):
        _, losses, *_ = trained("CE", 1, "none", StepGraph())
    assert losses != written_out("CE", 1, "none")[1]


def test_a_step_that_cannot_be_captured_is_a_warning_and_trains_all_the_same(capsys):
    refused = mock.patch.object(Recording, "__enter__", side_effect=RuntimeError("operation not permitted\nmore"))
    with graphs_on_the_cpu(), refused:
        actual = trained("IB", 1000.0, "none", StepGraph())
    assert_equal(actual, written_out("IB", 1000.0, "none"))
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "warning: this step cannot be a CUDA graph, so the run is slower: operation not permitted"


@pytest.mark.parametrize("stop", [KeyboardInterrupt, Terminated])
def test_a_stop_in_the_middle_of_a_capture_is_that_stop(stop):
    """Though ending the capture fails, with an error of its own."""

    @contextlib.contextmanager
    def capture(graph, **how):
        try:
            yield
        finally:
            raise RuntimeError("the capture was invalidated")

    model, optimizer, criterion = fresh("CE", 1)
    batches, calls = InMemoryBatches(noise(), SIZE).train_epoch(0), []

    def take(size, real=batches.take):
        calls.append(size)
        if len(calls) > WARM_UP:
            raise stop
        return real(size)

    batches.take = take
    with graphs_on_the_cpu(), mock.patch("torch.cuda.graph", capture), pytest.raises(stop):
        loop.train_one_epoch(model, batches, criterion, optimizer, 2, graph=StepGraph())


RUNS = {
    "IB": ["--loss_type", "IB", "--train_rule", "IBReweight", "--alpha", "auto"],
    "cRT": ["--loss_type", "LDAM", "--train_rule", "cRT"],
    "Resample": ["--train_rule", "Resample"],
}


@pytest.mark.parametrize("method", RUNS)
def test_a_run_with_graphs_ends_in_the_bits_of_the_plain_run_and_resumes_to_them(method, tmp_path, capsys):
    """Five epochs of four full batches and a smaller one, with the same lr in most."""
    args, names = [*FIVE, *TINY, *RUNS[method], "--warmup_epochs", "0", "--keep_epochs", "2"], iter("abc")

    def run(*extra):
        name = next(names)
        run_ok([*args, *extra, "--exp_str", name], tmp_path, capsys)
        (folder,) = (tmp_path / "checkpoint").glob(f"*_{name}")
        return folder

    plain = run()
    with graphs_on_the_cpu(), mock.patch.object(fit, "_captures_steps", return_value=True):
        whole = run()
        assert Recording.made >= 2
        forked = run("--resume", str(whole / "ckpt.epoch002.pth.tar"))
    for folder in (whole, forked):
        assert_same_weights(plain / "ckpt.pth.tar", folder / "ckpt.pth.tar")


@pytest.mark.parametrize(
    ("flags", "device", "ranks", "captures"),
    [
        ({}, "cuda", 1, True),
        ({"amp": "bf16"}, "cuda", 1, True),
        ({}, "cpu", 1, False),
        ({}, "cuda", 2, False),
        ({"amp": "fp16"}, "cuda", 1, False),
        ({"compile": True}, "cuda", 1, False),
        ({"cuda_graph": False}, "cuda", 1, False),
    ],
)
def test_which_runs_capture_their_steps(flags, device, ranks, captures, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    run = SimpleNamespace(settings=Settings(**flags), device=torch.device(device))
    assert fit._captures_steps(run) is captures


# ------------------------------------------------------------------------------------------------- on a GPU


@pytest.fixture
def deterministic():
    """Equal bits on CUDA."""
    from training.precision import set_determinism

    before = torch.backends.cudnn.allow_tf32
    set_determinism(True)
    yield
    set_determinism(False, before)


@pytest.mark.gpu
@pytest.mark.parametrize(("loss", "alpha", "amp"), CASES)
def test_gpu_graph_gives_the_bits_of_the_plain_steps(loss, alpha, amp, deterministic):
    graph = StepGraph()
    actual = trained(loss, alpha, amp, graph, "cuda")
    assert isinstance(graph.graph, torch.cuda.CUDAGraph)
    assert_equal(actual, trained(loss, alpha, amp, None, "cuda"))


class Reading(torch.nn.Module):
    """A criterion that reads from the device, which a graph cannot hold."""

    def __init__(self, criterion):
        super().__init__()
        self.criterion, self.needs_features, self.calibrate = criterion, criterion.needs_features, criterion.calibrate

    def per_sample(self, logits, target, features):
        loss, count = self.criterion.per_sample(logits, target, features)
        return loss * float(loss.sum().item() < 1e9), count


@pytest.mark.gpu
def test_gpu_step_that_cannot_be_captured_is_a_warning_and_trains_all_the_same(capsys, deterministic):
    with mock.patch("small_training.criterion_of", lambda *args: Reading(criterion_of(*args))):
        graph = StepGraph()
        actual = trained("CE", 1, "none", graph, "cuda")
    assert graph.failed
    assert_equal(actual, trained("CE", 1, "none", None, "cuda"))
    assert "cannot be a CUDA graph" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [[], ["--loss_type", "IB", "--train_rule", "IBReweight"]])
def test_gpu_run_with_and_without_graphs_ends_in_the_same_bits(loss, tmp_path, capsys):
    captured = mock.patch.object(StepGraph, "_capture", autospec=True, side_effect=StepGraph._capture)
    for name, extra in (("graph", []), ("plain", ["--no_cuda_graph"])):
        args = [*TWO_EPOCHS, *TINY, *loss, *extra, "--gpu", "0", "--deterministic", "-b", "16", "--exp_str", name]
        with captured as captures:
            run_ok(args, tmp_path, capsys, cuda=True)
        assert captures.call_count == (2 if name == "graph" else 0)  # the lr differs between the epochs
    method = ("IB", "IBReweight") if loss else ("CE", "None")
    assert_same_weights(*(model_folder(tmp_path, *method, exp) / "ckpt.pth.tar" for exp in ("graph", "plain")))
    rows = [read_logs(log_folder(tmp_path, *method, exp=exp))["log_train.csv"] for exp in ("graph", "plain")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]


assert WARM_UP < 5  # else no epoch above has a replay
