"""Several processes, one run: what torchrun's ranks share. With one process everything here does nothing.

Every rank sees the same epoch, the single process's, and takes its part of each global batch; gradients and counts are
those of the whole batch. Rank 0 writes; the others are silent.
"""

import os
import sys
import warnings
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils import DataError, UsageError, choose_device

_control: Any = None  # the group of gathers and barriers between processes, on the CPU


def start(gpu: int | None = None) -> torch.device:
    """Join the other ranks if torchrun started this process, and set the current CUDA device.

    On ranks other than 0 `sys.stdout` is replaced, so that they print nothing.

    Returns:
        the device: number LOCAL_RANK with several ranks, else that of `utils.choose_device(gpu)`.

    Raises:
        UsageError: see `utils.choose_device`. DataError: the other ranks cannot be reached.
    """
    is_alone = int(os.environ.get("WORLD_SIZE") or 1) == 1
    local = int(os.environ.get("LOCAL_RANK") or 0) if torch.cuda.is_available() else None
    if gpu is not None and not is_alone:
        raise UsageError("--gpu: torchrun gives each process a card of its own; leave it out")
    device = choose_device(gpu if is_alone else local)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not is_alone and not dist.is_initialized():
        _join(device)
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def _join(device):
    global _control
    on_cuda = device.type == "cuda"
    try:
        store, rank_here, ranks = next(rendezvous("env://"))
        # a key space for each life of the job: after a restart no rank may read the addresses of the dead
        store = dist.PrefixStore(f"life{restarts()}", store)
        dist.init_process_group(
            "nccl" if on_cuda else "gloo", store=store, rank=rank_here, world_size=ranks,
            device_id=device if on_cuda else None,
        )  # fmt: skip
        # NCCL gives up a barrier after ten minutes, and rank 0 may read half a million files first
        _control = dist.new_group(backend="gloo") if on_cuda else None
    except (RuntimeError, ValueError) as error:
        raise DataError(f"the other processes cannot be reached: {error}") from None


def stop() -> None:
    """Leave the other ranks."""
    if world_size() > 1:
        dist.destroy_process_group()


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another rank cannot be reached any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def world_size() -> int:
    """Number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main() -> bool:
    """Whether this rank writes."""
    return rank() == 0


def restarts() -> int:
    """How often torchrun has started this job again after a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the ranks; the tensor itself with one rank."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def broadcast_buffers(model: torch.nn.Module) -> None:
    """Give every rank rank 0's buffers (batch norm's running statistics)."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def barrier() -> None:
    """Wait for every rank."""
    if world_size() > 1:
        dist.barrier(group=_control)


def data_parallel(model: torch.nn.Module, sync_bn: bool = False) -> torch.nn.Module:
    """The model whose gradients are means over the ranks: `model` itself with one rank."""
    if world_size() == 1:
        return model
    if sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    on_cuda = next(model.parameters()).is_cuda
    # buffers are shared once an epoch, see `broadcast_buffers`
    warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if on_cuda else None, broadcast_buffers=False
    )


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values
