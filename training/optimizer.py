"""SGD as published, and its state when a run resumes."""

import torch


def sgd(model: torch.nn.Module, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with momentum and L2 weight decay on all parameters, no Nesterov; fused.

    Momentum buffers start as zeros, which gives the same bits as buffers made by the first step. That step would leave
    them unset where fp16's scaler skips it.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=weight_decay, fused=True)
    if momentum:
        for parameter in model.parameters():
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def load_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Load a checkpoint's momentum, of an official one too; lr, weight decay and the like stay the optimizer's own.

    The fused step wants buffers of its parameter's memory layout: the loaded ones are copied into such.

    Raises:
        Exception: whatever torch raises for a state of another model.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)
        for parameter in group["params"]:
            buffer = optimizer.state[parameter].get("momentum_buffer")
            if buffer is not None:
                optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(buffer)
            elif group["momentum"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
