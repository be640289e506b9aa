"""What can be known of a GPU without one, with tensors that only say that they are there; and what waits for one.

torch's fake tensors have a shape and a device and no numbers. Operators on two devices at once fail on them as they
would on a GPU, and so does every read by the host. Only the backward pass needs a real device.
"""

import contextlib
import copy
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from script_runner import (
    REPOSITORY,
    TINY,
    TWO_EPOCHS,
    assert_same_weights,
    fails,
    log_folder,
    model_folder,
    read_csv,
    run_main,
    run_ok,
    tiny,
)
from small_training import LR, criterion_of, fresh
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
from experiment.checkpoint import on_cpu
from loaders.image_folder import ImageFileBatches
from loaders.in_memory import InMemoryBatches
from training import distributed, loop
from training.metrics import MetricAccumulator
from training.precision import Compiled, NativeBatchNorm2d, Precision, on_device, set_determinism
from utils import UsageError, versions


class NoBackward(Precision):
    """Checks what the backward pass and the optimizer would be given."""

    def step(self, loss, optimizer):
        assert loss.is_cuda
        assert loss.requires_grad


@contextlib.contextmanager
def never_read():
    """The figures at the end of an epoch are not read; all that comes before runs."""
    figures = mock.patch.multiple(
        MetricAccumulator, per_class=lambda self: ([50.0, None], None), mean_factors=mock.DEFAULT
    )
    with figures, mock.patch.object(loop, "finite_figures", return_value={}):
        yield


class Uploads(TorchDispatchMode):
    """Counts the copies from the CPU to the GPU."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        is_copy = "copy" in function._schema.name and isinstance(out, torch.Tensor) and out.is_cuda
        self.count += is_copy and any(isinstance(arg, torch.Tensor) and arg.device.type == "cpu" for arg in args)
        return out


def as_fake(criterion, mode):
    """The criterion with fake buffers, on the CPU as it is built; a tensor that is no buffer stays a real one."""
    for part in criterion.modules():
        for name, buffer in part._buffers.items():
            part._buffers[name] = buffer if buffer is None else mode.from_tensor(buffer)
    return criterion


def fake_batches():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    data = SimpleNamespace(data=images, targets=[0, 0, 0, 1], mean=(0.5,) * 3, std=(0.2,) * 3, flip=True)
    return InMemoryBatches(data, 2, "cuda")


def train(criterion, **kwargs):
    """An epoch of two batches; returns the number of its uploads."""
    with torch.device("cuda"):
        model = models.resnet20(2)
    source, optimizer = fake_batches(), SimpleNamespace(param_groups=[])
    with never_read(), Uploads() as uploads:
        loop.train_one_epoch(model, source.train_epoch(0), criterion, optimizer, 2, NoBackward(), **kwargs)
    return uploads.count


@pytest.mark.parametrize("loss", ["CE", "IB"])
def test_a_training_epoch_stays_on_the_device_and_reads_nothing(loss):
    """And uploads nothing but order, offsets and flips."""
    criterion = criterion_of(loss)
    with FakeTensorMode() as mode:
        assert train(as_fake(criterion, mode).to("cuda")) == 3


def test_an_evaluation_stays_on_the_device_and_reads_nothing():
    read = mock.patch.object(MetricAccumulator, "read", return_value={})
    with FakeTensorMode(), never_read(), read, torch.device("cuda"):
        loop.evaluate(models.resnet20(2), fake_batches().eval_epoch(), [3, 1])


def test_larger_batches_are_evaluated_on_cuda():
    """From memory; of image files each worker makes a whole batch, so that large ones would leave workers idle."""
    for side, batch_size, size in ((32, 128, 4096), (64, 128, 1024), (224, 128, 128), (32, 8192, 8192)):
        images = np.zeros((10, side, side, 3), np.uint8)
        data = SimpleNamespace(data=images, targets=[0] * 10, mean=(0.5,) * 3, std=(0.2,) * 3, flip=True)
        with FakeTensorMode():
            batches = InMemoryBatches(data, batch_size, "cuda")
            from_files = ImageFileBatches(data, batch_size, "cuda", image_size=side)
        assert (batches.batch_size, batches.eval_batch_size) == (batch_size, size)
        assert from_files.eval_batch_size == batch_size


def test_augmented_images_do_not_wait_for_the_device():
    """An index on the host into labels on the device would."""

    class Mixed(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            tensors = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            is_copy = func._schema.name == "aten::_to_copy" and kwargs["non_blocking"]
            assert is_copy or len({t.device.type for t in tensors if t.ndim}) < 2, func
            return func(*args, **(kwargs or {}))

    with FakeTensorMode():
        source = fake_batches()
        source.images, source.draws_on_host = source.images.cpu(), False  # a TrainEpoch whose order is on the host
        batches = source.train_epoch(0)
        with Mixed():
            _, targets = batches.crops(2)
    assert targets.is_cuda


class Operators(TorchDispatchMode):
    """Notes the names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.backends.cudnn.is_available(), reason="torch without cuDNN")
