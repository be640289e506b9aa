"""The influence-balanced loss in a plain PyTorch loop: python -m examples.plain_loop

The model returns its logits and h, the input of its last layer. losses.py is all that you need to copy.
"""

import torch
from torch import Tensor, nn

from examples.digits import class_mean, digits
from losses import CrossEntropyLoss, IBLoss, inverse_frequency_weights


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=4, padding=2), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(512, 10)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(images)
        return self.head(h), h


def train(model: nn.Module, epochs: int, start_ib: int) -> list[float]:
    """Train a model that returns (logits, h), print a line an epoch; the class mean after each epoch, in percent."""
    train_batches, test_batches, class_counts = digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cross_entropy = CrossEntropyLoss()
    influence_balanced = IBLoss(inverse_frequency_weights(class_counts), alpha=1000.0, raw_features=True)

    scores = []
    for epoch in range(epochs):
        criterion = influence_balanced if epoch >= start_ib else cross_entropy
        optimizer.param_groups[0]["lr"] = 0.0005 if epoch >= start_ib else 0.05
        model.train()
        for images, target in train_batches:
            logits, h = model(images)
            loss = criterion(logits, target, h)  # cross entropy ignores h
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        scores.append(class_mean(lambda x: model(x)[0], test_batches))
        print(
            f"epoch {epoch + 1}  {type(criterion).__name__}  last loss {loss.item():.3f}  class mean {scores[-1]:.1f}"
        )
    return scores


def main() -> list[float]:
    torch.manual_seed(0)
    return train(Model(), epochs=12, start_ib=8)


if __name__ == "__main__":
    main()
