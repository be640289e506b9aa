"""The influence-balanced loss with a model of timm: python -m examples.timm_example

`forward_head(..., pre_logits=True)` gives h, the input of the classifier, for every timm model that ends in a linear
layer. The other way is `models.with_feature_norm(model)`: the model then returns the norm of h.
"""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from examples import plain_loop


class WithH(nn.Module):
    """A timm model that returns its logits, (N, K), and h, (N, D): what examples/plain_loop.py trains."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        h = self.model.forward_head(self.model.forward_features(images), pre_logits=True)
        return self.model.get_classifier()(h), h


def main(arch: str = "test_resnet") -> list[float]:
    """See `plain_loop.train`."""
    torch.manual_seed(0)
    return plain_loop.train(WithH(timm.create_model(arch, num_classes=10)), epochs=10, start_ib=7)


if __name__ == "__main__":
    main()
