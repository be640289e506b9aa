"""What epoch e does: learning rate, criterion, class weights, sampler. Pure: no device, no files, no flags."""

import dataclasses

LOSS_TYPES = ("CE", "Focal", "LDAM", "BS", "LA", "IB", "IBFocal")
IB_LOSSES = ("IB", "IBFocal")
TRAIN_RULES = ("None", "Resample", "CBReweight", "IBReweight", "DRW")


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is in force in one epoch.

    lr: learning rate; loss: one of LOSS_TYPES; class_weights: 'none', 'CB' or 'IB';
    sampler: 'none' (a shuffle) or 'Resample'.
    """

    lr: float
    loss: str
    class_weights: str
    sampler: str


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The published schedule (cifar_train.py of the official code), its constants as fields.

    Warm-up: lr * (e + 1) / warmup_epochs. At each milestone the lr is multiplied by its factor, and from
    `start_ib_epoch` on, with an IB loss, by `ib_lr_factor`. As in the official code the IB phase has no
    warm-up of its own: where it starts before the warm-up ends, the rest of the warm-up is skipped
    unless `keep_warmup`.
    """

    loss_type: str = "CE"
    train_rule: str = "None"
    epochs: int = 200
    lr: float = 0.1
    start_ib_epoch: int = 100
    warmup_epochs: int = 5
    milestones: tuple = (160, 180)
    lr_factors: tuple = (0.01, 0.01)
    ib_lr_factor: float = 0.01
    keep_warmup: bool = False
    drw_epoch: int = 160

    def stage(self, epoch):
        """The Stage of `epoch`, counted from 0."""
        return Stage(self._lr(epoch), self._loss(epoch), self._class_weights(epoch), self._sampler())

    def stages(self):
        """The stages of all epochs, a list."""
        return [self.stage(epoch) for epoch in range(self.epochs)]

    def _in_ib_phase(self, epoch):
        return self.loss_type in IB_LOSSES and epoch >= self.start_ib_epoch

    def _lr(self, epoch):
        lr = self.lr
        if epoch < self.warmup_epochs and (self.keep_warmup or not self._in_ib_phase(epoch)):
            lr = lr * (epoch + 1) / self.warmup_epochs
        if self._in_ib_phase(epoch):
            lr *= self.ib_lr_factor
        for milestone, factor in zip(self.milestones, self.lr_factors, strict=True):
            if epoch >= milestone:
                lr *= factor
        return lr

    def _loss(self, epoch):
        if self.loss_type in IB_LOSSES and not self._in_ib_phase(epoch):
            return "CE"
        return self.loss_type

    def _class_weights(self, epoch):
        if self.loss_type in IB_LOSSES and not self._in_ib_phase(epoch):
            return "none"  # phase one is plain CE
        if self.train_rule == "DRW":
            return "CB" if epoch >= self.drw_epoch else "none"
        return {"CBReweight": "CB", "IBReweight": "IB"}.get(self.train_rule, "none")

    def _sampler(self):
        return "Resample" if self.train_rule == "Resample" else "none"
