"""Any of torchvision's classifiers, made to return `(logits, features)`; state-dict keys unchanged."""

import torchvision

from models.feature_norm import last_linear, replace_layer, with_feature_norm
from models.resnet_cifar import NormedLinear

#: Nets with auxiliary outputs, which are not trained here.
_AUXILIARY = ("googlenet", "inception_v3")


def torchvision_archs():
    """Names of torchvision's classifiers that end in a linear layer, sorted."""
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if not name.startswith("squeezenet")]


def torchvision_net(arch, num_classes, use_norm=False, feature_norm="l1"):
    """The net of that name, with random weights.

    Args:
        arch: one of `torchvision_archs()`.
        num_classes: K.
        use_norm: a normalised head (`NormedLinear`), for LDAM.
        feature_norm: 'l1', 'l2' or 'linf', the norm that `features` carries.
    """
    extra = {"aux_logits": False, "init_weights": False} if arch in _AUXILIARY else {}
    net = torchvision.models.get_model(arch, weights=None, num_classes=num_classes, **extra)
    if use_norm:
        head = last_linear(net)
        replace_layer(net, head, NormedLinear(net.get_submodule(head).in_features, num_classes))
    return with_feature_norm(net, norm=feature_norm)
