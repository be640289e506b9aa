"""Any classifier that ends in a linear layer, made to return `(logits, features)`."""

from typing import Any

import torch
from torch import nn

from losses import row_norm
from models.resnet_cifar import NormedLinear


class _FeatureNorm:
    """A pair of hooks: the last layer's input is measured there, its norm leaves the model with the logits.

    The first call outside torch.compile checks that the layer's output is what leaves the model.
    """

    def __init__(self, norm, name):
        self.norm, self.name, self.checked = norm, name, False
        self.features = self.output = None

    def measure(self, layer, args, output):
        self.features = row_norm(args[0].flatten(1), self.norm)[:, None]
        # is_compiling() first: it is a constant there, so that nothing else is traced or guarded
        if not torch.compiler.is_compiling() and not self.checked:
            self.output = output

    def attach(self, module, args, output):
        logits = output[0] if isinstance(output, tuple) else output  # torchvision's auxiliary outputs are left out
        features, self.features = self.features, None
        if not torch.compiler.is_compiling() and not self.checked:
            self._check(logits)
        return logits, features

    def _check(self, logits):
        output, self.output = self.output, None
        same = output is logits or (output is not None and output.shape == logits.shape and torch.equal(output, logits))
        if not same:
            raise ValueError(
                f"the output of the layer {self.name!r} is not what the model returns, so its input is not the h of "
                "the logits: name the last linear layer with layer="
            )
        self.checked = True


def last_linear(module: nn.Module) -> str:
    """The dotted name of a classifier's last nn.Linear or NormedLinear, in the order in which its parts were made.

    That is the layer that gives the logits in all of torchvision's classifiers but SqueezeNet, which has none.

    Raises:
        ValueError: no linear layer.
    """
    names = [name for name, part in module.named_modules() if isinstance(part, (nn.Linear, NormedLinear))]
    if not names:
        raise ValueError(f"{type(module).__name__} has no linear layer, so it has no |h| to take the norm of")
    return names[-1]


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the part with that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def redraw(layer: nn.Linear | NormedLinear) -> None:
    """Draw a layer's weights anew, as its class does, from torch's generator on the CPU."""
    if isinstance(layer, NormedLinear):
        fresh: nn.Module = NormedLinear(*layer.weight.shape)
    else:
        fresh = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    layer.load_state_dict(fresh.state_dict())


class HeadOnly(nn.Module):
    """A classifier of which only the last linear layer is trained: all else is frozen, in evaluation mode.

    That layer is its only part, so whatever sets modes, counts batches or averages gradients leaves the rest alone:
    batch norm's statistics stay as they are, dropout is off.

    Args:
        model: the classifier, see `last_linear`; it is frozen, and called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = (model.eval().requires_grad_(False),)  # in a tuple it is no part
        self.head = model.get_submodule(last_linear(model)).requires_grad_()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._whole[0](images)


def with_feature_norm(module: nn.Module, layer: str | nn.Module | None = None, norm: str = "l1") -> Any:
    """Make `module` return `(logits, features)`; features (N, 1) is the norm of the input of `layer`.

    Works by hooks on the module itself: its type, parameters and state-dict keys stay as they are. The first call
    raises ValueError if the output of `layer` is not what the module returns.

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
    names = {part: name for name, part in module.named_modules()}
    if layer not in names:
        raise ValueError("the layer is not a part of the module")
    hooks = _FeatureNorm(norm, names[layer])
    layer.register_forward_hook(hooks.measure)
    module.register_forward_hook(hooks.attach)
    return module