@pytest.mark.parametrize("kind", [torch.nn.BatchNorm2d, NativeBatchNorm2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_native_batch_norm_is_not_cudnns(kind, dtype):
    with FakeTensorMode(), torch.device("cuda"), Operators() as operators:
        kind(4)(torch.empty(2, 4, 8, 8, dtype=dtype))
    assert ("aten::cudnn_batch_norm" in operators.names) == (kind is torch.nn.BatchNorm2d)
    assert ("aten::native_batch_norm" in operators.names) == (kind is NativeBatchNorm2d)


def test_a_checkpoints_state_is_on_the_cpu():
    with FakeTensorMode():
        state = {"model": {"weight": torch.zeros(3, device="cuda")}, "steps": [torch.zeros(2, device="cuda"), 7]}
        copied = on_cpu(state)
    assert [copied["model"]["weight"].device.type, copied["steps"][0].device.type] == ["cpu", "cpu"]
    assert copied["steps"][1] == 7


# ------------------------------------------------------------------------------------------------- numerics


@pytest.fixture
def numerics(monkeypatch):
    """torch's switches, wrongly set, and put back at the end."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    for name in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    yield
    matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


def test_tf32_is_for_convolutions_alone_and_no_flag_fills_fresh_memory(numerics):
    for deterministic, tf32 in ((False, True), (False, False), (True, True)):
        set_determinism(deterministic, tf32)
        assert torch.backends.cudnn.allow_tf32 is tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.benchmark is not deterministic
        assert torch.backends.cudnn.deterministic is deterministic
        assert torch.are_deterministic_algorithms_enabled() is deterministic
        assert not torch.utils.deterministic.fill_uninitialized_memory


def test_versions_say_whether_convolutions_use_tf32(numerics):
    for capability, allowed, tf32 in (((8, 0), True, "on"), ((7, 5), True, "off"), ((9, 0), False, "off")):
        torch.backends.cudnn.allow_tf32 = allowed
        card = mock.patch.multiple(torch.cuda, is_available=lambda: True, get_device_capability=lambda c=capability: c)
        with card, mock.patch("torch.backends.cudnn.version", return_value=92000):
            facts = versions()
        assert facts["tf32"] == tf32


class NotDeterministic(torch.autograd.Function):
    """Its backward pass raises torch's own error, as that of adaptive pooling does on a GPU."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient.clone().put_(torch.tensor([0]), torch.zeros(1))


def pooled(*args, **how):
    model = tiny(*args, **how)
    model.bn1.register_forward_hook(lambda part, inputs, out: NotDeterministic.apply(out))
    return model


def test_deterministic_with_a_model_that_cannot_is_one_line(numerics, tmp_path):
    with mock.patch.dict(models.CIFAR_MODELS, {"vgg16": pooled}):
        words = "this model cannot be trained with --deterministic on a GPU: put_"
        fails([*TWO_EPOCHS, "--arch", "vgg16", "--deterministic"], tmp_path, words)


def test_evaluation_of_a_checkpoint_computes_as_amp_says(tmp_path):
    run_ok([*TWO_EPOCHS, *TINY], tmp_path)
    path, logits = model_folder(tmp_path) / "ckpt.pth.tar", {}
    for amp in ("none", "bf16"):
        run_ok(["-e", "--resume", path, "--threads", "1", "--amp", amp, "--save_logits"], tmp_path)
        with np.load(log_folder(tmp_path) / "evaluate" / "logits.npz") as saved:
            logits[amp] = torch.from_numpy(saved["logits"])
    assert torch.equal(logits["bf16"], logits["bf16"].bfloat16().float())
    assert not torch.equal(logits["none"], logits["none"].bfloat16().float())
    torch.testing.assert_close(logits["bf16"], logits["none"], rtol=0.1, atol=0.1)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_native_batch_norm_gives_the_bits_of_torchs_own_on_a_cpu(amp):
    """Activations, gradients, statistics and counters; training, then evaluation."""
    found = []
    for native in (False, True):
        torch.manual_seed(0)
        model = on_device(models.resnet20(10), torch.device("cpu"), "native" if native else "cudnn")
        assert sum(isinstance(part, NativeBatchNorm2d) for part in model.modules()) == 19 * native
        images = torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last)
        with Precision(amp).autocast():
            logits, _ = model(images)
        logits.float().pow(2).sum().backward()
        with torch.no_grad():
            tested, _ = model.eval()(images)
        gradients = {f"gradient of {name}": parameter.grad for name, parameter in model.named_parameters()}
        found.append({"logits": logits, "tested": tested, **gradients, **model.state_dict()})
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]), name


