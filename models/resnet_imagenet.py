"""torchvision's ResNets, made to return `(logits, features)`; state-dict keys unchanged."""

import torchvision
from torch import nn

from models.feature_norm import with_feature_norm
from models.resnet_cifar import NormedLinear


def _resnet(name, weights):
    def build(num_classes=1000, pretrained=False, use_norm=False, feature_norm="l1"):
        make = getattr(torchvision.models, name)
        if pretrained:
            net = make(weights=weights)
            net.fc = nn.Linear(net.fc.in_features, num_classes)
        else:
            net = make(weights=None, num_classes=num_classes)
        if use_norm:
            net.fc = NormedLinear(net.fc.in_features, num_classes)
        return with_feature_norm(net, "fc", feature_norm)

    build.__name__ = name
    build.__doc__ = f"torchvision's {name}; `pretrained` loads its {weights} weights and gives it a new last layer."
    return build


resnet18 = _resnet("resnet18", "IMAGENET1K_V1")
resnet50 = _resnet("resnet50", "IMAGENET1K_V1")
