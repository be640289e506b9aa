"""Every setting of a run, declared once: name, flag, bounds, default, help, and what it affects.

The identity of a run, what a fork must share, what a resume may change, what an evaluation takes from the checkpoint
and what may be compared with a published result are derived from `affects`:

    data, model     which images, which model
    start           the first weights and everything drawn: seed, pretrained
    schedule        lr, losses, rules and their constants; compared epoch by epoch
    optimizer       the optimizer, the batch and how batches are mixed
    selection       which epoch counts as the best, and nothing of the training
    numerics        precision: the same experiment with other rounding errors, large enough to be named
    rounding        the same run, but not bit for bit: threads, compilation, ranks (with a batch norm over all of them)
    nothing         places, progress, what to do

`python -m experiment.flags` writes the tables of docs/flags.md.
"""

import argparse
import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

from imbalance import IMB_TYPES
from loaders.augment import AUGMENTS
from losses import NORMS
from training.optimizer import OPTIMIZERS, constants_of
from training.precision import AMP_TYPES
from training.recipe import READS, SCHEDULES, Recipe
from training.registry import LOSSES, RULES, all_constants
from utils import UsageError, number, path, warn

KINDS = ("data", "model", "start", "schedule", "optimizer", "selection", "numerics", "rounding", "nothing")


def setting(
    default: Any, flags: str = "", kind: Any = None, help: str = "", *, group: str, affects: str, **of_argparse: Any
) -> Any:
    """Declare a field of `Settings`.

    Args:
        flags: as in '-b --batch-size N'; a word without dashes names the value. Empty: no flag, the program sets it.
        kind: an argparse type, or the choices: a tuple, or a registry.
        help: the default is added to it.
        group: of the flags in --help. affects: one of `KINDS`. of_argparse: goes to `add_argument`.
    """
    if affects not in KINDS:
        raise ValueError(f"affects must be one of {', '.join(KINDS)}, got {affects!r}")
    names = tuple(word for word in flags.split() if word.startswith("-"))
    how = {"help": help, **of_argparse}
    if len(names) < len(flags.split()):
        how["metavar"] = flags.split()[-1]
    if isinstance(kind, (tuple, Mapping)):  # a registry may grow until the command line is read
        how["choices"] = kind
    elif kind is not None:
        how["type"] = kind
    if isinstance(default, bool):
        how["action"] = "store_false" if default else "store_true"
    elif default not in (None, "", ()) and "default" not in help:
        how["help"] = f"{help} (default: %(default)s)".lstrip()
    metadata = {"flags": names, "affects": affects, "group": group, "argparse": how}
    return dataclasses.field(default=default, metadata=metadata)


def _alpha(text):
    return "auto" if text == "auto" else POSITIVE(text)


_alpha.__name__ = "number"  # what argparse calls it


def plain_name(text: str) -> str:
    """An argparse type: a part of a folder's name."""
    if not text or os.sep in text or not text.isprintable():
        raise argparse.ArgumentTypeError("it is part of a folder's name: printable, not empty, without a separator")
    return text


def _explain(entries):
    """Names and what they mean, for --help."""
    return "; ".join(f"{name}: {entry.help}" for name, entry in entries.items())


def _cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


EPOCH, COUNT = number(int, low=0, high=10**6), number(int, low=1, high=10**6)
POSITIVE, NOT_NEGATIVE, SHARE = number(float, above=0), number(float, low=0), number(float, low=0, high=0.9)

