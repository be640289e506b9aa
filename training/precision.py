"""--amp, --tf32, --batch_norm, --compile and --deterministic: how numbers are computed on the device."""

import os

import torch

AMP_TYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast for the model, and a loss scaler for fp16. The losses compute in float32 whatever it is.

    Args:
        amp: 'none', 'bf16' or 'fp16'.
        device_type: 'cuda' or 'cpu'.
    """

    def __init__(self, amp: str = "none", device_type: str = "cpu") -> None:
        self.dtype, self.device_type = AMP_TYPES[amp], device_type
        self.scaler = torch.amp.GradScaler(device_type, enabled=amp == "fp16")

    def autocast(self) -> torch.autocast:
        """The context in which the model runs."""
        return torch.autocast(self.device_type, self.dtype, enabled=self.dtype is not None)

    def step(self, loss: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
        """Zero the gradients, backpropagate `loss` (0-d), and step `optimizer`.

        In fp16 the step is skipped where a scaled gradient overflows.
        """
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()


class Compiled(torch.nn.Module):
    """--compile: `model` compiled for the size of the first batch.

    A batch of another size, the last one of an epoch, runs eagerly: a graph of its own would take longer to compile.
    The compiler makes no CUDA graphs: `cuda_graph.StepGraph` holds the whole step, loss and optimizer included.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model, self.compiled = model, torch.compile(model, dynamic=False)
        self.sizes: list[int] = []  # a list, as a number that changes would make a CUDA graph be captured again

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.sizes = self.sizes or [len(images)]
        return self.compiled(images) if len(images) in self.sizes else self.model(images)


class NativeBatchNorm2d(torch.nn.BatchNorm2d):
    """Batch norm by PyTorch's own kernels; on a GPU `nn.BatchNorm2d` takes cuDNN's for float32."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.momentum is None or not self.track_running_stats:
            return super().forward(images)
        if self.training and images.numel() == images.shape[1]:
            raise ValueError(f"expected more than 1 value per channel when training, got {tuple(images.shape)}")
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        # not torch.batch_norm, which does not read its argument cudnn_enabled any more
        return torch.native_batch_norm(
            images, self.weight, self.bias, self.running_mean, self.running_var, self.training, self.momentum, self.eps
        )[0]


def on_device(model: torch.nn.Module, device: torch.device, batch_norm: str = "cudnn") -> torch.nn.Module:
    """The model as it is trained: on the device, channels last.

    batch_norm: 'cudnn', or 'native': its BatchNorm2d layers become NativeBatchNorm2d, in place, their state unchanged.
    """
    for part in model.modules():
        if batch_norm == "native" and type(part) is torch.nn.BatchNorm2d:
            part.__class__ = NativeBatchNorm2d
    return model.to(device).to(memory_format=torch.channels_last)


def set_determinism(deterministic: bool, tf32: bool = True) -> None:
    """Set torch's global switches for determinism and TF32.

    Args:
        deterministic: bitwise repeatable on CUDA too; False: cuDNN picks the fastest algorithms.
        tf32: convolutions on a GPU may use TF32. Matrix products never do.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(deterministic)
    # nothing here reads memory that nobody wrote
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = False
