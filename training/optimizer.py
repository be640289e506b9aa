"""The optimizers by name, and their state when a run resumes.

To add one: write a function of (model, lr, the settings that it depends on by their names) and name it in
`OPTIMIZERS`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from training.registry import call, further_parameters


def sgd(model: torch.nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.Optimizer:
    """SGD with momentum and L2 weight decay, no Nesterov; fused.

    Momentum buffers start as zeros, which gives the same bits as buffers made by the first step. That step would leave
    them unset where fp16's scaler skips it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:
        for parameter in _parameters(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def adamw(model: torch.nn.Module, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter, ICLR 2019) with PyTorch's betas and epsilon; fused, and fit for a CUDA graph."""
    on_cuda = next(model.parameters()).is_cuda
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=weight_decay, fused=True, capturable=on_cuda)


#: name -> optimizer from (model, lr, the settings that it depends on)
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": sgd, "adamw": adamw}


def constants_of(name: str) -> tuple[str, ...]:
    """Names of the settings on which an optimizer depends, besides the lr."""
    return further_parameters(OPTIMIZERS[name], 2)


def make_optimizer(name: str, model: torch.nn.Module, lr: float, constants: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer of that name. `load_state_dict` keeps its own options, such as lr and weight decay.

    Each parameter group gets 'lr_scale', its lr over `lr`: `Stages` multiplies the schedule's lr by it.

    Args:
        name: a key of `OPTIMIZERS`.
        lr: base learning rate.
        constants: hyperparameters by name, among them those of `constants_of(name)`, `vars(settings)` for example.
    """
    optimizer = call(OPTIMIZERS[name], constants, model, lr)
    for group in optimizer.param_groups:
        group.setdefault("lr_scale", group["lr"] / lr if lr else 1.0)
    optimizer.register_load_state_dict_pre_hook(_as_own)
    return optimizer


def _as_own(optimizer, state):
    """A loaded state with the optimizer's own settings, in its parameters' memory layout, which the fused step wants.

    What the state lacks, as an official one before its first step, stays as it is.

    Raises:
        ValueError: the state of another model or another optimizer.
    """
    own, is_fused = optimizer.state_dict(), optimizer.defaults.get("fused")
    kept, groups, values = {*optimizer.defaults, "lr_scale"}, [], {}
    for mine, loaded in zip(own["param_groups"], state["param_groups"], strict=True):
        if not {"momentum", "betas"} & set(mine) <= set(loaded):
            raise ValueError("it is the state of another optimizer")
        groups.append({**mine, **{name: value for name, value in loaded.items() if name not in kept}})
    for index, parameter in enumerate(_parameters(optimizer)):
        found = {name: value for name, value in state["state"].get(index, {}).items() if value is not None}
        values[index] = {**own["state"].get(index, {}), **found}
        for name, value in found.items():
            # a fused step would read beyond a state of another shape: copying it is an error
            if torch.is_tensor(value) and value.ndim and (is_fused or value.shape == parameter.shape):
                values[index][name] = torch.empty_like(parameter).copy_(value)
    return {"state": {i: value for i, value in values.items() if value}, "param_groups": groups}


def _parameters(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
