"""Out of memory is one line that says which flag needs less, and spares the last checkpoint."""

from unittest import mock

import pytest
import torch
from script_runner import TINY, TWO_EPOCHS, fails, load_checkpoint, model_folder, run_main, run_ok

import cifar_train


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        lambda *args, **how: torch.empty(2**50),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
    ],
    ids=["python", "cuda", "torch", "context", "cublas"],
)
def test_out_of_memory_is_one_line(fault, tmp_path):
    run_ok([*TINY, *TWO_EPOCHS, "--epochs", "1", "--milestones"], tmp_path)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    before = path.read_bytes()
    again = [*TINY, *TWO_EPOCHS, "--epochs", "3", "--milestones", "--resume", "auto", "--force"]
    with mock.patch.object(cifar_train, "train_one_epoch", side_effect=fault):
        fails(again, tmp_path, "out of memory: a smaller --batch-size or a smaller model needs less", status=1)
    assert path.read_bytes() == before
    assert load_checkpoint(path)["epoch"] == 1


def test_other_runtime_errors_are_not_hidden(tmp_path):
    fault = mock.patch.object(cifar_train, "train_one_epoch", side_effect=RuntimeError("a fault of ours"))
    with fault, pytest.raises(RuntimeError, match="a fault of ours"):
        run_main([*TINY, *TWO_EPOCHS], tmp_path)
