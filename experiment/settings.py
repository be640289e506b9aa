"""Every setting of a run, declared once: name, flag, type, bounds, default, help, and what it affects.

The identity of a run, what a fork must share, what a resume may change and what may stand beside a published figure
are derived from `affects`:

    data, model     which images, which network; an evaluation takes them from the checkpoint
    start           the first weights and everything drawn: seed, pretrained
    schedule        lr, losses, rules and their constants; compared epoch by epoch
    optimizer       SGD and the batch
    numerics        precision: the same experiment with other rounding errors, large enough to be named
    rounding        the same run, but not to the last bit: threads, ranks, compilation
    nothing         places, progress, what to do
"""

import argparse
import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from imbalance import IMB_TYPES
from losses import NORMS
from training.precision import AMP_TYPES
from training.recipe import SCHEDULES, Recipe
from training.registry import LOSSES, RULES, all_constants
from utils import UsageError, number, warn

KINDS = ("data", "model", "start", "schedule", "optimizer", "numerics", "rounding", "nothing")
CROPS = ("resized", "padded")


def setting(default: Any, *flags: str, affects: str, group: str = "", **of_argparse: Any) -> Any:
    """Declare a field of `Settings`; `of_argparse` goes to `add_argument`. Without flags it is found, not given."""
    if affects not in KINDS:
        raise ValueError(f"affects must be one of {', '.join(KINDS)}, got {affects!r}")
    metadata = {"flags": flags, "affects": affects, "group": group, "argparse": of_argparse}
    return dataclasses.field(default=default, metadata=metadata)


def _alpha(text):
    return "auto" if text == "auto" else number(float, above=0)(text)


_alpha.__name__ = "number"  # what argparse calls it


def plain_name(text):
    """An argparse type: a part of a folder's name."""
    if not text or os.sep in text or not text.isprintable():
        raise argparse.ArgumentTypeError("it is part of a folder's name: printable, without a separator, not empty")
    return text


def _explain(entries):
    """Names and what they mean, for --help."""
    return "; ".join(f"{name}: {entry.help}" for name, entry in entries.items())


