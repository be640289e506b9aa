"""The yardstick: the training loop as most releases of this field have it, written afresh.

NCHW tensors, a fresh tensor for every activation, torchvision transforms one picture at a time in a DataLoader,
`.item()` and accuracy in every step.
"""

import functools

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from imbalance_cifar import CIFAR_MEAN, CIFAR_STD
from models.resnet_cifar import BasicBlock


def out_of_place(net):
    """Give the blocks of one of our CIFAR nets a fresh tensor for every activation. Returns the net."""
    for block in net.modules():
        if isinstance(block, BasicBlock):
            block.forward = functools.partial(_block, block)  # type: ignore[method-assign]
    return net


def _block(block, x):
    out = nn.functional.relu(block.bn1(block.conv1(x)))
    out = block.bn2(block.conv2(out))
    return nn.functional.relu(out + block._shortcut(x))


class Pictures(Dataset):
    """uint8 pictures in memory, transformed one at a time."""

    def __init__(self, images, targets, train):
        augment = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if train else []
        normalise = [transforms.ToTensor(), transforms.Normalize(CIFAR_MEAN, CIFAR_STD)]
        self.images, self.targets = images, targets
        self.transform = transforms.Compose([*augment, *normalise])

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return self.transform(Image.fromarray(self.images[index])), int(self.targets[index])


def loader(images, targets, train, workers, batch_size=128):
    return DataLoader(Pictures(images, targets, train), batch_size, shuffle=train, num_workers=workers)


def topk_hits(logits, target, ks=(1, 5)):
    best = logits.topk(max(ks), 1).indices.t()
    hits = best.eq(target.view(1, -1).expand_as(best))
    return [hits[:k].reshape(-1).float().sum().item() for k in ks]


def train_step(model, images, target, optimizer):
    """One step, its figures read at once. Returns (loss, top-1 hits, top-5 hits)."""
    logits, _ = model(images)
    loss = nn.functional.cross_entropy(logits, target)
    hits = topk_hits(logits, target)
    figures = loss.item(), *hits
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return figures


def train_epoch(model, batches, optimizer):
    model.train()
    device = next(model.parameters()).device
    return [train_step(model, images.to(device), target.to(device), optimizer) for images, target in batches]


@torch.no_grad()
def evaluate(model, batches):
    model.eval()
    device, predictions = next(model.parameters()).device, []
    for images, target in batches:
        logits, _ = model(images.to(device))
        topk_hits(logits, target.to(device))
        nn.functional.cross_entropy(logits, target.to(device)).item()
        predictions.extend(logits.argmax(1).cpu().numpy())
    return predictions
