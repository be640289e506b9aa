"""Any classifier that ends in a linear layer, made to return `(logits, features)`."""

from torch import nn

from models.resnet_cifar import NormedLinear, feature_norm


class _FeatureNorm:
    """A pair of hooks: the last layer's input is measured on its way in, the norm goes out with the logits."""

    def __init__(self, norm):
        self.norm, self.features = norm, None

    def measure(self, layer, args):
        self.features = feature_norm(args[0].flatten(1), self.norm)

    def attach(self, module, args, output):
        features, self.features = self.features, None
        logits = output[0] if isinstance(output, tuple) else output  # torchvision's auxiliary outputs are left out
        return logits, features


def last_linear(module):
    """The dotted name of a classifier's last nn.Linear or NormedLinear, in the order in which its parts were made.

    That is the layer that gives the logits in all of torchvision's classifiers but SqueezeNet, which has none.

    Raises:
        ValueError: no linear layer.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, NormedLinear))]
    if not names:
        raise ValueError(f"{type(module).__name__} has no linear layer, so it has no |h| to take the norm of")
    return names[-1]


def replace_layer(module, name, layer):
    """Put `layer` in the place of the part with that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def with_feature_norm(module, layer=None, norm="l1"):
    """Make `module` return `(logits, features)`; features (N, 1) is the norm of the input of `layer`.

    Works by hooks on the module itself: its type, parameters and state-dict keys stay as they are.

    Args:
        module: a classifier that returns logits.
        layer: its last linear layer, as a dotted name ('fc', 'classifier.1') or the layer itself; None: see
            `last_linear`.
        norm: 'l1', 'l2' or 'linf'.

    Returns:
        the same module.

    Raises:
        AttributeError: no layer of that name. ValueError: a layer of another module, or none to be found.
    """
    if layer is None:
        layer = last_linear(module)
    if isinstance(layer, str):
        layer = module.get_submodule(layer)
    if all(layer is not part for part in module.modules()):
        raise ValueError("the layer is not a part of the module")
    hooks = _FeatureNorm(norm)
    layer.register_forward_pre_hook(hooks.measure)
    module.register_forward_hook(hooks.attach)
    return module
