"""A batch of one image, which batch norm cannot take, on any rank."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from experiment.checks import check_last_batch
from training.precision import on_device
from utils import UsageError


@pytest.mark.parametrize(
    ("size", "ranks", "sync_bn", "refused"),
    [
        (8, 1, False, False), (11, 1, False, True),  # 34 = 4 * 8 + 2 = 3 * 11 + 1
        (8, 2, False, True), (8, 2, True, False),  # a last batch of two, one image for each rank
        (17, 2, False, False), (31, 2, False, True),  # the last batch has two images for one rank, one for the other
        (3, 2, False, True), (12, 5, False, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kernels", ["cudnn", "native"])
def test_batch_of_one_image_on_any_rank(size, ranks, sync_bn, refused, kernels, monkeypatch):
    monkeypatch.setattr("experiment.checks.distributed.world_size", lambda: ranks)
    layers = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.BatchNorm2d(3))
    model = on_device(layers, torch.device("cpu"), kernels)
    batches = SimpleNamespace(targets=[0] * 34, batch_size=size, image_size=32)
    with pytest.raises(UsageError, match="of one image of 34") if refused else contextlib.nullcontext():
        check_last_batch(model, batches, sync_bn)
