"""What changes from stage to stage of a recipe: the criterion, and the part of the model that is trained."""

from typing import Any

import torch

import models
from training import distributed
from training.ema import Ema
from training.precision import Compiled
from training.recipe import Recipe
from training.registry import Stage


class Criteria:
    """The criterion of each stage; made anew where the loss or its class weights change.

    Its state is that of the criterion in force. A loss that goes on with other class weights keeps its state, so the
    alpha of an IB loss is set once.
    """

    def __init__(self, recipe: Recipe, class_counts: list[int], device: torch.device) -> None:
        self.recipe, self.class_counts, self.device = recipe, class_counts, device
        self._stage: Stage | None = None
        self._criterion: Any = None
        self._state: dict = {}

    def of(self, stage: Stage) -> Any:
        """The criterion of `stage`, on the device."""
        before, self._stage = self._stage, stage
        if before is not None and (stage.loss, stage.class_weights) == (before.loss, before.class_weights):
            return self._criterion
        if before is not None:
            self._state = self._criterion.state_dict() if stage.loss == before.loss else {}
        self._criterion = self.recipe.criterion(stage, self.class_counts)
        if self._state:
            self._criterion.load_state_dict(self._state)
        self._criterion = self._criterion.to(self.device)
        return self._criterion

    def state_dict(self) -> dict:
        """The state of the criterion in force."""
        return self._state if self._criterion is None else self._criterion.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Keep a state for the next criterion; it must be one of the same loss."""
        self._state = state


class Trained:
    """What a stage trains, all of the model or its head: gradients over all ranks, compiled if asked for.

    The weights are the model's own.
    """

    def __init__(self, model: torch.nn.Module, sync_bn: bool, compiles: bool) -> None:
        self.model, self.sync_bn, self.compiles = model, sync_bn, compiles
        self._trains: str | None = None
        self._wrapped = model

    def of(self, stage: Stage) -> torch.nn.Module:
        """The module that an epoch of `stage` trains."""
        if stage.trains != self._trains:
            self._trains = stage.trains
            part = models.HeadOnly(self.model) if stage.trains == "head" else self.model
            part = distributed.data_parallel(part, self.sync_bn)
            self._wrapped = Compiled(part) if self.compiles else part
        return self._wrapped


def redraw_head(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None, seed: int) -> None:
    """Give the model a head that has learnt nothing: weights from `seed`, its optimizer state zero; on every rank."""
    head: Any = model.get_submodule(models.last_linear(model))
    torch.manual_seed(seed)
    models.redraw(head)
    for parameter in head.parameters():
        for value in optimizer.state.get(parameter, {}).values():
            value.zero_()
    if ema is not None:
        ema.restart()


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Train with this learning rate from now on."""
    for group in optimizer.param_groups:
        group["lr"] = lr
