"""The nets, by name. To add a CIFAR net: write it in this package and name it in `CIFAR_NETS`."""

from models.feature_norm import last_linear, with_feature_norm
from models.resnet_cifar import resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202
from models.resnet_imagenet import imagenet_weights, resnet18, resnet50
from models.torchvision_nets import torchvision_archs, torchvision_net

CIFAR_NETS = {net.__name__: net for net in (resnet20, resnet32, resnet44, resnet56, resnet110, resnet1202)}
IMAGENET_NETS = {net.__name__: net for net in (resnet18, resnet50)}

__all__ = [
    "CIFAR_NETS", "IMAGENET_NETS", "imagenet_weights", "last_linear", "torchvision_archs",
    "torchvision_net", "with_feature_norm", *CIFAR_NETS, *IMAGENET_NETS,
]  # fmt: skip
