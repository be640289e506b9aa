"""How many operators the host calls in an epoch: on a GPU each is a kernel or more, and costs some microseconds.

    python benchmarks/operators.py [--steps 97] [--test_images 10000]

Counted on the CPU with ResNet-32, batch 2: operators depend on neither the device nor the size of a batch. Views, fresh
memory and marks of the profiler do not count. A CUDA graph replaces those of a step by one launch.
"""

import argparse
import collections
import pathlib
import sys
from types import SimpleNamespace

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import losses
import models
from loaders.in_memory import InMemoryBatches
from training import loop

FREE = {
    "_record_function_enter_new", "_record_function_exit", "_reshape_alias", "_unsafe_view", "alias", "as_strided",
    "detach", "empty", "empty_like", "empty_strided", "expand", "lift_fresh", "new_empty", "new_empty_strided",
    "permute", "resize_", "select", "slice", "squeeze", "t", "transpose", "unsqueeze", "view",
}  # fmt: skip


class Operators(TorchDispatchMode):
    """Counts the operators that are called."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function._schema.name] += function._schema.name.split("::")[1] not in FREE
        return function(*args, **(kwargs or {}))


def count(batches: int, criterion: losses.Loss, trains: bool) -> int:
    """Operators of a pass over so many batches."""
    images = np.zeros((2 * batches, 32, 32, 3), np.uint8)
    data = SimpleNamespace(data=images, targets=[0, 1] * batches, mean=(0.5,) * 3, std=(0.2,) * 3, flip=True)
    source, model = InMemoryBatches(data, 2), models.resnet32(10).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, fused=True)
    for parameter in model.parameters():
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    with Operators() as operators:
        if trains:
            loop.train_one_epoch(model, source.train_epoch(0), criterion, optimizer, 10)
        else:
            loop.evaluate(model, source.eval_epoch(), [1] * 10)
    return sum(operators.count.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=97)
    parser.add_argument("--test_images", type=int, default=10000)
    options = parser.parse_args()
    evaluations = -(-options.test_images // (loop.EVALUATION_PIXELS // 32**2))
    for name, criterion in (("CE", losses.CrossEntropyLoss()), ("IB", losses.IBLoss(torch.ones(10)))):
        first, second = (count(batches, criterion, True) for batches in (1, 2))
        step, around = second - first, 2 * first - second
        first, second = (count(batches, criterion, False) for batches in (1, 2))
        tested = 2 * first - second + evaluations * (second - first)
        plain, graph = step * options.steps + around + tested, options.steps + around + tested
        print(f"{name}: a step {step}, around the steps {around}, an evaluation {tested}; "
              f"an epoch {plain}, with a CUDA graph {graph}")  # fmt: skip


if __name__ == "__main__":
    main()
