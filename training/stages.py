"""A recipe put in force, epoch by epoch: learning rate, criterion, and the part of the model that is trained."""

from typing import Any

import torch

import models
from training import distributed
from training.ema import Ema
from training.precision import Compiled
from training.recipe import Recipe
from training.registry import LOSSES, RULES, Stage
from utils import DataError, UsageError, epoch_seed


class Stages:
    """What changes from stage to stage of `recipe`.

    Its state is that of the criterion in force. A loss that continues with other class weights keeps its state, so the
    alpha of an IB loss is set once.

    Args:
        optimizer: `begin` sets the lr of its groups.
        class_counts: training images of each class.
        seed: the run's seed.
        ema: starts again when the head is reinitialized.
        sync_bn, compiles: convert batch norm to SyncBatchNorm (with several ranks, in place), and use torch.compile.

    Raises:
        UsageError: a loss with parameters; an unknown head where it must be known; a head that the loss cannot use.
    """

    def __init__(
        self, recipe: Recipe, model: torch.nn.Module, optimizer: torch.optim.Optimizer, class_counts: list[int],
        seed: int = 0, ema: Ema | None = None, sync_bn: bool = False, compiles: bool = False,
    ) -> None:  # fmt: skip
        self.recipe, self.model, self.optimizer, self.class_counts = recipe, model, optimizer, class_counts
        self.seed, self.ema, self.sync_bn, self.compiles = seed, ema, sync_bn, compiles
        for stage in {stage.loss: stage for stage in recipe.stages()}.values():
            if any(True for _ in recipe.criterion(stage, class_counts).parameters()):
                raise UsageError(f"--loss_type {stage.loss} has parameters, which nothing trains: make them buffers")
        loss, rule = LOSSES[recipe.settings.loss_type], RULES[recipe.settings.train_rule]
        if loss.normalised_head or rule.trains == "head":
            head = model.get_submodule(models.head_name(model))
            if loss.normalised_head and isinstance(head, torch.nn.Linear):
                name = recipe.settings.loss_type
                raise UsageError(f"--loss_type {name} needs a normalised head: this model ignores use_norm")
        self._stage: Stage | None = None
        self._criterion: Any = None
        self._state: dict = {}
        self.part: torch.nn.Module = model  # what is trained, before its wrappers
        self._trained: torch.nn.Module = model

    def begin(self, epoch: int) -> tuple[Any, torch.nn.Module]:
        """Put the stage of `epoch` in force. Returns (criterion, the module to train).

        torch's random state afterwards is that of (seed, epoch), for models with dropout.
        """
        before, stage = self._stage, self.recipe.stage(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = stage.lr * group.get("lr_scale", 1.0)
        torch.manual_seed(epoch_seed(self.seed, epoch))
        if stage.trains == "head" and epoch == self.recipe.rule_start:
            redraw_head(self.model, self.optimizer, self.ema)
        torch.manual_seed(epoch_seed(self.seed, epoch) + distributed.rank())
        if before is None or (before.loss, before.class_weights) != (stage.loss, stage.class_weights):
            if before is not None:
                self._state = self._criterion.state_dict() if before.loss == stage.loss else {}
            criterion = self.recipe.criterion(stage, self.class_counts)
            if self._state:
                try:
                    criterion.load_state_dict(self._state)
                except RuntimeError as error:  # the loss has been changed since
                    raise DataError(f"the saved state of --loss_type {stage.loss} does not fit it: {error}") from None
            self._criterion = criterion.to(next(self.model.parameters()).device)
        if before is None or before.trains != stage.trains:
            self.part = models.HeadOnly(self.model) if stage.trains == "head" else self.model
            part = distributed.data_parallel(self.part, self.sync_bn)
            self._trained = Compiled(part) if self.compiles else part
        self._stage = stage
        return self._criterion, self._trained

    def state_dict(self) -> dict:
        """The state of the criterion in force."""
        return self._state if self._criterion is None else self._criterion.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Keep a state for the next criterion; it must be one of the same loss."""
        self._state = state


def redraw_head(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Ema | None = None) -> None:
    """Reinitialize the model's head, in place, from torch's random state, and set its optimizer state to zero.

    An nn.Linear gets PyTorch's default initialization, whatever the model's own is. `ema` starts again, if given.
    """
    head: Any = model.get_submodule(models.head_name(model))
    if isinstance(head, models.NormedLinear):
        fresh: torch.nn.Module = models.NormedLinear(*head.weight.shape)
    else:
        fresh = torch.nn.Linear(head.in_features, head.out_features, head.bias is not None)
    head.load_state_dict(fresh.state_dict())  # drawn on the CPU, as every model is
    for parameter in head.parameters():
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            state[name] = value.zero_() if torch.is_tensor(value) else type(value)()
    if ema is not None:
        ema.restart()
