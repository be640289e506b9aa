"""What can be known of a GPU without one, with tensors that only say that they are there; and what waits for one.

torch's fake tensors have a shape and a device and no numbers. Operators on two devices at once fail on them as they
would on a GPU, and so does every read by the host. Only the backward pass needs a real device.
"""

import contextlib
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from script_runner import REPOSITORY, TINY, TWO_EPOCHS, log_folder, read_logs, run_ok
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import models
from experiment.run import on_cpu
from experiment.settings import Settings
from loaders.in_memory import InMemoryBatches
from training import loop
from training.metrics import MetricAccumulator
from training.optimizer import sgd
from training.precision import Precision
from training.recipe import Recipe
from training.registry import LOSSES
from utils import versions

COUNTS = [3, 1]


class NoBackward(Precision):
    """Checks what the backward pass and the optimizer would be given."""

    def step(self, loss, optimizer):
        assert loss.is_cuda
        assert loss.requires_grad
        assert all(state["momentum_buffer"].is_cuda for state in optimizer.state.values())


@contextlib.contextmanager
def never_read():
    """The figures at the end of an epoch are not read; all that comes before runs."""
    figures = mock.patch.object(loop, "finite_figures", return_value={})
    with figures, mock.patch.object(loop, "_mean_factors"):
        yield


def criterion_of(loss):
    settings = Settings(loss_type=loss, train_rule="CBReweight", start_ib_epoch=0, alpha="auto")
    recipe = Recipe.from_settings(settings)
    return recipe.criterion(recipe.stage(0), COUNTS)


def as_fake(criterion, mode):
    """The criterion with fake buffers, on the CPU as it is built; a tensor that is no buffer stays a real one."""
    for part in criterion.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else mode.from_tensor(buffer)
    return criterion


def fake_model():
    """A model on the GPU, and its optimizer."""
    with torch.device("cuda"):
        model = models.resnet20(2)
    return model, sgd(model, 0.1, 0.9, 2e-4)


def fake_batches():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    data = SimpleNamespace(data=images, targets=[0, 0, 0, 1], mean=(0.5,) * 3, std=(0.2,) * 3, flip=True)
    return InMemoryBatches(data, 2, "cuda")


def train(criterion, **kwargs):
    model, optimizer = fake_model()
    with never_read():
        loop.train_one_epoch(model, fake_batches().train_epoch(0), criterion, optimizer, 2, NoBackward(), **kwargs)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_epoch_stays_on_the_device_and_reads_nothing(loss):
    criterion = criterion_of(loss)
    with FakeTensorMode() as mode:
        train(as_fake(criterion, mode).to("cuda"))


def test_an_evaluation_stays_on_the_device_and_reads_nothing():
    figures = mock.patch.multiple(MetricAccumulator, read=lambda self: {}, per_class=lambda self: ([50.0, None], None))
    with FakeTensorMode(), figures:
        loop.evaluate(fake_model()[0], fake_batches().eval_epoch(), COUNTS)


def test_a_read_in_between_is_noticed():
    with FakeTensorMode(), pytest.raises(DataDependentOutputException):
        train(criterion_of("CE"), on_batch=lambda batch, metrics: metrics.read())


@pytest.mark.parametrize("loss", ["CE", "Focal", "LDAM", "BS", "IB"])
def test_a_criterion_left_on_the_cpu_is_noticed(loss):
    criterion = criterion_of(loss)
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match="cpu"):
        train(as_fake(criterion, mode))


def test_a_constant_that_is_no_buffer_is_noticed():
    criterion = criterion_of("LDAM")
    margins = criterion.margins
    del criterion.margins
    criterion.margins = margins
    with FakeTensorMode() as mode, pytest.raises(Exception, match=r"(?i)fake|device"):
        train(as_fake(criterion, mode).to("cuda"))


def test_metrics_on_the_cpu_are_noticed():
    accumulator = mock.patch.object(
        loop, "MetricAccumulator", lambda classes, device, **how: real(classes, "cpu", **how)
    )
    real, criterion = MetricAccumulator, criterion_of("CE")
    with FakeTensorMode() as mode, accumulator, pytest.raises(RuntimeError, match="cpu"):
        train(as_fake(criterion, mode).to("cuda"))


