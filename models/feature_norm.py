"""A classifier's head, its last linear layer, by name; and any classifier made to return `(logits, features)`."""

import functools
from collections.abc import Mapping

import torch
from torch import nn

from losses import row_norm
from models.resnet_cifar import NormedLinear
from utils import UsageError


def head_name(model: nn.Module) -> str:
    """The dotted name of the layer that gives the logits, an nn.Linear or NormedLinear.

    It is the model's attribute `head_name` if it has one, else its only linear layer, or the last one of torchvision's
    classifiers.

    Raises:
        ValueError: no linear layer. UsageError: several, and no attribute that says which. AttributeError: no layer of
            that name.
    """
    name = getattr(model, "head_name", None)
    if name is not None:
        model.get_submodule(name)
        return name
    names = _linear_layers(model)
    if len(names) > 1 and not type(model).__module__.startswith("torchvision.models."):
        raise UsageError(
            f"{type(model).__name__} has the linear layers {', '.join(names)}: say which one gives the logits, "
            f"model.head_name = {names[-1]!r} for example"
        )
    return names[-1]


def _linear_layers(model):
    names = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, NormedLinear))]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer, so it has no |h| to take the norm of")
    return names


class HeadOnly(nn.Module):
    """A classifier of which only the head is trained: all other layers are frozen, in evaluation mode.

    The head is the only submodule, so `train()`, `parameters()` and DistributedDataParallel see nothing else: batch
    norm's statistics do not change, dropout is off.

    Args:
        model: the classifier, see `head_name`. It is changed in place: evaluation mode, only the head requires
            gradients.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = (model.eval().requires_grad_(False),)  # a tuple, so that it is not a submodule
        self.head = model.get_submodule(head_name(model)).requires_grad_()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._whole[0](images)


def with_feature_norm(module: nn.Module, layer: str | None = None, norm: str = "l1") -> nn.Module:
    """Make `module` return `(logits, features)`; features (N, 1) is the norm of the input of its head.

    Registers forward hooks on `module`, in place: its type, parameters and state-dict keys stay the same. The norm is
    stored on the output tensor of the linear layer, so calls in several threads (nn.DataParallel, a server) do not mix.
    Call torch.compile last: `torch.compile(with_feature_norm(model))`.

    Args:
        module: a classifier that returns logits, the head's own output. From a tuple that begins with them, or a dict
            with 'logits' (transformers), only the logits are kept.
        layer: the dotted name of its head ('fc', 'classifier.1'), which becomes `module.head_name`. None: see
            `head_name`; of several linear layers the one whose output is what the module returns, in each call.
        norm: 'l1', 'l2' or 'linf'.

    Returns:
        the same module.

    Raises:
        AttributeError: no layer of that name.
        ValueError: no linear layer; in a call: a layer whose output is not what the module returns, or an unknown norm.
    """
    if layer is not None:
        module.head_name = layer  # type: ignore[assignment]
    try:
        names = [head_name(module)]
    except UsageError:  # there are several
        names = _linear_layers(module)
    for name in names:
        module.get_submodule(name).register_forward_hook(functools.partial(_note, norm))
    module.register_forward_hook(functools.partial(_attach, names))
    return module


def _note(norm, head, args, output):
    output.norm_of_input = row_norm(args[0].flatten(1), norm)[:, None]


def _attach(names, module, args, output):
    logits = _logits(output)
    if not hasattr(logits, "norm_of_input"):
        raise ValueError(
            f"the output of the layer {' or '.join(map(repr, names))} is not what the model returns, so its input is "
            "not the h of the logits: name the last linear layer with layer="
        )
    return logits, logits.norm_of_input


def _logits(output):
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple):
        output = output[0]  # torchvision's auxiliary outputs are left out
    if not isinstance(output, torch.Tensor):
        raise ValueError(
            "the model returns neither logits, nor a tuple that begins with them, nor a dict with 'logits'"
        )
    return output