_data = functools.partial(setting, group="data", affects="data")
_model = functools.partial(setting, group="model", affects="model")
_method = functools.partial(setting, group="method", affects="schedule")
_training = functools.partial(setting, group="training", affects="schedule")
_run = functools.partial(setting, group="run", affects="nothing")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run; read only. A field whose flag a script does not offer keeps its default."""

    # fmt: off
    dataset: str = _data(None, "--dataset", plain_name, "the data set")
    data_dir: str = _data("./data", "--data_dir DIR", path, "folder of the data", affects="nothing")
    train_list: str | None = _data(None, "--train_list FILE", None,
        "training images as lines 'path label' below --data_dir, instead of folders")
    val_list: str | None = _data(None, "--val_list FILE", None, "test images, in the same form")
    check_images: bool = _data(False, "--check_images", None,
        "decode every image before training starts", affects="nothing")
    skip_damaged: bool = _data(False, "--skip_damaged", None,
        "decode every image before training starts, and leave out those that are damaged, at most one in twenty")
    exif: bool = _data(False, "--exif", None, "turn images as their EXIF orientation says")
    mean: tuple[float, ...] | None = _data(None, "--mean M", number(float, low=0, high=1),
        "mean of the images' three channels, on a scale from 0 to 1 (default: ImageNet's)", nargs=3)
    std: tuple[float, ...] | None = _data(None, "--std S", number(float, above=0, high=1),
        "standard deviation of the channels, on the same scale (default: ImageNet's)", nargs=3)
    imb_type: str = _data("exp", "--imb_type", IMB_TYPES, "shape of the tail; none: as the data are")
    imb_factor: float = _data(0.01, "--imb_factor F", number(float, above=0, high=1),
        "smallest class over largest, in (0, 1]")
    rand_number: int = _data(0, "--rand_number N", number(int, low=0, high=2**32 - 1), "seed of the choice of images")
    num_classes: int | None = _data(None, "--num_classes K", COUNT,
        "may be left out: the data set knows; a wrong number is an error")
    val_fraction: float = _data(0.0, "--val_fraction F", SHARE,
        "share of each class of the training images, one image at least, that is held out to pick the best epoch, by "
        "class mean; 0: by top-1 on the test set, as published")
    val_left_out: int = _data(0, "--val_left_out N", EPOCH,
        "pick the best epoch on images that the imbalance has left out, up to N of a class; they are never trained on",
        affects="selection")
    test_fraction: float = _data(0.0, "--test_fraction G", SHARE,
        "share of the training images to test on, without val/ or test/ (default: as --val_fraction)")
    flip: str = _data("auto", "--flip", ("auto", "on", "off"),
        "random mirroring of training images; auto: as the data set says, no for digits")
    augment: str = _data("none", "--augment", AUGMENTS, _explain(AUGMENTS))
    image_size: int = _data(None, "--image_size N", number(int, low=8, high=1024),
        "side of the square that the model sees, in pixels (default: %(default)s)")
    crop: str | None = _data(None, "--crop", ("resized", "padded"),
        "training crops. resized: RandomResizedCrop; tested on the centre of images resized to 256/224 of that side; "
        "padded: RandomCrop of the image padded by an eighth; tested whole (default: %(default)s)")
    recipe: str | None = _data(None, "--recipe", ("official", "paper", "ldam"),
        "defaults of the flags (default: %(default)s): the official code's, the paper's as stated (lr x 0.1 at 50 and "
        "90), or the LDAM paper's (64 x 64 crops padded by 8, from scratch, 120 epochs); other flags override it",
        affects="nothing")

    arch: str = _model(None, "-a --arch NAME", plain_name, "the model")
    pretrained: str | None = _model(None, "--pretrained imagenet|none|PATH", path,
        "first weights: ImageNet's, always with a new last layer, or those of a checkpoint; its last layer is taken "
        "where it fits, and must fit on CIFAR (default: %(default)s)", affects="start", nargs="?", const="imagenet")

    loss_type: str = _method("CE", "--loss_type LOSS", LOSSES, _explain(LOSSES))
    train_rule: str = _method("None", "--train_rule RULE", RULES, _explain(RULES))
    start_ib_epoch: int = _method(100, "--start_ib_epoch E", EPOCH, "first epoch, counted from 0, of the IB loss")
    alpha: float | str = _method(1000.0, "--alpha A|auto", _alpha,
        "scale of the IB loss; auto: measured over 20 batches before or in the first IB epoch, see --auto_target")
    auto_target: str = _method("ce", "--auto_target", ("gradient", "ce", "ib"),
        "what --alpha auto matches. gradient: the norm of the gradient in all weights to that of plain CE, before the "
        "first IB epoch; ce, ib: the size of the loss to that of plain CE, or of the IB loss with L1 norm and alpha "
        "1000, in its first batches (default: %(default)s)")
    auto_ratio: float = _method(1.0, "--auto_ratio R", POSITIVE,
        "with --auto_target gradient: norm of the gradient over that of plain CE")
    epsilon: float = _method(1e-3, "--epsilon E", NOT_NEGATIVE, "added to the influence in the denominator")
    ib_norm: str = _method("l1", "--ib_norm", NORMS,
        "norm of the influence (Table 1), not comparable at a fixed alpha; none: it counts as 0, the factor is alpha / "
        "epsilon")
    detach_ib: bool = _method(False, "--detach_ib", None,
        "no gradient through the IB factor; the official code lets it through")
    gamma: float = _method(1.0, "--gamma G", NOT_NEGATIVE, "exponent of Focal and IBFocal")
    focal_scale: float = _method(10.0, "--focal_scale S", POSITIVE, "factor of the Focal loss, as in the official code")
    beta: float = _method(0.9999, "--beta B", number(float, low=0, high=0.9999999),
        "of effective numbers: CBReweight, DRW, Resample and DRS")
    max_m: float = _method(0.5, "--max_m M", NOT_NEGATIVE, "LDAM's largest margin")
    s: float = _method(30.0, "--s S", POSITIVE, "LDAM's scale")
    la_tau: float = _method(1.0, "--la_tau T", NOT_NEGATIVE, "LA's weight of the log prior")
    vs_gamma: float = _method(0.2, "--vs_gamma G", NOT_NEGATIVE,
        "VS's exponent of n_k / n_max, which multiplies the logits")
    vs_tau: float = _method(1.2, "--vs_tau T", NOT_NEGATIVE, "VS's weight of the log prior")
    drw_epoch: int = _method(160, "--drw_epoch E", EPOCH,
        "first epoch of the weights of DRW and DRW-IB, of DRS's sampler, of cRT's new head")
    mixup: float = _method(0.0, "--mixup A", NOT_NEGATIVE,
        "mix each image and its target with another of the batch, shares drawn from Beta(A, A); 0: off",
        affects="optimizer")

    epochs: int = _training(200, "--epochs N", COUNT, "number of epochs")
    start_epoch: int = _training(0, "--start-epoch --start_epoch E", EPOCH,
        "number of the first epoch, for restarts by hand; --resume sets it")
    batch_size: int = _training(128, "-b --batch-size --batch_size N", COUNT,
        "images of a batch, over all GPUs", affects="optimizer")
    optimizer: str = _training("sgd", "--optimizer", OPTIMIZERS, "the optimizer", affects="optimizer")
    lr: float = _training(0.1, "--lr --learning-rate LR", NOT_NEGATIVE,
        "learning rate, multiplied by the schedule's factors")
    momentum: float = _training(0.9, "--momentum M", NOT_NEGATIVE, "momentum of SGD", affects="optimizer")
    weight_decay: float = _training(2e-4, "--wd --weight-decay --weight_decay W", NOT_NEGATIVE,
        "weight decay of all weights", affects="optimizer")
    ema: float = _training(0.0, "--ema D", number(float, low=0, high=0.999999),
        "test an exponential moving average of the weights with this decay, 0.999 for example; 0: off", affects="model")
    schedule: str = _training("step", "--schedule", SCHEDULES,
        "step: the lr falls at the milestones; cosine: half a cosine over all epochs")
    warmup_epochs: int = _training(5, "--warmup_epochs N", EPOCH, "epochs of linear warm-up")
    keep_warmup: bool = _training(False, "--keep_warmup", None,
        "warm up also where the IB phase starts before the end of the warm-up")
    milestones: tuple[int, ...] = _training((160, 180), "--milestones E", EPOCH,
        "epochs, counted from 0, at which the lr falls", nargs="*")
    lr_factors: tuple[float, ...] = _training((0.01, 0.01), "--lr_factors F", POSITIVE,
        "factors of the lr at the milestones; if only --milestones is given: the first factor for all", nargs="*")
    ib_lr_factor: float = _training(0.01, "--ib_lr_factor F", POSITIVE, "what the lr is multiplied by in the IB phase")
    seed: int | None = _training(None, "--seed N", number(int, low=0, high=2**31 - 1),
        "seed of the initial weights and of all random draws (default: a random one, printed and recorded)",
        affects="start")

    gpu: int | None = _run(None, "--gpu N", int, "CUDA device; left out: the first one, else the CPU")
    threads: int | None = _run(None, "--threads N", number(int, low=1, high=1024),
        "CPU threads (default: torch's choice); results are bitwise repeatable with the same number only",
        affects="rounding")
    processes: int = _run(1, "", COUNT, "", affects="rounding")
    amp: str = _run("none", "--amp", tuple(AMP_TYPES),
        "mixed precision; the losses stay float32. bf16 is faster on GPUs and on CPUs with AVX512-BF16 or AMX; other "
        "CPUs emulate it, ten times slower", affects="numerics")
    tf32: bool = _run(True, "--no_tf32", None,
        "convolutions in full float32 on a GPU (default: TF32, as torch does; never for matrix "
        "products)", affects="numerics")
    sync_bn: bool = _run(False, "--sync_bn", None,
        "batch norm over all GPUs, as on a single one (with torchrun)", affects="numerics")
    compile: bool = _run(False, "--compile", None, "torch.compile", affects="rounding")
    cuda_graph: bool = _run(True, "--no_cuda_graph", None,
        "do not replay training steps as a CUDA graph; without the flag a GPU does so for images in memory, except "
        "with --mixup, --augment, --amp fp16 or torchrun", affects="rounding")
    batch_norm: str = _run("cudnn", "--batch_norm", ("cudnn", "native"),
        "batch norm on a GPU: cudnn: by cuDNN where torch uses it; native: always by PyTorch's own kernels",
        affects="rounding")
    deterministic: bool = _run(False, "--deterministic", None,
        "bitwise repeatable on CUDA too; slower there", affects="rounding")
    workers: int = _run(min(4, _cores()), "-j --workers N", number(int, low=0, high=1024),
        "processes that load and crop images, or threads that decode them (default: the available cores, at most 4); "
        "no effect on CIFAR and the digits")
    print_freq: int = _run(10, "-p --print_freq N", COUNT, "batches between progress lines")
    checkpoint_seconds: float = _run(15.0, "--checkpoint_seconds S", NOT_NEGATIVE,
        "least time between two checkpoints in seconds; the last one, that of an interrupt and those of "
        "--keep_epochs are always written")
    resume: str = _run("", "--resume PATH|auto", None,
        "continue from a checkpoint, of another run too; auto: from this run's newest, with more --epochs too")
    evaluate: bool = _run(False, "-e --evaluate", None,
        "evaluate the checkpoint of --resume, train nothing; model and data are the checkpoint's, but for --data_dir, "
        "--val_list and --skip_damaged")
    posthoc_la: tuple[float, ...] = _run((), "--posthoc_la TAU", NOT_NEGATIVE,
        "with -e: subtract TAU * log prior from the logits (post-hoc logit adjustment); of several values the best on "
        "the held-out part of --val_fraction is taken, never on the test set", nargs="+")
    tau_norm: tuple[float, ...] = _run((), "--tau_norm TAU", NOT_NEGATIVE,
        "with -e: divide each class's weight vector by its L2 norm to the power of TAU, and set the bias to 0; several "
        "values as for --posthoc_la", nargs="+")
    tau_norm_bias: tuple[float, ...] = _run((), "--tau_norm_bias TAU", NOT_NEGATIVE,
        "with -e: as --tau_norm, but leave the bias unchanged", nargs="+")
    save_logits: bool = _run(False, "--save_logits", None,
        "with -e: write logits, targets, file names and class names to logits.npz")
    predict: str | None = _run(None, "--predict DIR", path,
        "with -e: write the classes of the unlabelled images in DIR, or of one image, to a CSV file; needs no other "
        "data")
    top: int = _run(1, "--top N", COUNT, "with --predict: the N likeliest classes of each image, one row per class")
    export_split: str | None = _run(None, "--export_split FILE", path,
        "write the indices of the training images, one per line, and stop")
    keep_epochs: tuple[int, ...] = _run((), "--keep_epochs N", COUNT,
        "also keep the checkpoints after N epochs, to fork from", nargs="*")
    exp_str: str = _run("0", "--exp_str NAME", plain_name, "last part of the run's name")
    root_log: str = _run("log", "--root_log DIR", path, "folder of the logs of all runs")
    root_model: str = _run("checkpoint", "--root_model DIR", path, "folder of the checkpoints of all runs")
    dry_run: bool = _run(False, "--dry_run", None, "print the recipe, one CSV row per epoch, and stop")
    force: bool = _run(False, "--force", None,
        "continue although settings or data differ from the checkpoint's, or a newer one exists; what differed is "
        "recorded, and the report does not compare such a run with published results")
    overwrite: bool = _run(False, "--overwrite", None, "delete the run that the folders hold, and start again")
    # fmt: on

    given: frozenset[str] = dataclasses.field(default=frozenset(), compare=False)  # names given on the command line
    script: str = dataclasses.field(default="", compare=False)  # a key of `parser.SCRIPTS`

    @property
    def name(self) -> str:
        """The published name of a run's folder; a natural imbalance has no factor."""
        parts = [self.dataset, self.arch, self.loss_type, self.train_rule, self.imb_type]
        return "_".join([*parts, *([] if self.imb_type == "none" else [str(self.imb_factor)]), self.exp_str])

    @property
    def log_folder(self) -> str:
        return os.path.join(self.root_log, self.name)

    @property
    def model_folder(self) -> str:
        return os.path.join(self.root_model, self.name)

    @property
    def use_norm(self) -> bool:
        """Whether the loss wants a normalised head."""
        return LOSSES[self.loss_type].normalised_head

    @property
    def logit_scale(self) -> float:
        """Probabilities are the softmax of the logits times this: those of a normalised head are cosines."""
        return self.s if self.use_norm else 1.0

    @property
    def feature_norm(self) -> str:
        """The norm that the model's features carry: the loss's; where that ignores them, L1."""
        return "l1" if self.ib_norm == "none" else self.ib_norm


