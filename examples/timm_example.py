"""The influence-balanced loss with a model of timm: python -m examples.timm_example

`forward_head(..., pre_logits=True)` gives h, the input of the classifier, for every timm model that ends in a linear
layer. The other way is `models.with_feature_norm(model)`: the model then returns the norm of h.
"""

from typing import Any

import timm
import torch
from torch import Tensor

from examples.digits import class_mean, digits
from losses import CrossEntropyLoss, IBLoss, inverse_frequency_weights

EPOCHS, START_IB = 10, 7


def logits_and_h(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) and (N, D)."""
    h = model.forward_head(model.forward_features(images), pre_logits=True)
    return model.get_classifier()(h), h


def main(arch: str = "test_resnet") -> list[float]:
    """Train, print a line an epoch; the class mean after each epoch, in percent."""
    torch.manual_seed(0)
    train, test, class_counts = digits()
    model = timm.create_model(arch, num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cross_entropy = CrossEntropyLoss()
    influence_balanced = IBLoss(inverse_frequency_weights(class_counts), alpha=1000.0, raw_features=True)

    scores = []
    for epoch in range(EPOCHS):
        criterion = influence_balanced if epoch >= START_IB else cross_entropy
        optimizer.param_groups[0]["lr"] = 0.0005 if epoch >= START_IB else 0.05
        model.train()
        for images, target in train:
            logits, h = logits_and_h(model, images)
            loss = criterion(logits, target, h)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        scores.append(class_mean(model, test))
        print(
            f"epoch {epoch + 1}  {type(criterion).__name__}  last loss {loss.item():.3f}  class mean {scores[-1]:.1f}"
        )
    return scores


if __name__ == "__main__":
    main()
