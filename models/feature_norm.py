"""A classifier's head, its last linear layer, by name; and any classifier made to return `(logits, features)`."""

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from losses import row_norm
from models.resnet_cifar import NormedLinear


def head_name(model: nn.Module) -> str:
    """The dotted name of the layer that gives the logits, an nn.Linear or NormedLinear.

    It is the model's attribute `head_name` if it has one, else its only linear layer, or the last one of torchvision's
    classifiers.

    Raises:
        ValueError: no linear layer; several, and no attribute that says which. AttributeError: no layer of that name.
    """
    name = getattr(model, "head_name", None)
    if name is not None:
        model.get_submodule(name)
        return name
    names = _linear_layers(model)
    if len(names) > 1 and not type(model).__module__.startswith("torchvision.models."):
        raise ValueError(
            f"{type(model).__name__} has the linear layers {', '.join(names)}: say which one gives the logits, "
            f"model.head_name = {names[-1]!r} for example"
        )
    return names[-1]


def _linear_layers(model):
    names = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, NormedLinear))]
    if not names:
        raise ValueError(f"{type(model).__name__} has no linear layer, so it has no |h| to take the norm of")
    return names


def replace_layer(module: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` in the place of the part with that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, layer)


def redraw(layer: nn.Linear | NormedLinear) -> None:
    """Draw a layer's weights again, as its class does, from torch's generator on the CPU."""
    if isinstance(layer, NormedLinear):
        fresh: nn.Module = NormedLinear(*layer.weight.shape)
    else:
        fresh = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    layer.load_state_dict(fresh.state_dict())


class HeadOnly(nn.Module):
    """A classifier of which only the head is trained: all else is frozen, in evaluation mode.

    The head is its only part, so whatever sets modes, counts batches or averages gradients leaves the rest alone:
    batch norm's statistics stay as they are, dropout is off.

    Args:
        model: the classifier, see `head_name`; it is frozen, and called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._whole = (model.eval().requires_grad_(False),)  # in a tuple it is no part
        self.head = model.get_submodule(head_name(model)).requires_grad_()

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._whole[0](images)


def with_feature_norm(module: nn.Module, layer: str | nn.Module | None = None, norm: str = "l1") -> Any:
    """Make `module` return `(logits, features)`; features (N, 1) is the norm of the input of its head.

    Works by hooks on the module itself: its type, parameters and state-dict keys stay as they are. Every call checks
    that the layer's output is what the module returns; where its forward makes a new tensor of that output, the first
    call compares the values. Calls may run in several threads (nn.DataParallel, a server). torch.compile comes last:
    `torch.compile(with_feature_norm(model))`.

    Args:
        module: a classifier that returns logits; a tuple that begins with them, a dict with 'logits' or an object with
            `.logits` is taken apart, and the rest left out.
        layer: its head, as a dotted name ('fc', 'classifier.1') or the layer itself. None: see `head_name`; of several
            linear layers that one whose output is what the module returns, in each call.
        norm: 'l1', 'l2' or 'linf'.

    Returns:
        the same module.

    Raises:
        AttributeError: no layer of that name. ValueError: a layer of another module, none to be found, a compiled
            module; in a call: a layer whose output is not what the module returns.
    """
    if hasattr(module, "_orig_mod"):
        raise ValueError("with_feature_norm needs the model itself: torch.compile(with_feature_norm(model))")
    if isinstance(layer, nn.Module):
        name = next((name for name, part in module.named_modules() if part is layer), None)
        if name is None:
            raise ValueError("the layer is not a part of the module")
        layer = name
    if layer is None:
        try:
            layer = head_name(module)
        except ValueError:
            names = _linear_layers(module)
    if layer is not None:
        module.head_name = layer  # type: ignore[assignment]
        names = [layer]
    hooks = _FeatureNorm(norm, names)
    module.register_forward_pre_hook(hooks.begin)
    for name in names:
        module.get_submodule(name).register_forward_hook(hooks.keep)
    module.register_forward_hook(hooks.attach)
    return module


class _FeatureNorm:
    """Hooks: what enters and leaves the linear layers of a call is kept until the call ends, for each thread alone."""

    def __init__(self, norm, names):
        self.norm, self.names, self.same_values, self.call = norm, names, False, threading.local()

    def __getstate__(self):
        """What a copy or a pickle of the model takes: nothing of a call that failed half-way."""
        return self.norm, self.names, self.same_values

    def __setstate__(self, state):
        self.norm, self.names, self.same_values = state
        self.call = threading.local()

    def begin(self, module, args):
        self.call.passes = []

    def keep(self, layer, args, output):
        passes = getattr(self.call, "passes", None)
        if passes is not None:  # else a call of the layer alone
            passes.append((args[0], output))

    def attach(self, module, args, output):
        passes, self.call.passes = self.call.passes, None
        logits = _logits(output)
        hidden = self._input_of(logits, passes)
        return logits, row_norm(hidden.flatten(1), self.norm)[:, None]

    def _input_of(self, logits, passes):
        for hidden, output in passes:
            if output is logits:
                return hidden
        if len(self.names) == 1 and len(passes) == 1:
            hidden, output = passes[0]
            if torch.compiler.is_compiling():
                if not self.same_values:
                    raise ValueError("the model's output is not the head's own tensor: call it once before compiling")
                return hidden
            if self.same_values or (output.shape == logits.shape and torch.equal(output, logits)):
                self.same_values = True
                return hidden
        raise ValueError(
            f"the output of the layer {' or '.join(map(repr, self.names))} is not what the model returns, so its input "
            "is not the h of the logits: name the last linear layer with layer="
        )


def _logits(output):
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, tuple):
        output = output[0]  # torchvision's auxiliary outputs are left out
    else:
        output = getattr(output, "logits", None)
    if not isinstance(output, torch.Tensor):
        raise ValueError(
            "the model returns neither logits, nor a tuple that begins with them, a dict or an object with 'logits'"
        )
    return output