class Uploads(TorchDispatchMode):
    """Counts the copies from the CPU to the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        is_copy = "copy" in function._schema.name and isinstance(out, torch.Tensor)
        self.count += is_copy and out.is_cuda and any(arg.device.type == "cpu" for arg in tensors)
        return out


def test_an_epoch_uploads_order_offsets_and_flips_once():
    with FakeTensorMode():
        batches = fake_batches()
        with Uploads() as uploads:
            assert len([images for images, _ in batches.train_epoch(0)]) == 2
        assert uploads.count == 3
        with Uploads() as uploads:
            assert len(list(batches.eval_epoch())) == 2
        assert uploads.count == 0


def test_uploads_of_every_kind_are_noticed():
    with FakeTensorMode(), Uploads() as uploads:
        source = torch.zeros(2)
        source.to("cuda"), source.cuda(), torch.empty(2, device="cuda").copy_(source), torch.tensor([1], device="cuda")
        assert uploads.count == 4
        source.clone(), source.to("cuda").cpu()
        assert uploads.count == 5


@pytest.mark.parametrize(
    ("side", "batch_size", "size"), [(32, 128, 2048), (64, 128, 512), (224, 128, 128), (32, 4096, 4096)]
)
def test_larger_batches_are_evaluated_on_cuda(side, batch_size, size):
    with FakeTensorMode():
        batches = SimpleNamespace(targets=torch.zeros(10, device="cuda"), batch_size=batch_size)
    assert loop.for_evaluation(batches, side).batch_size == size
    assert batches.batch_size == batch_size, "the training batches are others"


def test_the_same_batches_are_evaluated_on_the_cpu():
    batches = SimpleNamespace(targets=torch.zeros(10), batch_size=128)
    assert loop.for_evaluation(batches, 32) is batches


def test_a_checkpoints_state_is_on_the_cpu():
    with FakeTensorMode():
        model, optimizer = fake_model()
        state = on_cpu({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    tensors = [*state["model"].values(), *(s["momentum_buffer"] for s in state["optimizer"]["state"].values())]
    assert len(tensors) == len(model.state_dict()) + len(list(model.parameters()))
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.parametrize(("smi", "driver"), [("580.65.06\n", "580.65.06"), (None, "unknown")])
def test_versions_name_cuda_cudnn_the_driver_and_tf32_where_there_is_a_gpu(smi, driver):
    run = mock.Mock(side_effect=FileNotFoundError) if smi is None else mock.Mock(return_value=mock.Mock(stdout=smi))
    available = mock.patch("torch.cuda.is_available", return_value=True)
    with available, mock.patch("torch.backends.cudnn.version", return_value=92000), mock.patch("subprocess.run", run):
        facts = versions()
    assert facts["driver"] == driver
    assert facts["tf32"] == ("on" if torch.backends.cudnn.allow_tf32 else "off")
    assert facts["cuda"] == str(torch.version.cuda)
    assert facts["cudnn"] == "92000"


# ------------------------------------------------------------------------------------- what waits for a real one


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["none", "bf16"])
@pytest.mark.parametrize("loss", ["CE", "IB"])
def test_gpu_step_never_waits_for_the_device(loss, amp):
    model = models.resnet20(2).cuda().to(memory_format=torch.channels_last)
    optimizer, criterion = sgd(model, 0.1, 0.9, 2e-4), criterion_of(loss).cuda()
    batches = list(fake_batches().train_epoch(0))
    for mode in ("default", "error"):  # the first pass sets libraries up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with never_read():
                loop.train_one_epoch(model, batches, criterion, optimizer, 2, Precision(amp, "cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_gpu_compiled_run_over_a_short_last_batch_is_close_to_the_eager_one(tmp_path, capsys):
    """309 images in batches of 64: the last one has 53."""
    losses = []
    for name, extra in (("eager", []), ("compiled", ["--compile"])):
        args = [*TWO_EPOCHS, *TINY, *extra, "--gpu", "0", "--exp_str", name]
        run_ok(args, tmp_path, capsys, cuda=True)
        rows = read_logs(log_folder(tmp_path, exp=name))["log_train.csv"]
        losses.append([float(row["loss"]) for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def run_python(code):
    """What a process of its own prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


DETERMINISTIC = """
import hashlib, torch
from training.precision import set_determinism
set_determinism(True)
import losses, models
from training import loop
from training.optimizer import sgd
torch.manual_seed(0)
model = models.resnet18(10).cuda().to(memory_format=torch.channels_last)
batches = [(torch.randn(16, 3, 224, 224, device="cuda"), torch.arange(16, device="cuda") % 10) for _ in range(3)]
loop.train_one_epoch(model, batches, losses.IBLoss(torch.ones(10)).cuda(), sgd(model, 0.1, 0.9, 1e-4), 10)
print(hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in model.parameters())).hexdigest())
"""


@pytest.mark.gpu
def test_gpu_resnet18_repeats_to_the_bit_with_deterministic():
    assert run_python(DETERMINISTIC) == run_python(DETERMINISTIC)


ONE_RANK = """
import os, torch
os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
from training import distributed
torch.cuda.set_device(0)
distributed._join(torch.device("cuda", 0))
distributed.world_size = lambda: 2  # else nothing is shared
import losses, models
from training import loop
from training.optimizer import sgd
assert distributed.all_reduce_sum(torch.ones(2, device="cuda")).tolist() == [1, 1]
assert distributed.broadcast({"a": 1}) == {"a": 1}
distributed.barrier()
model = models.resnet20(10).cuda()
trained = distributed.data_parallel(model, sync_bn=True)
batches = [(torch.randn(n, 3, 32, 32, device="cuda"), torch.zeros(n, dtype=torch.int64, device="cuda")) for n in (8, 3)]
figures = loop.train_one_epoch(trained, batches, losses.CrossEntropyLoss(), sgd(model, 0.01, 0.9, 1e-4), 10)
distributed.broadcast_buffers(model)
assert figures["seen"] == 11
distributed.stop()
print("done")
"""


@pytest.mark.gpu
def test_gpu_one_rank_speaks_nccl():
    assert run_python(ONE_RANK) == "done\n"