EPOCH = {"type": number(int, low=0, high=10**6), "metavar": "E"}
COUNT = {"type": number(int, low=1, high=10**6), "metavar": "N"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of one run; read only. A script that does not offer a flag leaves its field at None."""

    # ---------------------------------------------------------------------------------------------- data
    dataset: str = setting(
        None, "--dataset", affects="data", group="data", type=plain_name, help="default: %(default)s"
    )
    data_dir: str = setting(
        "./data", "--data_dir", affects="nothing", group="data", help="folder of the data (default: %(default)s)"
    )
    train_list: str | None = setting(
        None, "--train_list", affects="data", group="data", metavar="FILE",
        help="training images as lines 'path label' below --data_dir, instead of folders",
    )  # fmt: skip
    val_list: str | None = setting(
        None, "--val_list", affects="data", group="data", metavar="FILE", help="test images, as --train_list"
    )
    check_images: bool = setting(
        False, "--check_images", affects="nothing", group="data", help="decode every image before training starts"
    )
    imb_type: str = setting(
        "exp", "--imb_type", affects="data", group="data", choices=IMB_TYPES,
        help="shape of the tail; none: as the data are (default: %(default)s)",
    )  # fmt: skip
    imb_factor: float = setting(
        0.01, "--imb_factor", affects="data", group="data", type=number(float, above=0, high=1), metavar="F",
        help="smallest class over largest, in (0, 1] (default: %(default)s)",
    )  # fmt: skip
    rand_number: int = setting(
        0, "--rand_number", affects="data", group="data", type=number(int, low=0, high=2**32 - 1), metavar="N",
        help="seed of the choice of images (default: %(default)s)",
    )  # fmt: skip
    num_classes: int | None = setting(
        None, "--num_classes", affects="data", group="data", type=number(int, low=1, high=10**6), metavar="K",
        help="may be left out: the data set knows; a wrong number is an error",
    )  # fmt: skip
    val_fraction: float = setting(
        0.0, "--val_fraction", affects="data", group="data", type=number(float, low=0, high=0.9), metavar="F",
        help="share of the training images held out to pick the best epoch, by mean class accuracy, without the test "
        "set (default: %(default)s: by top-1 on the test set, as published)",
    )  # fmt: skip
    test_fraction: float = setting(0.0, affects="data", type=number(float, low=0, high=0.9))
    flip: str = setting(
        "auto", "--flip", affects="data", group="data", choices=("auto", "on", "off"),
        help="random mirroring of training images; auto: as the data set says, no for digits (default: %(default)s)",
    )  # fmt: skip
    image_size: int = setting(
        None, "--image_size", affects="data", group="data", type=number(int, low=8, high=1024), metavar="N",
        help="side of the square that the model sees (default: %(default)s)",
    )  # fmt: skip
    crop: str | None = setting(
        None, "--crop", affects="data", group="data", choices=CROPS,
        help="training crops. resized: RandomResizedCrop, tested on the centre of images resized to 256/224 of that "
        "side; padded: RandomCrop of the image padded by an eighth, tested whole (default: %(default)s)",
    )  # fmt: skip

    # --------------------------------------------------------------------------------------------- model
    arch: str = setting(
        None, "-a", "--arch", affects="model", group="model", type=plain_name, help="default: %(default)s"
    )
    pretrained: str | None = setting(
        None, "--pretrained", affects="start", group="model", nargs="?", metavar="imagenet|none|PATH"
    )

    # -------------------------------------------------------------------------------------------- method
    loss_type: str = setting(
        "CE", "--loss_type", affects="schedule", group="method", choices=list(LOSSES), metavar="LOSS",
        help=_explain(LOSSES) + " (default: %(default)s)",
    )  # fmt: skip
    train_rule: str = setting(
        "None", "--train_rule", affects="schedule", group="method", choices=list(RULES), metavar="RULE",
        help=_explain(RULES) + " (default: %(default)s)",
    )  # fmt: skip
    start_ib_epoch: int = setting(
        100, "--start_ib_epoch", affects="schedule", group="method", **EPOCH,
        help="first epoch, counted from 0, of the IB loss (default: %(default)s)",
    )  # fmt: skip
    alpha: float | str = setting(
        1000.0, "--alpha", affects="schedule", group="method", type=_alpha, metavar="A|auto",
        help="scale of the IB loss; auto: set in the first 20 IB batches (default: 1000)",
    )  # fmt: skip
    auto_target: str = setting(
        "ce", "--auto_target", affects="schedule", group="method", choices=("ce", "ib"),
        help="size that --alpha auto gives the loss. ce: of plain CE; ib: of the IB loss with L1 norm and alpha 1000 "
        "(default: %(default)s)",
    )  # fmt: skip
    epsilon: float = setting(
        1e-3, "--epsilon", affects="schedule", group="method", type=number(float, low=0), metavar="E",
        help="added to the influence (default: %(default)s)",
    )  # fmt: skip
    ib_norm: str = setting(
        "l1", "--ib_norm", affects="schedule", group="method", choices=NORMS,
        help="norm of the influence; none: it counts as 0, the factor is alpha / epsilon (default: %(default)s)",
    )  # fmt: skip
    detach_ib: bool = setting(
        False, "--detach_ib", affects="schedule", group="method", help="no gradient through the IB factor"
    )
    gamma: float = setting(
        1.0, "--gamma", affects="schedule", group="method", type=number(float, low=0), metavar="G",
        help="of Focal and IBFocal (default: %(default)s)",
    )  # fmt: skip
    focal_scale: float = setting(
        10.0, "--focal_scale", affects="schedule", group="method", type=number(float, above=0), metavar="S",
        help="factor of the Focal loss, as in the official code (default: %(default)s)",
    )  # fmt: skip
    beta: float = setting(
        0.9999, "--beta", affects="schedule", group="method", type=number(float, low=0, high=0.9999999), metavar="B",
        help="of CBReweight, DRW, Resample and DRS (default: %(default)s)",
    )  # fmt: skip
    max_m: float = setting(
        0.5, "--max_m", affects="schedule", group="method", type=number(float, low=0), metavar="M",
        help="LDAM's largest margin (default: %(default)s)",
    )  # fmt: skip
    s: float = setting(
        30.0, "--s", affects="schedule", group="method", type=number(float, above=0), metavar="S",
        help="LDAM's scale (default: %(default)s)",
    )  # fmt: skip
    la_tau: float = setting(
        1.0, "--la_tau", affects="schedule", group="method", type=number(float, low=0), metavar="T",
        help="LA's weight of the log prior (default: %(default)s)",
    )  # fmt: skip
    vs_gamma: float = setting(
        0.2, "--vs_gamma", affects="schedule", group="method", type=number(float, low=0), metavar="G",
        help="VS's exponent of n_k / n_max, which multiplies the logits (default: %(default)s)",
    )  # fmt: skip
    vs_tau: float = setting(
        1.2, "--vs_tau", affects="schedule", group="method", type=number(float, low=0), metavar="T",
        help="VS's weight of the log prior (default: %(default)s)",
    )  # fmt: skip
    drw_epoch: int = setting(
        160, "--drw_epoch", affects="schedule", group="method", **EPOCH,
        help="first epoch of the weights of DRW and DRW-IB, of DRS's sampler, of cRT's new head (default: %(default)s)",
    )  # fmt: skip

    # ------------------------------------------------------------------------------------------ training
    epochs: int = setting(200, "--epochs", affects="schedule", group="training", **COUNT, help="default: %(default)s")
    start_epoch: int = setting(
        0, "--start-epoch", affects="schedule", group="training", **EPOCH,
        help="number of the first epoch, for restarts by hand; --resume sets it (default: %(default)s)",
    )  # fmt: skip
    batch_size: int = setting(
        128, "-b", "--batch-size", affects="optimizer", group="training", **COUNT, help="default: %(default)s"
    )
    lr: float = setting(
        0.1, "--lr", "--learning-rate", affects="schedule", group="training", type=number(float, low=0), metavar="LR",
        help="before its factors (default: %(default)s)",
    )  # fmt: skip
    momentum: float = setting(
        0.9, "--momentum", affects="optimizer", group="training", type=number(float, low=0), metavar="M",
        help="default: %(default)s",
    )  # fmt: skip
    weight_decay: float = setting(
        2e-4, "--wd", "--weight-decay", affects="optimizer", group="training", type=number(float, low=0), metavar="W",
        help="default: %(default)s",
    )  # fmt: skip
    schedule: str = setting(
        "step", "--schedule", affects="schedule", group="training", choices=SCHEDULES,
        help="step: the lr falls at the milestones; cosine: half a cosine over all epochs (default: %(default)s)",
    )  # fmt: skip
    warmup_epochs: int = setting(
        5, "--warmup_epochs", affects="schedule", group="training", **EPOCH,
        help="linear warm-up (default: %(default)s)",
    )  # fmt: skip
    keep_warmup: bool = setting(
        False, "--keep_warmup", affects="schedule", group="training",
        help="warm up also where the IB phase starts before its end",
    )  # fmt: skip
    milestones: tuple[int, ...] = setting(
        (160, 180), "--milestones", affects="schedule", group="training", nargs="*", **EPOCH,
        help="epochs at which the lr falls (default: %(default)s)",
    )  # fmt: skip
    lr_factors: tuple[float, ...] = setting(
        (0.01, 0.01), "--lr_factors", affects="schedule", group="training", nargs="*", type=number(float, above=0),
        metavar="F", help="what it is multiplied by there (default: %(default)s)",
    )  # fmt: skip
    ib_lr_factor: float = setting(
        0.01, "--ib_lr_factor", affects="schedule", group="training", type=number(float, above=0), metavar="F",
        help="what the lr is multiplied by in the IB phase (default: %(default)s)",
    )  # fmt: skip
    seed: int | None = setting(
        None, "--seed", affects="start", group="training", type=number(int, low=0, high=2**31 - 1), metavar="N",
        help="drawn, printed and recorded if left out",
    )  # fmt: skip

    # ----------------------------------------------------------------------------------------------- run
    gpu: int | None = setting(
        None, "--gpu", affects="nothing", group="run", type=int, metavar="N",
        help="CUDA device (default: the first one, else the CPU)",
    )  # fmt: skip
    threads: int | None = setting(
        None, "--threads", affects="rounding", group="run", type=number(int, low=1, high=1024), metavar="N",
        help="CPU threads (default: torch's)",
    )  # fmt: skip
    processes: int = setting(1, affects="rounding", type=number(int, low=1))
    amp: str = setting(
        "none", "--amp", affects="numerics", group="run", choices=list(AMP_TYPES),
        help="mixed precision; the losses stay float32. bf16 pays on GPUs and on CPUs with AVX512-BF16 or AMX; other "
        "CPUs emulate it, ten times slower (default: none)",
    )  # fmt: skip
    tf32: bool = setting(
        True, "--no_tf32", affects="numerics", group="run", action="store_false",
        help="convolutions in full float32 on a GPU (default: TF32, as torch does; never for matrix products)",
    )  # fmt: skip
    sync_bn: bool = setting(
        False, "--sync_bn", affects="numerics", group="run",
        help="batch norm over all GPUs, as on a single one (with torchrun)",
    )  # fmt: skip
    compile: bool = setting(False, "--compile", affects="rounding", group="run", help="torch.compile")
    cuda_graph: bool = setting(
        True, "--no_cuda_graph", affects="rounding", group="run", action="store_false",
        help="on a GPU start every kernel of a step by itself; without the flag steps on images in memory are replayed "
        "as a CUDA graph, except with --amp fp16 or torchrun",
    )  # fmt: skip
    batch_norm: str = setting(
        "cudnn", "--batch_norm", affects="rounding", group="run", choices=["cudnn", "native"],
        help="on a GPU: batch norm by cuDNN in float32, as torch does, or always by PyTorch's own kernels (default: "
        "%(default)s)",
    )  # fmt: skip
    deterministic: bool = setting(
        False, "--deterministic", affects="rounding", group="run", help="bitwise repeatable on CUDA too; slower there"
    )
    workers: int = setting(
        min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1),
        "-j", "--workers", affects="nothing", group="run", type=number(int, low=0, high=1024), metavar="N",
        help="processes that load images (default: the cores that are there, at most 4)",
    )  # fmt: skip
    print_freq: int = setting(
        10, "-p", "--print_freq", affects="nothing", group="run", **COUNT,
        help="batches between progress lines (default: %(default)s)",
    )  # fmt: skip
    resume: str = setting(
        "", "--resume", affects="nothing", group="run", metavar="PATH|auto",
        help="continue from a checkpoint; auto: from this run's newest",
    )  # fmt: skip
    evaluate: bool = setting(
        False, "-e", "--evaluate", affects="nothing", group="run",
        help="evaluate the checkpoint of --resume, train nothing; data and model are the checkpoint's",
    )  # fmt: skip
    posthoc_la: tuple[float, ...] = setting(
        (), "--posthoc_la", affects="nothing", group="run", nargs="+", type=number(float, low=0), metavar="TAU",
        help="with -e: subtract TAU * log prior from the logits (post-hoc logit adjustment); several values are "
        "compared on the held-out part of --val_fraction",
    )  # fmt: skip
    tau_norm: tuple[float, ...] = setting(
        (), "--tau_norm", affects="nothing", group="run", nargs="+", type=number(float, low=0), metavar="TAU",
        help="with -e: divide each class's weight vector by its length to the power of TAU; several as --posthoc_la",
    )  # fmt: skip
    save_logits: bool = setting(
        False, "--save_logits", affects="nothing", group="run", help="with -e: write logits and targets to logits.npz"
    )
    export_split: str | None = setting(
        None, "--export_split", affects="nothing", group="run", metavar="FILE",
        help="write the indices of the chosen training images, one a line, and stop",
    )  # fmt: skip
    keep_epochs: tuple[int, ...] = setting(
        (), "--keep_epochs", affects="nothing", group="run", nargs="*", **COUNT,
        help="also keep the checkpoints after N epochs",
    )  # fmt: skip
    exp_str: str = setting(
        "0", "--exp_str", affects="nothing", group="run", type=plain_name, metavar="NAME",
        help="last part of the run's name (default: %(default)s)",
    )  # fmt: skip
    root_log: str = setting(
        "log", "--root_log", affects="nothing", group="run", metavar="DIR", help="default: %(default)s"
    )
    root_model: str = setting(
        "checkpoint", "--root_model", affects="nothing", group="run", metavar="DIR", help="default: %(default)s"
    )
    dry_run: bool = setting(
        False, "--dry_run", affects="nothing", group="run", help="print the recipe, one CSV row an epoch, and stop"
    )
    force: bool = setting(
        False,
        "--force",
        affects="nothing",
        group="run",
        help="resume although settings or data differ from the checkpoint's, or a newer one is there",
    )
    overwrite: bool = setting(
        False,
        "--overwrite",
        affects="nothing",
        group="run",
        help="delete the run that the folder holds, and start anew",
    )
    recipe: str | None = setting(
        None, "--recipe", affects="nothing", group="data", choices=("official", "paper", "ldam"),
        help="defaults of the flags: the official code's, what the paper prints (lr x 0.1 at 50 and 90), or the LDAM "
        "paper's (64 x 64 crops padded by 8, from scratch, 120 epochs); flags given beside it hold",
    )  # fmt: skip

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
    def flips(self) -> bool | None:
        """Whether training images are mirrored; None: as the data set says."""
        return {"on": True, "off": False}.get(self.flip)

    @property
    def feature_norm(self) -> str:
        """The norm that the model's features carry: the loss's; where that ignores them, L1."""
        return "l1" if self.ib_norm == "none" else self.ib_norm


FIELDS = {field.name: field for field in dataclasses.fields(Settings) if field.metadata}


def fields_affecting(*kinds: str) -> tuple[str, ...]:
    """Names of the settings that affect one of `kinds`."""
    return tuple(name for name, field in FIELDS.items() if field.metadata["affects"] in kinds)


#: What makes a run what it is. `exp_str` only names it, as the folder's name is all that two such runs share.
IDENTITY = fields_affecting("data", "model", "start", "schedule", "optimizer", "numerics")
#: What a run and the checkpoint that it starts from share; the schedule is compared epoch by epoch.
SHARED = fields_affecting("data", "model", "start", "optimizer", "numerics")
#: What an evaluation takes from the checkpoint.
OF_CHECKPOINT = fields_affecting("data", "model", "schedule")


def recorded(settings: Settings) -> dict[str, Any]:
    """The settings as JSON has them, sorted; what the script does not offer is left out."""
    values = {name: getattr(settings, name) for name in FIELDS}
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in sorted(values.items())
        if value is not None or name in ("seed", "pretrained", "num_classes", "gpu")
    }


def from_record(record: Mapping[str, Any], base: Settings | None = None) -> Settings:
    """The Settings of a checkpoint or a record. What it lacks, being older, is as in `base` (None: the defaults).

    Raises:
        ValueError: a value of a type that the setting cannot have.
    """
    values = {name: _as_declared(FIELDS[name], value) for name, value in record.items() if name in FIELDS}
    return dataclasses.replace(base or Settings(), **values, given=frozenset())


def _as_declared(field, value):
    """A value read from a file, checked as the flag checks what is given."""
    how = field.metadata["argparse"]
    if value is None or value == field.default:
        return value
    if how.get("nargs") in ("*", "+"):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{field.name} is {value!r}")
        return tuple(_one_as_declared(field.name, how, item) for item in value)
    if isinstance(field.default, bool) != isinstance(value, bool):
        raise ValueError(f"{field.name} is {value!r}")
    return value if isinstance(value, bool) else _one_as_declared(field.name, how, value)


def _one_as_declared(name, how, value):
    try:
        value = how["type"](str(value)) if "type" in how else value
    except (argparse.ArgumentTypeError, ValueError):
        raise ValueError(f"{name} is {value!r}") from None
    if not isinstance(value, (str, int, float)) or value not in how.get("choices", [value]):
        raise ValueError(f"{name} is {value!r}")
    return value


def check(settings: Settings) -> Settings:
    """The settings, if they can work together.

    Raises:
        UsageError: a combination that cannot work. What only never happens is a warning.
    """
    epochs, milestones = settings.epochs, settings.milestones
    if len(settings.lr_factors) != len(milestones):
        raise UsageError(f"--lr_factors needs one factor for each of the {len(milestones)} milestones")
    if list(milestones) != sorted(set(milestones)):
        raise UsageError("--milestones must rise")
    never = [m for m in milestones if m >= epochs]
    if never and "milestones" in settings.given:
        raise UsageError(f"--milestones {never[0]} never comes: the last epoch is {epochs - 1}")
    if settings.schedule == "cosine" and settings.given & {"milestones", "lr_factors"}:
        raise UsageError("--schedule cosine has no --milestones and no --lr_factors")
    if never and settings.schedule == "step":
        warn(f"the lr milestones {never} never come in {epochs} epochs (set --milestones)")
    if "imb_factor" in settings.given and "imb_type" not in settings.given and settings.imb_type == "none":
        raise UsageError("--imb_factor needs --imb_type exp or step: without it the images stay as they are")
    loss, rule = LOSSES[settings.loss_type], RULES[settings.train_rule]
    if loss.first_phase_ce and settings.start_ib_epoch >= epochs:
        warn(
            f"--start_ib_epoch {settings.start_ib_epoch} never comes in {epochs} epochs: "
            f"--loss_type {settings.loss_type} will be plain CE throughout"
        )
    if loss.needs_features and settings.ib_norm == "none" and settings.epsilon == 0:
        raise UsageError("--ib_norm none needs an --epsilon over 0: the factor is alpha / epsilon")
    if settings.auto_target == "ib" and settings.ib_norm not in ("l1", "none"):
        raise UsageError(f"--auto_target ib needs L1 norms: it does not go with --ib_norm {settings.ib_norm}")
    if settings.auto_target != "ce" and settings.alpha != "auto" and "auto_target" in settings.given:
        raise UsageError("--auto_target says what --alpha auto aims at: add --alpha auto")
    if not settings.evaluate:
        _warn_of_unused_constants(settings)
    if rule.start and getattr(settings, rule.start) >= epochs:
        warn(f"--{rule.start} {getattr(settings, rule.start)} never comes in {epochs} epochs: the rule does nothing")
    late = [m for m in milestones if settings.drw_epoch <= m < epochs]
    if rule.trains == "head" and late and settings.schedule == "step":
        warn(f"the lr milestones {late} never come: from --drw_epoch {settings.drw_epoch} on the head has its own lr")
    if settings.start_epoch >= epochs:
        raise UsageError(f"--start-epoch {settings.start_epoch} is past the last epoch, {epochs - 1}")
    if settings.start_epoch and not settings.resume:
        warn(f"--start-epoch {settings.start_epoch} without --resume: the epochs before it are left out, not trained")
    if settings.start_epoch > settings.drw_epoch and rule.trains == "head" and not settings.resume:
        raise UsageError(
            f"--train_rule {settings.train_rule} from --start-epoch {settings.start_epoch} on has no network"
        )
    if settings.evaluate and not settings.resume:
        raise UsageError("--evaluate needs --resume PATH (or --resume auto)")
    if settings.resume == "auto" and settings.overwrite:
        raise UsageError("--resume auto and --overwrite exclude each other")
    if settings.evaluate and settings.export_split:
        raise UsageError("--export_split and -e exclude each other")
    for name in ("posthoc_la", "tau_norm", "save_logits"):
        if getattr(settings, name) and not settings.evaluate:
            raise UsageError(f"--{name} is for an evaluation: add -e --resume PATH")
    if settings.posthoc_la and settings.tau_norm:
        raise UsageError("--posthoc_la and --tau_norm exclude each other")
    return settings


def _warn_of_unused_constants(settings):
    """Name the constants of losses and rules that were given and that no epoch uses."""
    recipe = Recipe.from_settings(settings)
    changes = (0, settings.start_ib_epoch, recipe.rule_start)
    used = {name for epoch in changes if epoch < settings.epochs for name in recipe.constants_at(epoch)}
    for name in all_constants():
        if name in settings.given - used:
            method = f"--loss_type {settings.loss_type} with --train_rule {settings.train_rule}"
            warn(f"{FIELDS[name].metadata['flags'][0]} has no effect: {method} does not use it")
