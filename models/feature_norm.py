"""Any classifier that ends in a linear layer, made to return `(logits, features)`."""

from models.resnet_cifar import feature_norm


class _FeatureNorm:
    """A pair of hooks: the last layer's input is measured on its way in, the norm goes out with the logits."""

    def __init__(self, norm):
        self.norm, self.features = norm, None

    def measure(self, layer, args):
        self.features = feature_norm(args[0].flatten(1), self.norm)

    def attach(self, module, args, logits):
        features, self.features = self.features, None
        return logits, features


def with_feature_norm(module, layer, norm="l1"):
    """Make `module` return `(logits, features)`; features (N, 1) is the norm of the input of `layer`.

    Works by hooks on the module itself: its type, parameters and state-dict keys stay as they are.

    Args:
        module: a classifier that returns logits.
        layer: its last linear layer, as a dotted name ('fc', 'classifier.1') or the layer itself.
        norm: 'l1', 'l2' or 'linf'.

    Returns:
        the same module.

    Raises:
        AttributeError: no layer of that name. ValueError: a layer of another module.
    """
    if isinstance(layer, str):
        layer = module.get_submodule(layer)
    if all(layer is not part for part in module.modules()):
        raise ValueError("the layer is not a part of the module")
    hooks = _FeatureNorm(norm)
    layer.register_forward_pre_hook(hooks.measure)
    module.register_forward_hook(hooks.attach)
    return module
