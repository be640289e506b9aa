"""The yardstick: the training loop as most releases of this field have it.

NCHW tensors, a fresh tensor for every activation, torchvision transforms one image at a time in a DataLoader,
`.item()` and accuracy in every step.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from imbalance_cifar import CIFAR_MEAN, CIFAR_STD
from models.resnet_cifar import BasicBlock


def out_of_place(model: nn.Module) -> nn.Module:
    """Give the blocks of one of our CIFAR models a fresh tensor for every activation. Returns the model."""
    for block in model.modules():
        if isinstance(block, BasicBlock):
            block.forward = functools.partial(_block, block)  # type: ignore[method-assign]
    return model


def _block(block, x):
    out = nn.functional.relu(block.bn1(block.conv1(x)))
    out = block.bn2(block.conv2(out))
    return nn.functional.relu(out + block._shortcut(x))


class Images(Dataset):
    """(N, H, W, 3) uint8 images in memory, transformed one at a time."""

    def __init__(self, images: np.ndarray, targets: Sequence[int], transform: Callable) -> None:
        self.images, self.targets, self.transform = images, targets, transform

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.images[index])), self.targets[index]


def loader(dataset: Any, train: bool, workers: int, batch_size: int = 128) -> DataLoader:
    """Batches of a data set of 32 x 32 images with `data` and `targets`; augmented and shuffled for training."""
    augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if train else []
    transform = transforms.Compose([*augment, transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)])
    images = Images(dataset.data, dataset.targets, transform)
    return DataLoader(images, batch_size, shuffle=train, num_workers=workers)


def topk_hits(logits: torch.Tensor, target: torch.Tensor, ks: tuple[int, ...] = (1, 5)) -> list[float]:
    best = logits.topk(max(ks), 1).indices.t()
    hits = best.eq(target.view(1, -1).expand_as(best))
    return [hits[:k].reshape(-1).float().sum().item() for k in ks]


def train_step(model: nn.Module, images: torch.Tensor, target: torch.Tensor, optimizer: Any) -> tuple[float, ...]:
    """One step, its figures read at once. Returns (loss, top-1 hits, top-5 hits)."""
    logits, _ = model(images)
    loss = nn.functional.cross_entropy(logits, target)
    hits = topk_hits(logits, target)
    figures = loss.item(), *hits
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return figures


def train_epoch(model: nn.Module, batches: Iterable, optimizer: Any) -> list[tuple[float, ...]]:
    model.train()
    device = next(model.parameters()).device
    return [train_step(model, images.to(device), target.to(device), optimizer) for images, target in batches]


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable) -> list[int]:
    """The predictions, gathered on the CPU batch by batch."""
    model.eval()
    device, predictions = next(model.parameters()).device, []
    for images, target in batches:
        logits, _ = model(images.to(device))
        topk_hits(logits, target.to(device))
        nn.functional.cross_entropy(logits, target.to(device)).item()
        predictions.extend(logits.argmax(1).cpu().numpy())
    return predictions