def test_the_flag_of_batch_norm_reaches_the_model(tmp_path):
    with mock.patch.object(NativeBatchNorm2d, "forward", side_effect=RuntimeError("it is used")):
        run_ok([*TWO_EPOCHS, *TINY], tmp_path)
        with pytest.raises(RuntimeError, match="it is used"):
            run_main([*TWO_EPOCHS, *TINY, "--batch_norm", "native", "--overwrite"], tmp_path)


def test_compile_makes_one_graph_for_all_epochs_and_changes_no_figure():
    """Torch's tracing, run by eager operators. An evaluation comes between; the last batch is smaller."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    counter, figures, compile_ = CompileCounterWithBackend("aot_eager"), [], torch.compile
    batches = [(torch.randn(size, 3, 32, 32), torch.randint(2, (size,))) for size in (8, 8, 3)]
    for compiles in (False, True):
        model, optimizer, criterion = fresh("IB", 1000.0)
        with mock.patch("torch.compile", lambda m, dynamic: compile_(m, backend=counter, dynamic=dynamic)):
            trained = Compiled(model) if compiles else model
        for _ in range(2):
            figures.append(loop.train_one_epoch(trained, batches, criterion, optimizer, 2)["loss"])
            figures.append(loop.evaluate(model, batches, [3, 1])["loss"])
    assert counter.frame_count == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert figures[4:] == pytest.approx(figures[:4], rel=1e-4)


def test_every_activation_and_gradient_is_channels_last():
    """One that is not costs a copy in each convolution after it."""
    model, broken = models.resnet20(10).to(memory_format=torch.channels_last), []

    def look(name, tensor):
        if tensor is not None and tensor.ndim == 4 and not tensor.is_contiguous(memory_format=torch.channels_last):
            broken.append(name)

    for name, part in model.named_modules():
        if not list(part.children()):
            part.register_forward_hook(lambda part, inputs, out, name=name: look(name, out))
    model(torch.randn(4, 3, 32, 32).to(memory_format=torch.channels_last))[0].sum().backward()
    for name, parameter in model.named_parameters():
        look(f"gradient of {name}", parameter.grad)
    assert broken == []


# --------------------------------------------------------------------------------------- the device and the ranks


class FakeSyncBatchNorm(torch.nn.SyncBatchNorm):
    """Batch norm over the images of this rank and those of another one, `others`."""

    def forward(self, x):
        assert len(x) or x.dtype == torch.float32
        together = torch.cat([self.others, x])
        normalised = F.batch_norm(together, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)
        return normalised[len(self.others) :]


@pytest.mark.parametrize(("synced", "amp"), [(True, "none"), (True, "bf16"), (False, "none")])
def test_of_a_rank_without_images_nothing_enters_the_shared_statistics(synced, amp):
    """Without sync_bn its batch norm gets blank images, which are this rank's own affair. SyncBatchNorm shares what a
    rank without images has in the type of its input, and float32 on the others."""
    model, optimizer, criterion = fresh("CE", 1)
    images, before = torch.randn(6, 3, 32, 32), copy.deepcopy(model.state_dict())
    expected, hidden = torch.nn.BatchNorm2d(4), model.conv1(images).detach()
    expected(hidden if synced else torch.zeros(2, *hidden.shape[1:]))
    if synced:
        model.bn1 = FakeSyncBatchNorm(4)
        model.bn1.others = hidden
    metrics = MetricAccumulator(2, "cpu", by_class=False)
    with mock.patch.multiple(distributed, world_size=lambda: 2, all_reduce_sum=lambda sums: sums + 6):
        none = images[:0], torch.zeros(0, dtype=torch.int64)
        loop.train_step(model, *none, criterion, optimizer, Precision(amp, "cpu"), metrics)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(model.state_dict()[f"bn1.{name}"], expected.state_dict()[name])
    assert metrics.loss == 0
    decay = 1 - LR * 2e-4  # all that a gradient of zero leaves
    torch.testing.assert_close(model.conv1.weight.detach(), before["conv1.weight"] * decay)


@pytest.mark.parametrize(("ranks", "gpu", "index"), [(1, 2, 2), (1, None, 0), (4, None, 3)])
def test_a_process_works_on_its_own_gpu(ranks, gpu, index, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "3")
    cards = mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 4, set_device=mock.DEFAULT)
    with cards as patched, mock.patch.object(distributed, "_join") as join:
        assert distributed.start(gpu) == torch.device("cuda", index)
        patched["set_device"].assert_called_once_with(torch.device("cuda", index))
    assert join.call_count == (ranks > 1)


@pytest.mark.parametrize(("gpu", "local", "message"), [(0, 0, "--gpu: torchrun"), (None, 4, "--gpu 4: .* 4")])
def test_ranks_without_a_card_of_their_own_are_refused(gpu, local, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    cards = mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 4)
    with cards, pytest.raises(UsageError, match=message):
        distributed.start(gpu)


# ------------------------------------------------------------------------------------- what waits for a real one


@pytest.mark.gpu
@pytest.mark.parametrize(("loss", "amp"), [("CE", "none"), ("IB", "bf16")])
def test_gpu_step_never_waits_for_the_device(loss, amp):
    model, optimizer, criterion = fresh(loss, 1000.0, "cuda")
    batches = list(fake_batches().train_epoch(0))
    for mode in ("default", "error"):  # the first pass sets libraries up
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with never_read():
                loop.train_one_epoch(model, batches, criterion, optimizer, 2, Precision(amp, "cuda"))
        finally:
            torch.cuda.set_sync_debug_mode("default")


IB = ["--loss_type", "IB", "--train_rule", "IBReweight"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("method", "flags", "cuda"),
    [([], ["--compile"], True), ([], ["--batch_norm", "native"], True), (IB, [], False)],
    ids=["compiled", "native batch norm", "on the CPU"],
)
def test_gpu_run_is_close_to_the_plain_one(method, flags, cuda, tmp_path):
    """309 images in batches of 64, as a CUDA graph: the last one has 53."""
    losses = []
    for name, extra, where in (("plain", [], True), ("changed", flags, cuda)):
        run_ok([*TWO_EPOCHS, *TINY, *method, *extra, "--gpu", "0", "--exp_str", name], tmp_path, cuda=where)
        rows = read_csv(next(tmp_path.glob(f"log/*_{name}/log_train.csv")))
        losses.append([float(row["loss"]) for row in rows])
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [[], ["--amp", "fp16"], ["--amp", "bf16"]], ids=["float32", "fp16", "bf16"])
def test_gpu_runs_with_deterministic_are_equal_and_resume_to_the_same_bits(tmp_path, extra):
    args = [*TWO_EPOCHS, *TINY, *IB, *extra, "--deterministic", "--gpu", "0"]
    run_ok([*args, "--exp_str", "a"], tmp_path, cuda=True)
    run_ok([*args, "--exp_str", "b"], tmp_path, cuda=True)
    folders = [model_folder(tmp_path, "IB", "IBReweight", exp) for exp in ("a", "b", "c")]
    assert_same_weights(*(folder / "ckpt.pth.tar" for folder in folders[:2]))
    fork = ["--exp_str", "c", "--resume", str(folders[0] / "ckpt.epoch001.pth.tar")]
    run_ok([*args, *fork], tmp_path, cuda=True)
    assert_same_weights(folders[0] / "ckpt.pth.tar", folders[2] / "ckpt.pth.tar")


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
torch.manual_seed(0)
model = models.resnet18(10).cuda().to(memory_format=torch.channels_last)
batches = [(torch.randn(16, 3, 224, 224, device="cuda"), torch.arange(16, device="cuda") % 10) for _ in range(3)]
optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, fused=True)
loop.train_one_epoch(model, batches, losses.IBLoss(torch.ones(10)).cuda(), optimizer, 10)
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
assert distributed.all_reduce_sum(torch.ones(2, device="cuda")).tolist() == [1, 1]
assert distributed.gather({"a": 1})[0] == {"a": 1}
distributed.barrier()
model = models.resnet20(10).cuda()
trained = distributed.data_parallel(model, sync_bn=True)
batches = [(torch.randn(n, 3, 32, 32, device="cuda"), torch.zeros(n, dtype=torch.int64, device="cuda")) for n in (8, 3)]
optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
figures = loop.train_one_epoch(trained, batches, losses.CrossEntropyLoss(), optimizer, 10)
distributed.broadcast_buffers(model)
assert figures["seen"] == 11
distributed.stop()
print("done")
"""


@pytest.mark.gpu
def test_gpu_one_rank_speaks_nccl():
    assert run_python(ONE_RANK) == "done\n"
