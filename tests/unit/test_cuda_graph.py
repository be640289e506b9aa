"""A step replayed as a CUDA graph: on the CPU with a recording in its place, and on a GPU where there is one."""

import contextlib
import random
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from script_runner import TINY, TWO_EPOCHS, assert_same_weights, log_folder, model_folder, read_logs, run_ok
from small_training import LR, criterion_of, fresh
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loaders.in_memory import InMemoryBatches, TrainEpoch
from training import distributed, loop
from training.cuda_graph import WARM_UP, StepGraph, step_graph
from training.precision import Precision

SIZE = 8
#: 43 images: five batches of 8 and one of 3. The smaller one is captured in the fourth epoch; the lr changes after it.
RATES = (LR,) * 5 + (LR / 2,)
CASES = [("CE", 1, "none"), ("IB", 1000.0, "none"), ("IB", "auto", "bf16")]


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


def noise(images=43):
    data, targets = np.random.RandomState(0).randint(0, 256, (images, 32, 32, 3)), [0, 0, 0, 1] * 10 + [0, 1, 1]
    return SimpleNamespace(
        data=data.astype(np.uint8), targets=targets[:images], mean=(0.5,) * 3, std=(0.2,) * 3, flip=True
    )


def trained(case, graph, device="cpu", rates=RATES, criterion=None, before=None, on_batch=None):
    """Epochs of `train_one_epoch`; every tensor that they change, and their figures.

    before(epoch, optimizer, criterion) is called before an epoch, on_batch(optimizer) after a batch.
    """
    loss, alpha, amp = case
    model, optimizer, made = fresh(loss, alpha, device)
    criterion, source, figures = criterion or made, InMemoryBatches(noise(), SIZE, device, seed=5), []
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    for epoch, lr in enumerate(rates):
        optimizer.param_groups[0]["lr"] = lr
        if before:
            before(epoch, optimizer, criterion)
        hook = on_batch and (lambda batch, metrics: on_batch(optimizer))
        batches, precision = source.train_epoch(epoch), Precision(amp, device)
        figures.append(loop.train_one_epoch(model, batches, criterion, optimizer, 2, precision, hook, graph))
        figures[-1].pop("seconds", None)
    momentum = {f"momentum {n}": optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters()}
    return {**model.state_dict(), **momentum, **criterion.state_dict()}, figures