FIELDS = {field.name: field for field in dataclasses.fields(Settings) if field.metadata}


def fields_affecting(*kinds: str) -> tuple[str, ...]:
    """Names of the settings that affect one of `kinds`."""
    return tuple(name for name, field in FIELDS.items() if field.metadata["affects"] in kinds)


#: What makes a run what it is. `exp_str` only names it, as the folder's name is all that two such runs share.
IDENTITY = fields_affecting("data", "model", "start", "schedule", "optimizer", "selection", "numerics")
#: Of the schedule what no plan of the epochs shows, a new flag for example: it is compared as it is.
UNPLANNED = tuple(sorted({*fields_affecting("schedule")} - {*READS, *all_constants(), "start_epoch"}))
#: What a run and the checkpoint that it starts from share; the schedule is compared epoch by epoch.
SHARED = (*fields_affecting("data", "model", "start", "optimizer", "numerics"), *UNPLANNED)
#: What an evaluation takes from the checkpoint.
OF_CHECKPOINT = fields_affecting("data", "model", "schedule", "selection")


# ------------------------------------------------------------------------------------------------- in files


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings for JSON, sorted by name, with lists for tuples.

    None is left out, except for seed, pretrained, num_classes and gpu.
    """
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name in sorted(FIELDS)
        if (value := getattr(settings, name)) is not None or name in ("seed", "pretrained", "num_classes", "gpu")
    }


def from_record(record: Mapping[str, Any]) -> Settings:
    """The Settings of a checkpoint or a record. What it lacks has its default; unknown names are ignored.

    Raises:
        ValueError: a value that is not among the choices here, for example the loss of another checkout.
    """
    values: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in record.items() if name in FIELDS
    }
    for name, value in values.items():
        offered = FIELDS[name].metadata["argparse"].get("choices")
        if offered is not None and value is not None and value not in offered:
            raise ValueError(f"{name} is {value!r}")
    return Settings(**values)


# ---------------------------------------------------------------------------------------------- combinations


def check(settings: Settings) -> Settings:
    """The settings, if they can work together.

    Raises:
        UsageError: settings that cannot be used together. A setting without effect is a warning.
    """
    _check_schedule(settings)
    _check_method(settings)
    given = settings.given
    if "imb_factor" in given and "imb_type" not in given and settings.imb_type == "none":
        raise UsageError("--imb_factor needs an --imb_type: without it the images stay as they are")
    if settings.val_fraction and settings.val_left_out:
        raise UsageError("--val_fraction and --val_left_out cannot be used together")
    if settings.evaluate and not settings.resume:
        raise UsageError("--evaluate needs --resume PATH (or --resume auto)")
    if settings.resume == "auto" and settings.overwrite:
        raise UsageError("--resume auto and --overwrite cannot be used together")
    for name in ("posthoc_la", "tau_norm", "tau_norm_bias", "save_logits", "predict"):
        if getattr(settings, name) and not settings.evaluate:
            raise UsageError(f"--{name} is for an evaluation: add -e --resume PATH")
    if settings.top > 1 and not settings.predict:
        raise UsageError("--top is for --predict DIR: add it")
    if settings.save_logits and settings.predict:
        raise UsageError("--save_logits is for the test images: leave out --predict")
    corrections = [f"--{name}" for name in ("posthoc_la", "tau_norm", "tau_norm_bias") if getattr(settings, name)]
    if len(corrections) > 1:
        raise UsageError(f"{' and '.join(corrections)} cannot be used together")
    return settings


def _check_schedule(settings):
    epochs, milestones, rule = settings.epochs, settings.milestones, RULES[settings.train_rule]
    if len(settings.lr_factors) != len(milestones):
        raise UsageError(f"--lr_factors needs one factor for each of the {len(milestones)} milestones")
    if list(milestones) != sorted(set(milestones)):
        raise UsageError("--milestones must be in increasing order")
    never = [m for m in milestones if m >= epochs]
    if never and "milestones" in settings.given:
        raise UsageError(f"--milestones {never[0]} never comes: the last epoch is {epochs - 1}")
    if settings.schedule != "step" and settings.given & {"milestones", "lr_factors"}:
        raise UsageError(f"--schedule {settings.schedule} has no --milestones and no --lr_factors")
    if never and settings.schedule == "step":
        warn(f"the lr milestones {never} never come in {epochs} epochs (set --milestones)")
    if LOSSES[settings.loss_type].first_phase_ce and settings.start_ib_epoch >= epochs:
        warn(
            f"--start_ib_epoch {settings.start_ib_epoch} never comes in {epochs} epochs: "
            f"--loss_type {settings.loss_type} will be plain CE throughout"
        )
    if rule.start and getattr(settings, rule.start) >= epochs:
        warn(f"--{rule.start} {getattr(settings, rule.start)} never comes in {epochs} epochs: the rule does nothing")
    late = [m for m in milestones if settings.drw_epoch <= m < epochs]
    if rule.trains == "head" and late and settings.schedule == "step":
        warn(f"the lr milestones {late} never come: from --drw_epoch {settings.drw_epoch} on the head has its own lr")
    if settings.start_epoch >= epochs:
        raise UsageError(f"--start-epoch {settings.start_epoch} is past the last epoch, {epochs - 1}")
    if settings.start_epoch and not settings.resume:
        warn(f"--start-epoch {settings.start_epoch} without --resume: the epochs before it are left out, not trained")


def _check_method(settings):
    loss, method = LOSSES[settings.loss_type], f"--loss_type {settings.loss_type}"
    if "ib_norm" in loss.constants and settings.ib_norm == "none" and settings.epsilon == 0:
        raise UsageError("--ib_norm none needs an --epsilon over 0: the factor is alpha / epsilon")
    if settings.auto_target == "ib" and settings.ib_norm not in ("l1", "none"):
        raise UsageError(f"--auto_target ib needs --ib_norm l1 or none, got --ib_norm {settings.ib_norm}")
    for name in settings.given & {"auto_target", "auto_ratio"}:
        if settings.alpha != "auto":
            raise UsageError(f"--{name} is for --alpha auto: add it")
    if "auto_ratio" in settings.given and settings.auto_target != "gradient":
        raise UsageError(f"--auto_ratio is for --auto_target gradient: {settings.auto_target} has none")
    if settings.evaluate:
        return
    if loss.corrects_prior and RULES[settings.train_rule].sampler != "none":
        warn(f"{method} and --train_rule {settings.train_rule} both correct for rare classes: the prior counts twice")
    recipe = Recipe(settings)
    changes = (0, settings.start_ib_epoch, recipe.rule_start)
    used = {name for epoch in changes if epoch < settings.epochs for name in recipe.constants_at(epoch)}
    for name in all_constants():
        if name in settings.given - used:
            rule = f"--train_rule {settings.train_rule}"
            warn(f"{FIELDS[name].metadata['flags'][0]} has no effect: {method} with {rule} does not use it")
    of_others = {name for optimizer in OPTIMIZERS for name in constants_of(optimizer)}
    for name in sorted(settings.given & of_others - {*constants_of(settings.optimizer)}):
        warn(f"{FIELDS[name].metadata['flags'][0]} has no effect: --optimizer {settings.optimizer} does not use it")
