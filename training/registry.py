"""The losses and the rules by name: what each is made of, and on which constants it depends.

To add a loss: write it in losses.py and name it in `LOSSES`. To add a rule: name it in `RULES`; new class weights or a
new sampler go to `CLASS_WEIGHTS` or `SAMPLERS`. The names of a function's further parameters are those of the
constants that it depends on, which are settings (experiment/settings.py).
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

import losses


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is in force in one epoch.

    lr: learning rate; loss: a key of `LOSSES`; class_weights: of `CLASS_WEIGHTS`; sampler: of `SAMPLERS`; trains:
    'all', or 'head': the last linear layer alone.
    """

    lr: float
    loss: str
    class_weights: str
    sampler: str
    trains: str = "all"


@dataclasses.dataclass(frozen=True)
class LossEntry:
    """build: criterion from (class counts, class weights or None, the constants by name); first_phase_ce: plain CE
    before `start_ib_epoch`; normalised_head: for a cosine head; corrects_prior: the class prior is in the logits.
    """

    build: Callable[..., losses.Loss]
    first_phase_ce: bool = False
    normalised_head: bool = False
    corrects_prior: bool = False
    help: str = ""

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the constants on which the loss depends."""
        return further_parameters(self.build, 2)


@dataclasses.dataclass(frozen=True)
class RuleEntry:
    """A training rule.

    Attributes:
        class_weights: a key of `CLASS_WEIGHTS`. sampler: a key of `SAMPLERS`.
        start: name of the setting that holds the rule's first epoch, counted from 0; None: all epochs.
        trains: 'all', or 'head': only the last linear layer, reinitialized, with its own lr (see `Recipe`).
        help: the text for --help.
    """

    class_weights: str = "none"
    sampler: str = "none"
    start: str | None = None
    trains: str = "all"
    help: str = ""


LOSSES: dict[str, LossEntry] = {
    "CE": LossEntry(lambda counts, weight: losses.CrossEntropyLoss(weight), help="cross entropy"),
    "Focal": LossEntry(
        lambda counts, weight, gamma, focal_scale: losses.FocalLoss(weight, gamma, focal_scale), help="focal loss"
    ),
    "LDAM": LossEntry(
        lambda counts, weight, max_m, s: losses.LDAMLoss(counts, max_m, weight, s),
        normalised_head=True,
        help="margins by class, normalised head",
    ),
    "BS": LossEntry(
        lambda counts, weight: losses.BalancedSoftmaxLoss(counts, weight), corrects_prior=True, help="Balanced Softmax"
    ),
    "LA": LossEntry(
        lambda counts, weight, la_tau: losses.LogitAdjustedLoss(counts, la_tau, weight),
        corrects_prior=True,
        help="logit adjustment",
    ),
    "VS": LossEntry(
        lambda counts, weight, vs_gamma, vs_tau: losses.VSLoss(counts, vs_gamma, vs_tau, weight),
        corrects_prior=True,
        help="vector scaling",
    ),
    "IB": LossEntry(
        lambda counts, weight, alpha, epsilon, ib_norm, detach_ib, auto_target, auto_ratio: losses.IBLoss(
            weight, alpha, epsilon, ib_norm, detach_ib, auto_target, auto_ratio
        ),
        first_phase_ce=True,
        help="influence-balanced loss after a phase of CE",
    ),
    "IBFocal": LossEntry(
        lambda counts, weight, alpha, gamma, epsilon, ib_norm, detach_ib, auto_target, auto_ratio: losses.IB_FocalLoss(
            weight, alpha, gamma, epsilon, ib_norm, detach_ib, auto_target=auto_target, auto_ratio=auto_ratio
        ),
        first_phase_ce=True,
        help="IB with the focal loss inside, after a phase of CE",
    ),
}

#: name -> class weights (K,) float32, or None, from (class counts, the constants by name)
CLASS_WEIGHTS: dict[str, Callable[..., Tensor | None]] = {
    "none": lambda counts: None,
    "CB": lambda counts, beta: losses.effective_number_weights(counts, beta),
    "IB": lambda counts: losses.inverse_frequency_weights(counts),
}

#: name -> rate (K,) float64 at which an image of each class is drawn, or None for a shuffle, from (class counts, ...)
SAMPLERS: dict[str, Callable[..., Tensor | None]] = {
    "none": lambda counts: None,
    "Resample": lambda counts, beta: losses.effective_number_rates(counts, beta),
    "Balanced": lambda counts: losses.inverse_frequency_weights(counts).double(),
}

RULES: dict[str, RuleEntry] = {
    "None": RuleEntry(help="no weights, images shuffled"),
    "Resample": RuleEntry(sampler="Resample", help="images drawn with effective-number rates"),
    "CBReweight": RuleEntry("CB", help="effective-number class weights"),
    "IBReweight": RuleEntry("IB", help="class weights 1 / n_k"),
    "DRW": RuleEntry("CB", start="drw_epoch", help="CBReweight from drw_epoch on"),
    "DRW-IB": RuleEntry("IB", start="drw_epoch", help="IBReweight from drw_epoch on"),
    "DRS": RuleEntry(sampler="Resample", start="drw_epoch", help="Resample from drw_epoch on"),
    "cRT": RuleEntry(
        sampler="Balanced",
        start="drw_epoch",
        trains="head",
        help="from drw_epoch on only a new head is trained, all classes drawn equally often",
    ),
}


def constants_of(stage: Stage) -> tuple[str, ...]:
    """Names of the constants on which the stage's loss, class weights and sampler depend, each once."""
    return _names([LOSSES[stage.loss]], [CLASS_WEIGHTS[stage.class_weights], SAMPLERS[stage.sampler]])


def all_constants() -> tuple[str, ...]:
    """Names of the constants of all losses, class weights and samplers, each once."""
    return _names(LOSSES.values(), [*CLASS_WEIGHTS.values(), *SAMPLERS.values()])


def _names(entries, functions):
    names = [name for entry in entries for name in entry.constants]
    names += [name for function in functions for name in further_parameters(function, 1)]
    return tuple(dict.fromkeys(names))


def call(function: Callable, constants: Mapping[str, Any], *args: Any) -> Any:
    """What an entry's function makes of `args` and of the constants that it depends on."""
    return function(*args, **{name: constants[name] for name in further_parameters(function, len(args))})


def further_parameters(function: Callable, skip: int) -> tuple[str, ...]:
    """Names of a function's parameters after the first `skip`: those of the settings on which it depends."""
    return tuple(inspect.signature(function).parameters)[skip:]
