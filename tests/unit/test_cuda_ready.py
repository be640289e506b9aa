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
    log_folder,
    messages,
    model_folder,
    read_logs,
    run_main,
    run_ok,
    tiny,
)
from small_training import LR, criterion_of, fresh
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.autograd import DeviceType
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import models
from benchmarks import speed
from experiment.run import Run, on_cpu
from loaders.image_folder import ImageFileBatches
from loaders.in_memory import InMemoryBatches
from training import distributed, loop
from training.metrics import MetricAccumulator
from training.optimizer import load_state, sgd
from training.precision import Compiled, Precision
from training.registry import LOSSES
from utils import UsageError, versions

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
    with figures, mock.patch.object(MetricAccumulator, "mean_factors"):
        yield


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
    """An epoch of two batches; returns the number of its uploads."""
    (model, optimizer), source = fake_model(), fake_batches()
    with never_read(), Uploads() as uploads:
        loop.train_one_epoch(model, source.train_epoch(0), criterion, optimizer, 2, NoBackward(), **kwargs)
    return uploads.count


@pytest.mark.parametrize("loss", LOSSES)
def test_a_training_epoch_stays_on_the_device_and_reads_nothing(loss):
    """And uploads nothing but order, offsets and flips."""
    criterion = criterion_of(loss)
    with FakeTensorMode() as mode:
        assert train(as_fake(criterion, mode).to("cuda")) == 3


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
    """Counts the copies from the CPU to the GPU, and those of them that the host does not wait for."""

    count = unwaited = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        is_copy = "copy" in function._schema.name and isinstance(out, torch.Tensor)
        is_upload = is_copy and out.is_cuda and any(arg.device.type == "cpu" for arg in tensors)
        self.count += is_upload
        self.unwaited += is_upload and (kwargs or {}).get("non_blocking", False)
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


