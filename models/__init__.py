"""The models, by name. To add a CIFAR model: write it in this package and name it in `CIFAR_MODELS`."""

import functools

from models.feature_norm import HeadOnly, head_name, with_feature_norm
from models.resnet_cifar import CIFAR_MODELS, NormedLinear
from models.torchvision_models import (
    check_image_size,
    current_names,
    imagenet_weights,
    torchvision_archs,
    torchvision_model,
)

resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202 = CIFAR_MODELS.values()
IMAGENET_MODELS = {name: functools.partial(torchvision_model, name) for name in ("resnet18", "resnet50")}
resnet18, resnet50 = IMAGENET_MODELS.values()

__all__ = [
    "CIFAR_MODELS", "IMAGENET_MODELS", "HeadOnly", "NormedLinear", "check_image_size", "current_names", "head_name",
    "imagenet_weights", "torchvision_archs", "torchvision_model", "with_feature_norm", *CIFAR_MODELS, *IMAGENET_MODELS,
]  # fmt: skip
