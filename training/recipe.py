"""What epoch e does: learning rate, loss, class weights, sampler. Pure: no device, no files, no flags."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from losses import Loss
from training import registry
from training.registry import Stage

SCHEDULES = ("step", "cosine")
#: The settings that a Recipe reads, besides the hyperparameters of the registry's entries.
READS = (
    "loss_type", "train_rule", "start_ib_epoch", "drw_epoch", "epochs", "lr", "schedule", "warmup_epochs",
    "keep_warmup", "milestones", "lr_factors", "ib_lr_factor",
)  # fmt: skip


class Recipe:
    """The published schedule (cifar_train.py of the official code).

    Warm-up: lr * (e + 1) / warmup_epochs. Then 'step' multiplies the lr by its factor from each milestone on; 'cosine'
    by (1 + cos(pi * e / epochs)) / 2, without milestones. From `start_ib_epoch` on, with an IB loss, the lr is
    multiplied by `ib_lr_factor` too. As in the official code the IB phase has no warm-up of its own: where it starts
    before the warm-up ends, the rest of the warm-up is skipped unless `keep_warmup`.

    With cRT (Kang et al., 'Decoupling representation and classifier for long-tailed recognition', ICLR 2020) that is
    the first stage, of `drw_epoch` epochs. In the second only the head is trained. Its lr starts again, as in the code
    of its authors: half a cosine from `lr` to 0, without warm-up; `ib_lr_factor` holds in the IB phase here too.

    Args:
        settings: an object whose `vars()` hold the settings of `READS` and the hyperparameters of its loss, class
            weights and sampler, `experiment.settings.Settings` for example. It must not change later.
    """

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def stage(self, epoch: int) -> Stage:
        """The Stage of `epoch`, counted from 0."""
        rule, started = registry.RULES[self.settings.train_rule], epoch >= self.rule_start
        loss, weights = self.settings.loss_type, rule.class_weights if started else "none"
        if registry.LOSSES[loss].first_phase_ce and not self._in_ib_phase(epoch):
            loss, weights = "CE", "none"
        sampler, trains = (rule.sampler, rule.trains) if started else ("none", "all")
        return Stage(self._lr(epoch), loss, weights, sampler, trains)

    @property
    def rule_start(self) -> int:
        """The first epoch in which the rule is in force."""
        start = registry.RULES[self.settings.train_rule].start
        return 0 if start is None else getattr(self.settings, start)

    def stages(self) -> list[Stage]:
        """The stages of all epochs."""
        return [self.stage(epoch) for epoch in range(self.settings.epochs)]

    def table(self) -> str:
        """CSV, one row per epoch, counted from 0: what --dry_run prints; `trains` is a column only if it changes."""
        stages = self.stages()
        names = ["lr", "loss", "class_weights", "sampler", *["trains"] * any(s.trains != "all" for s in stages)]
        rows = [[e, *(getattr(s, name) for name in names)] for e, s in enumerate(stages)]
        return "\n".join(",".join(map(str, row)) for row in [["epoch_from_0", *names], *rows])

    def criterion(self, stage: Stage, class_counts: Sequence[int]) -> Loss:
        """The criterion of a stage: criterion(logits, target, features), see losses.py."""
        weights = registry.call(registry.CLASS_WEIGHTS[stage.class_weights], vars(self.settings), class_counts)
        return registry.call(registry.LOSSES[stage.loss].build, vars(self.settings), class_counts, weights)

    def image_rates(self, stage: Stage, class_counts: Sequence[int], targets: Tensor) -> Tensor | None:
        """The rate at which each image is drawn, (N,) float64, or None for a shuffle; targets (N,)."""
        rates = registry.call(registry.SAMPLERS[stage.sampler], vars(self.settings), class_counts)
        return None if rates is None else rates[targets.cpu()]

    def constants_at(self, epoch: int) -> dict[str, Any]:
        """The constants in force in `epoch`, by name."""
        return {name: getattr(self.settings, name) for name in registry.constants_of(self.stage(epoch))}

    def _in_ib_phase(self, epoch):
        return registry.LOSSES[self.settings.loss_type].first_phase_ce and epoch >= self.settings.start_ib_epoch

    def _lr(self, epoch):
        lr, in_ib_phase, length = self.settings.lr, self._in_ib_phase(epoch), self.settings.epochs
        if registry.RULES[self.settings.train_rule].trains == "head":
            length = min(self.rule_start, self.settings.epochs)
            if epoch >= length:
                lr *= self.settings.ib_lr_factor if in_ib_phase else 1
                return lr * _half_cosine(epoch - length, self.settings.epochs - length)
        warms_up = epoch < self.settings.warmup_epochs and (self.settings.keep_warmup or not in_ib_phase)
        if warms_up:
            lr = lr * (epoch + 1) / self.settings.warmup_epochs
        if in_ib_phase:
            lr *= self.settings.ib_lr_factor
        if self.settings.schedule == "cosine":
            return lr if warms_up else lr * _half_cosine(epoch, length)
        for milestone, factor in zip(self.settings.milestones, self.settings.lr_factors, strict=True):
            if epoch >= milestone:
                lr *= factor
        return lr


def _half_cosine(done, epochs):
    """The factor of the lr after `done` of `epochs` epochs, 1 at the first."""
    return 0.5 * (1 + math.cos(math.pi * done / epochs))