def test_image_files_are_uploaded_once_a_batch_from_pinned_memory_and_nobody_waits():
    """The order of the epoch is one upload more."""
    data = SimpleNamespace(samples=[("a.jpg", 0)] * 5, targets=[0] * 5, mean=(0.5,) * 3, std=(0.2,) * 3, flip=True)
    order = torch.arange(5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        batches = ImageFileBatches(data, 2, "cuda", image_size=8)
        decoded = [torch.empty(size, 8, 8, 3, dtype=torch.uint8) for size in (2, 2, 1)]
        with mock.patch("loaders.image_folder._read", return_value=decoded), Uploads() as uploads:
            assert [len(images) for images, _ in batches._batches(order, [0] * 5)] == [2, 2, 1]
    assert (uploads.count, uploads.unwaited) == (4, 3)
    assert batches._loader.pin_memory


def test_uploads_of_every_kind_are_noticed():
    with FakeTensorMode(), Uploads() as uploads:
        source = torch.zeros(2)
        source.to("cuda"), source.cuda(), torch.empty(2, device="cuda").copy_(source), torch.tensor([1], device="cuda")
        assert uploads.count == 4
        source.clone(), source.to("cuda").cpu()
        assert (uploads.count, uploads.unwaited) == (5, 0)
        source.to("cuda", non_blocking=True)
        assert (uploads.count, uploads.unwaited) == (6, 1)


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


@contextlib.contextmanager
def on_a_card(capability=(9, 0)):
    available = mock.patch("torch.cuda.is_available", return_value=True)
    with available, mock.patch("torch.cuda.get_device_capability", return_value=capability):
        yield


@pytest.mark.parametrize(
    ("capability", "allowed", "tf32"), [((8, 0), True, "on"), ((7, 5), True, "off"), ((9, 0), False, "off")]
)
def test_tf32_is_recorded_as_on_where_the_card_has_it_and_may_use_it(capability, allowed, tf32, numerics):
    torch.backends.cudnn.allow_tf32 = allowed
    with on_a_card(capability), mock.patch("torch.backends.cudnn.version", return_value=92000):
        assert versions()["tf32"] == tf32


@pytest.mark.parametrize(("smi", "driver"), [("580.65.06\n", "580.65.06"), (None, "unknown")])
def test_versions_name_cuda_cudnn_the_driver_and_tf32_where_there_is_a_gpu(smi, driver):
    run = mock.Mock(side_effect=FileNotFoundError) if smi is None else mock.Mock(return_value=mock.Mock(stdout=smi))
    with on_a_card(), mock.patch("torch.backends.cudnn.version", return_value=92000), mock.patch("subprocess.run", run):
        facts = versions()
    assert facts["driver"] == driver
    assert facts["cuda"] == str(torch.version.cuda)
    assert facts["cudnn"] == "92000"


# ----------------------------------------------------------------------------------------- what the flags set


@pytest.fixture
def numerics(monkeypatch):
    """torch's switches, wrongly set, and put back at the end."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    for name in ("allow_tf32", "benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    yield
    matmul.allow_tf32 = before
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("flags", "tf32", "deterministic"),
    [([], True, False), (["--no_tf32"], False, False), (["--deterministic"], True, True)],
)
def test_tf32_is_for_convolutions_alone_and_no_flag_fills_fresh_memory(
    flags, tf32, deterministic, numerics, tmp_path, capsys
):
    run_ok([*TWO_EPOCHS, *TINY, *flags], tmp_path, capsys)
    assert torch.backends.cudnn.allow_tf32 is tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.benchmark is not deterministic
    assert torch.backends.cudnn.deterministic is deterministic
    assert torch.are_deterministic_algorithms_enabled() is deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory


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


@pytest.mark.parametrize("arch", ["vgg16", "alexnet"])
def test_deterministic_with_a_model_that_cannot_is_one_line(arch, numerics, tmp_path, capsys):
    args = [*TWO_EPOCHS, "--arch", arch, "--overwrite"]
    with mock.patch.dict(models.CIFAR_MODELS, {arch: pooled}):
        run_ok(args, tmp_path, capsys)
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        status, _, err = run_main([*args, "--deterministic"], tmp_path, capsys)
        assert status == 2
        (line,) = messages(err)
        assert f"-a {arch} cannot be trained with --deterministic on a GPU: put_" in line
        assert len(line) < 200
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_evaluation_of_a_checkpoint_computes_as_amp_says(tmp_path, capsys):
    run_ok([*TWO_EPOCHS, *TINY], tmp_path, capsys)
    path, logits = model_folder(tmp_path) / "ckpt.pth.tar", {}
    for amp in ("none", "bf16"):
        run_ok(["-e", "--resume", path, "--threads", "1", "--amp", amp, "--save_logits"], tmp_path, capsys)
        with np.load(log_folder(tmp_path) / "evaluate" / "logits.npz") as saved:
            logits[amp] = torch.from_numpy(saved["logits"])
    assert torch.equal(logits["bf16"], logits["bf16"].bfloat16().float())
    assert not torch.equal(logits["none"], logits["none"].bfloat16().float())
    torch.testing.assert_close(logits["bf16"], logits["none"], rtol=0.02, atol=0.02)


def test_an_official_optimizer_state_takes_a_step_with_the_scaler_of_fp16():
    model = torch.nn.Linear(4, 2, bias=False)
    before, momentum = model.weight.detach().clone(), torch.rand(2, 4)
    group = {"lr": 0.1, "momentum": 0.9, "dampening": 0, "weight_decay": 0.0, "nesterov": False, "params": [0]}
    optimizer = sgd(model, 0.1, 0.9, 0.0)
    load_state(optimizer, {"state": {0: {"momentum_buffer": momentum.clone()}}, "param_groups": [group]})
    Precision("fp16", "cpu").step(model(torch.ones(1, 4)).sum(), optimizer)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * (0.9 * momentum + 1))


@pytest.mark.parametrize(("ranks", "sync_bn", "refused"), [(1, True, True), (2, True, False), (2, False, True)])
def test_one_image_is_refused_where_batch_norm_would_see_it_alone(ranks, sync_bn, refused, monkeypatch):
    # four batches of 4 over 14 images leave one of 2: with synchronised batch norm the ranks' two images count together
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)
    images = 13 if ranks == 1 else 14
    run = SimpleNamespace(
        settings=SimpleNamespace(batch_size=4, sync_bn=sync_bn, image_size=32), device=torch.device("cpu")
    )
    context = pytest.raises(UsageError, match="of one image") if refused else contextlib.nullcontext()
    with context:
        Run.check_last_batch(run, models.torchvision_model("resnet18", 10), SimpleNamespace(targets=range(images)))


class FakeSyncBatchNorm(torch.nn.SyncBatchNorm):
    """Batch norm over the images of this rank and those of another one, `others`."""

    def forward(self, x):
        together = torch.cat([self.others, x])
        normalised = F.batch_norm(together, self.running_mean, self.running_var, self.weight, self.bias, True, 0.1)
        return normalised[len(self.others) :]


@pytest.mark.parametrize("synced", [True, False])
def test_of_a_rank_without_images_nothing_enters_the_shared_statistics(synced):
    """Without sync_bn its batch norm gets blank images, which are this rank's own affair."""
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
        loop.train_step(model, *none, criterion, optimizer, Precision(), metrics)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(model.state_dict()[f"bn1.{name}"], expected.state_dict()[name])
    assert metrics.loss == 0
    assert metrics.hits.tolist() == [0, 0]
    decay = 1 - LR * 2e-4  # all that a gradient of zero leaves
    torch.testing.assert_close(model.conv1.weight.detach(), before["conv1.weight"] * decay)


# --------------------------------------------------------------------------------------- the device and the ranks


@pytest.mark.parametrize(("ranks", "gpu", "index"), [(1, 2, 2), (1, None, 0), (4, None, 3)])
def test_a_process_works_on_its_own_gpu(ranks, gpu, index, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setenv("LOCAL_RANK", "3")
    cards = mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 4, set_device=mock.DEFAULT)
    with cards as patched, mock.patch.object(distributed, "_join") as join:
        assert distributed.start(gpu) == torch.device("cuda", index)
        patched["set_device"].assert_called_once_with(torch.device("cuda", index))
    assert join.call_count == (ranks > 1)


@pytest.mark.parametrize(("gpu", "local", "message"), [(0, 0, "--gpu: torchrun"), (None, 4, "--nproc_per_node: .* 4")])
def test_ranks_without_a_card_of_their_own_are_refused(gpu, local, message, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    cards = mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 4)
    with cards, pytest.raises(UsageError, match=message):
        distributed.start(gpu)


@pytest.mark.parametrize("kind", ["cuda", "cpu"])
def test_ranks_speak_nccl_on_their_device_and_wait_for_each_other_on_the_cpu(kind, monkeypatch):
    """NCCL gives up a barrier after ten minutes."""
    monkeypatch.setattr(distributed, "_control", None)
    device, is_cuda = torch.device(kind, 1), kind == "cuda"
    meeting = mock.patch.object(distributed, "rendezvous", return_value=iter([(torch.distributed.HashStore(), 1, 2)]))
    names = ("init_process_group", "new_group", "barrier")
    with meeting, mock.patch.multiple(torch.distributed, **dict.fromkeys(names, mock.DEFAULT)) as dist:
        distributed._join(device)
        joined = dist["init_process_group"].call_args
        assert joined.args == ("nccl" if is_cuda else "gloo",)
        assert joined.kwargs["device_id"] == (device if is_cuda else None)
        with mock.patch.object(distributed, "world_size", return_value=2):
            distributed.barrier()
        assert dist["barrier"].call_args.kwargs == {"group": dist["new_group"].return_value if is_cuda else None}
        assert dist["new_group"].call_args_list == [mock.call(backend="gloo")] * is_cuda


@pytest.mark.parametrize(
    ("kind", "ranks", "mode"), [("cuda", 1, "reduce-overhead"), ("cuda", 2, None), ("cpu", 1, None)]
)
def test_ranks_compile_without_cuda_graphs_and_share_no_buffers_in_a_step(kind, ranks, mode):
    """pytorch#139207."""
    model, parallel = tiny(2), "torch.nn.parallel.DistributedDataParallel"
    with (
        mock.patch.object(distributed, "world_size", return_value=ranks),
        mock.patch("torch.compile") as compiled,
        mock.patch(parallel, return_value=model) as wrapped,
    ):
        Compiled(distributed.data_parallel(model), torch.device(kind))
    compiled.assert_called_once_with(model, mode=mode, dynamic=False)
    assert [call.kwargs["broadcast_buffers"] for call in wrapped.call_args_list] == [False] * (ranks > 1)


# ---------------------------------------------------------------------------------------------- the benchmark


@pytest.fixture
def bench(numerics):
    """The benchmark as it would be with a GPU."""
    with mock.patch("utils.choose_device", return_value=torch.device("cuda")):
        return speed.Bench(SimpleNamespace(quick=True, threads=1, repeats=1))


def test_the_benchmark_picks_algorithms_as_the_scripts_do_and_warms_up(bench):
    assert torch.backends.cudnn.benchmark
    assert torch.backends.cudnn.allow_tf32
    calls = []
    with mock.patch("torch.cuda.synchronize") as synchronize:
        times = bench.interleave({"one": lambda: calls.append(1)}, 2)
    assert (len(calls), len(times["one"]), synchronize.call_count) == (3, 2, 3)


def test_the_benchmarks_peak_is_in_tf32_as_the_convolutions_are(bench):
    matmul = torch.backends.cuda.matmul

    def interleave(*args, **kwargs):
        assert matmul.allow_tf32
        return {"product": [2.0]}

    with mock.patch.object(bench, "interleave", interleave), mock.patch("torch.randn"):
        assert speed.best_product(bench) == 8192**3
    assert not matmul.allow_tf32


def test_the_benchmarks_profile_counts_each_kernel_once_by_the_operator_that_starts_it(bench):
    def event(kind, key, seconds):
        return SimpleNamespace(device_type=getattr(DeviceType, kind), key=key, self_device_time_total=seconds)

    events = [
        event("CPU", "aten::cudnn_convolution", 4), event("CPU", "aten::convolution_backward", 2),
        event("CPU", "aten::cudnn_batch_norm", 2), event("CPU", "aten::threshold_backward", 1),
        event("CPU", "aten::add_", 0.5), event("CPU", "aten::topk", 0.5),
        event("CUDA", "sm90_xmma_fprop_implicit_gemm", 4), event("CUDA", "void cudnn::bn_fw_tr_1C11_kernel_NCHW", 2),
    ]  # fmt: skip
    bench.loops = mock.Mock()
    with mock.patch("torch.profiler.profile") as profile:
        profile.return_value.__enter__.return_value.key_averages.return_value = events
        speed.measure_profile(bench)
    shares = {name.removeprefix("% of a step, "): figure["median"] for name, figure in bench.figures.items()}
    assert shares == {"convolution": 60, "batch norm": 20, "ReLU": 10, "shortcuts": 5, "rest": 5}


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