def assert_equal(actual, expected):
    assert actual[1] == expected[1]
    assert actual[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(actual[0][name], tensor), name


def compare(case=CASES[0], make=dict, **how):
    """Train with a graph and without one, to the same bits; the number of captures. make() gives further arguments."""
    expected = trained(case, None, **how, **make())
    with graphs_on_the_cpu():
        assert_equal(trained(case, StepGraph(), **how, **make()), expected)
    return Recording.made


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_bits_of_plain_ones(case):
    assert compare(case) == 4, "each size, the full one with the other lr, and once more as SGD notes its first step"


def test_what_the_optimizer_is_told_is_captured_again():
    def before(epoch, optimizer, criterion):
        optimizer.param_groups[0].update({"weight_decay": 0.1} if epoch == 1 else {})

    assert compare(before=before, rates=[LR] * 3) == 2


def test_a_schedule_that_moves_in_every_step_is_never_frozen():
    def on_batch(optimizer):
        optimizer.param_groups[0]["lr"] *= 0.99

    assert compare(on_batch=on_batch, rates=[LR] * 2) == 0


def test_a_number_of_the_criterion_that_changes_between_epochs_is_captured_again():
    def before(epoch, optimizer, criterion):
        criterion.gamma = 1.0 + epoch

    assert compare(("Focal", 1, "none"), before=before, rates=[LR] * 3) == 3


def test_batches_that_are_not_drawn_from_memory_are_trained_without_a_graph():
    """As mixed images would be."""
    results = []
    for graph in (StepGraph(), None):
        model, optimizer, criterion = fresh("CE", 1)
        batches = (batch for batch in InMemoryBatches(noise(), SIZE).train_epoch(0))
        with graphs_on_the_cpu():
            figures = loop.train_one_epoch(model, batches, criterion, optimizer, 2, graph=graph)
        results.append(figures["loss"])
    assert results[0] == results[1]
    assert Recording.made == 0


# ------------------------------------------------------------------------------- what must not be in a graph

DRAWS = {"torch's": lambda: torch.rand(()), "numpy's": np.random.rand, "Python's": random.random}


@pytest.mark.parametrize("whose", DRAWS)
def test_a_step_that_draws_on_the_host_trains_without_a_graph(whose, capsys):
    """An augmentation that makes a batch brighter."""
    take = TrainEpoch.take

    def brighter(epoch, size):
        images, target = take(epoch, size)
        return images * (1 + float(DRAWS[whose]())), target

    with mock.patch.object(TrainEpoch, "take", brighter):
        assert compare() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: each step draws from {whose} random state")


class Wrapped(torch.nn.Module):
    """A criterion with a factor on the loss that comes from Python."""

    needs_features = False

    def __init__(self, factor):
        super().__init__()
        self.criterion, self.steps, self.factor = criterion_of("CE"), 0, factor
        self.register_buffer("mean", torch.zeros(()))

    def calibrate(self, *args, **how):
        pass

    def per_sample_and_factor(self, logits, target, features):
        loss, count, factor = self.criterion.per_sample_and_factor(logits, target, features)
        return loss * self.factor(self, loss), count, factor


def rising(criterion, loss):
    criterion.steps += 1
    return 1 + criterion.steps / 10


def replaced(criterion, loss):
    criterion.mean = 0.5 * criterion.mean + loss.detach().mean()
    return 1 + criterion.mean


def counting(epoch, optimizer, criterion):
    def rise(optimizer, *args):
        optimizer.steps += 1
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.mul_(1 + optimizer.steps / 10)

    if epoch == 0:
        optimizer.steps = 0
        optimizer.register_step_pre_hook(rise)


CHANGES = {
    "steps of Wrapped": {"make": lambda: {"criterion": Wrapped(rising)}},
    "mean of Wrapped": {"make": lambda: {"criterion": Wrapped(replaced)}},
    "steps of SGD": {"before": counting},
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_step_that_changes_what_a_graph_freezes_trains_without_one(what, capsys):
    assert compare(**CHANGES[what]) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: each step changes {what}, which a CUDA graph would freeze")


def test_what_the_first_step_sets_up_is_no_reason(capsys):
    def once(criterion, loss):
        criterion.steps = criterion.steps or random.randint(1, 9)
        return criterion.steps

    assert compare(make=lambda: {"criterion": Wrapped(once)}) == 4, "once more as the number is another one"
    assert capsys.readouterr().err == ""


def test_a_step_that_cannot_be_captured_is_a_warning_and_trains_all_the_same(capsys):
    with mock.patch.object(Recording, "__enter__", side_effect=RuntimeError("operation not permitted\nmore")):
        assert compare(CASES[1]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: this step cannot be a CUDA graph (operation not permitted)")


def test_a_stop_in_the_middle_of_a_capture_is_that_stop():
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
            raise KeyboardInterrupt
        return real(size)

    batches.take = take
    with graphs_on_the_cpu(), mock.patch("torch.cuda.graph", capture), pytest.raises(KeyboardInterrupt):
        loop.train_one_epoch(model, batches, criterion, optimizer, 2, graph=StepGraph())


def test_which_runs_capture_their_steps(monkeypatch):
    for device, ranks, amp, wanted, captures in (
        ("cuda", 1, "bf16", True, True),
        ("cpu", 1, "none", True, False),
        ("cuda", 2, "none", True, False),
        ("cuda", 1, "fp16", True, False),
        ("cuda", 1, "none", False, False),
    ):
        monkeypatch.setattr(distributed, "world_size", lambda ranks=ranks: ranks)
        assert (step_graph(torch.device(device), amp, wanted) is not None) is captures


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
@pytest.mark.parametrize("case", CASES)
def test_gpu_graph_gives_the_bits_of_the_plain_steps(case, deterministic):
    graph = StepGraph()
    actual = trained(case, graph, "cuda", rates=[LR] * 5)
    assert sorted(graph.graphs) == [3, SIZE]
    assert_equal(actual, trained(case, None, "cuda", rates=[LR] * 5))


@pytest.mark.gpu
def test_gpu_step_that_reads_from_the_device_is_a_warning_and_trains_all_the_same(capsys, deterministic):
    def reading(criterion, loss):
        return float(loss.sum().item() < 1e9)

    graph = StepGraph()
    actual = trained(CASES[0], graph, "cuda", criterion=Wrapped(reading).cuda())
    assert graph.failed
    assert_equal(actual, trained(CASES[0], None, "cuda", criterion=Wrapped(reading).cuda()))
    assert "cannot be a CUDA graph" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [[], ["--loss_type", "IB", "--train_rule", "IBReweight"]])
def test_gpu_run_with_and_without_graphs_ends_in_the_same_bits(loss, tmp_path):
    captured = mock.patch.object(StepGraph, "_capture", autospec=True, side_effect=StepGraph._capture)
    for name, extra in (("graph", []), ("plain", ["--no_cuda_graph"])):
        args = [*TWO_EPOCHS, *TINY, *loss, *extra, "--gpu", "0", "--deterministic", "-b", "16", "--exp_str", name]
        with captured as captures:
            run_ok(args, tmp_path, cuda=True)
        assert captures.call_count == (2 if name == "graph" else 0)  # the lr differs between the epochs
    method = ("IB", "IBReweight") if loss else ("CE", "None")
    assert_same_weights(*(model_folder(tmp_path, *method, exp) / "ckpt.pth.tar" for exp in ("graph", "plain")))
    rows = [read_logs(log_folder(tmp_path, *method, exp=exp))["log_train.csv"] for exp in ("graph", "plain")]
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
