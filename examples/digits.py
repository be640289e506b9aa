"""Long-tailed handwritten digits as DataLoaders, and the mean class accuracy: what the three examples share."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import ToTensor

from imbalance_cifar import IMBALANCEDIGITS


def digits(batch_size: int = 32) -> tuple[DataLoader, DataLoader, list[int]]:
    """(training batches, test batches, training images of each class: 124 of class 0 down to 1 of class 9)."""
    train = IMBALANCEDIGITS(imb_factor=0.01, transform=ToTensor())
    test = IMBALANCEDIGITS(train=False, transform=ToTensor())
    return DataLoader(train, batch_size, shuffle=True), DataLoader(test, 256), train.get_cls_num_list()


@torch.no_grad()
def class_mean(predict: Callable[[Tensor], Tensor], batches: DataLoader) -> float:
    """The mean of the classes' accuracies in percent; `predict` maps images to logits."""
    hits, images = torch.zeros(10), torch.zeros(10)
    for x, target in batches:
        hits.index_add_(0, target, (predict(x).argmax(1) == target).float())
        images.index_add_(0, target, torch.ones(len(target)))
    return 100 * (hits / images).mean().item()
