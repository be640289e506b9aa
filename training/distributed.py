"""Several processes, one run: what torchrun's ranks share. With one process everything here does nothing.

Every rank sees the same epoch, the single process's, and takes its part of each global batch; gradients and counts are
those of the whole batch. Rank 0 writes; the others are silent.
"""

import contextlib
import os
import sys

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from utils import DataError, UsageError, choose_device


def start(gpu=None):
    """Join the other ranks if torchrun started this process. Returns the device: LOCAL_RANK's, or `--gpu`'s.

    Raises:
        UsageError: see `utils.choose_device`. DataError: the other ranks cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return choose_device(gpu)
    device = choose_device(int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else None)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        try:
            store, rank_here, ranks = next(rendezvous("env://"))
            # a key space for each life of the job: after a restart no rank may read the addresses of the dead
            store = dist.PrefixStore(f"life{restarts()}", store)
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank_here, world_size=ranks)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"the other processes cannot be reached: {error}") from None
    if not is_main():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    return device


def stop():
    """Leave the other ranks."""
    if size() > 1:
        dist.destroy_process_group()


def is_lost(error):
    """Whether a RuntimeError says that another rank cannot be reached any more."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def size():
    """Number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if size() > 1 else 0


def is_main():
    """Whether this rank writes."""
    return rank() == 0


def restarts():
    """How often torchrun has started this job anew after a rank died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def part(start, stop):
    """This rank's part of [start, stop): the ranks' parts follow one another, the first ones are larger by one.

    Returns:
        (start, stop), empty where there are fewer items than ranks.
    """
    share, over = divmod(stop - start, size())
    first = start + rank() * share + min(rank(), over)
    return first, first + share + (rank() < over)


def total(tensor):
    """The sum of a tensor over the ranks; the tensor itself with one rank."""
    if size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def smallest(tensor):
    """The smallest value of a tensor over the ranks."""
    if size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor, dist.ReduceOp.MIN)
    return tensor


def agree(value):
    """Rank 0's value, on every rank."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, 0)
    return box[0]


@contextlib.contextmanager
def main_first():
    """Rank 0 does what is inside, then the others: what it writes they find."""
    if size() > 1 and not is_main():
        dist.barrier()
    yield
    if size() > 1 and is_main():
        dist.barrier()


def wait_for_all():
    if size() > 1:
        dist.barrier()


def wrap(model, sync_bn=False):
    """The net whose gradients are means over the ranks: `model` itself with one rank.

    Raises:
        UsageError: sync_bn on a CPU.
    """
    on_cuda = next(model.parameters()).is_cuda
    if sync_bn and not on_cuda:
        raise UsageError("--sync_bn needs CUDA devices")
    if size() == 1:
        return model
    if sync_bn:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if on_cuda else None
    )


def share_buffers(model):
    """Give every rank rank 0's buffers (batch norm's running statistics)."""
    if size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
