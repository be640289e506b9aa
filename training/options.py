"""The flags, in groups; each script takes the groups that it needs."""

import argparse
import os
import sys

from imbalance import IMB_TYPES
from losses import NORMS
from training.criteria import constants
from training.precision import AMP_TYPES
from training.recipe import IB_LOSSES, LOSS_TYPES, TRAIN_RULES, Recipe
from utils import UsageError, one_line, warn

#: Settings that change nothing in what is learnt: they do not belong to the identity of a run.
INCIDENTAL = frozenset(
    (
        "data_dir",
        "workers",
        "print_freq",
        "resume",
        "evaluate",
        "gpu",
        "root_log",
        "root_model",
        "dry_run",
        "force",
        "overwrite",
        "recipe",
        "keep_epochs",
        "threads",
        "compile",
        "deterministic",
        "processes",
    )
)
#: Settings that a run and the checkpoint it starts from must share. The schedule and the constants of the
#: loss are compared epoch by epoch instead (see resume.py).
SHARED = (
    "dataset", "arch", "num_classes", "use_norm", "imb_type", "imb_factor", "rand_number", "val_fraction",
    "seed", "batch_size", "momentum", "weight_decay", "amp", "pretrained",
    "image_size", "crop", "test_fraction", "sync_bn",
)  # fmt: skip

CROPS = ("resized", "padded")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the layout of a script's docstring."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def parse_args(self, args=None, namespace=None):
        found = super().parse_args(args, namespace)
        for action in self._actions:  # argparse of Python 3.11 makes an empty list of '--flag=--'
            if action.nargs is None and getattr(found, action.dest, None) == []:
                self.error(f"argument {'/'.join(action.option_strings)}: '--' is no value")
        return found

    def error(self, message):
        print(f"{self.prog}: error: {one_line(message)} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def _number(kind, low=None, high=None, above=None):
    """An argparse type: a finite number within bounds."""

    def convert(text):
        value = kind(text)
        inside = value == value and abs(value) != float("inf")
        inside = inside and (low is None or value >= low) and (above is None or value > above)
        if not inside or (high is not None and value > high):
            bounds = [f"over {above}" if above is not None else "", f"at least {low}" if low is not None else ""]
            bounds.append(f"at most {high}" if high is not None else "")
            wanted = " and ".join(b for b in bounds if b) or "finite"
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be {wanted}")
        return value

    convert.__name__ = kind.__name__
    return convert


def _alpha(text):
    return "auto" if text == "auto" else _number(float, above=0)(text)


_alpha.__name__ = "number"  # what argparse calls it


def _plain_name(text):
    """An argparse type: a part of a folder's name."""
    if not text or os.sep in text or not text.isprintable():
        raise argparse.ArgumentTypeError("it is part of a folder's name: printable, without a separator, not empty")
    return text


def add_data_flags(parser, datasets):
    """`datasets`: their names, the first one is the default; None: any name."""
    group = parser.add_argument_group("data")
    if datasets is None:
        group.add_argument("--dataset", type=_plain_name, metavar="NAME", help="default: the name of the data's folder")
    else:
        group.add_argument("--dataset", default=datasets[0], choices=datasets, help="default: %(default)s")
    group.add_argument("--data_dir", default="./data", help="folder of the data (default: %(default)s)")
    group.add_argument("--imb_type", default="exp", choices=IMB_TYPES, help="shape of the tail (default: %(default)s)")
    group.add_argument(
        "--imb_factor", default=0.01, type=_number(float, above=0, high=1), metavar="F",
        help="smallest class over largest, in (0, 1] (default: %(default)s, the paper's ratio 100)",
    )  # fmt: skip
    group.add_argument(
        "--rand_number", default=0, type=_number(int, low=0, high=2**32 - 1), metavar="N",
        help="seed of the choice of images (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--num_classes", default=None, type=_number(int, low=1), metavar="K",
        help="may be left out: the data set knows; a wrong number is an error",
    )  # fmt: skip
    group.add_argument(
        "--val_fraction", default=0.0, type=_number(float, low=0, high=0.9), metavar="F",
        help="share of the training images held out to pick the best epoch, by mean class accuracy, without "
        "the test set (default: %(default)s: by top-1 on the test set, as published)",
    )  # fmt: skip


def add_model_flags(parser, archs, default, pretrained=None):
    """`pretrained`: of nets that have ImageNet weights, the default: 'imagenet' (as a bare --pretrained) or 'none'."""
    group = parser.add_argument_group("net")
    shown = "NAME" if len(archs) > 10 else None
    group.add_argument(
        "-a", "--arch", default=default, choices=archs, metavar=shown,
        help="default: %(default)s" + ("; any of torchvision's classifiers" if shown else ""),
    )  # fmt: skip
    const, metavar = ("imagenet", "imagenet|none|PATH") if pretrained else ("published", "none|PATH")
    or_imagenet = f", or torchvision's (default: {pretrained})" if pretrained else ""
    group.add_argument(
        "--pretrained", nargs="?", const=const, default=pretrained, metavar=metavar,
        help="start from the weights of this checkpoint" + or_imagenet,
    )  # fmt: skip


def add_picture_flags(parser, image_size, crops=CROPS):
    """`crops`: the choices of --crop; None: no such flag."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--image_size", default=image_size, type=_number(int, low=8, high=1024), metavar="N",
        help="side of the square that the net sees (default: %(default)s)",
    )  # fmt: skip
    if crops is None:
        return
    group.add_argument(
        "--crop", default="resized", choices=crops,
        help="training crops: resized: RandomResizedCrop, tested on the centre of pictures resized to 256/224 of "
        "that side; padded: RandomCrop of the picture padded by an eighth, tested whole (default: %(default)s)",
    )  # fmt: skip


def add_method_flags(parser, drw_epoch=160):
    group = parser.add_argument_group("method")
    number = group.add_argument
    number("--loss_type", default="CE", choices=LOSS_TYPES, help="default: %(default)s")
    number("--train_rule", default="None", choices=TRAIN_RULES, help="default: %(default)s")
    number(
        "--start_ib_epoch", default=100, type=_number(int, low=0), metavar="E",
        help="first epoch, counted from 0, of the IB loss (default: %(default)s)",
    )  # fmt: skip
    number(
        "--alpha", default=1000.0, type=_alpha, metavar="A|auto",
        help="scale of the IB loss; auto: from the first IB batches, so that it has the size of CE (default: 1000)",
    )  # fmt: skip
    number("--epsilon", default=1e-3, type=_number(float, low=0), help="added to the influence (default: %(default)s)")
    number(
        "--ib_norm", default="l1", choices=NORMS,
        help="norm of the influence; none: it counts as 0, the factor is alpha / epsilon (default: %(default)s)",
    )  # fmt: skip
    number("--detach_ib", action="store_true", help="no gradient through the IB factor")
    number("--gamma", default=1.0, type=_number(float, low=0), help="of Focal and IBFocal (default: %(default)s)")
    number(
        "--focal_scale", default=10.0, type=_number(float, above=0),
        help="factor of the Focal loss, as in the official code (default: %(default)s)",
    )  # fmt: skip
    number(
        "--beta", default=0.9999, type=_number(float, low=0, high=0.9999999),
        help="of CBReweight, DRW and Resample (default: %(default)s)",
    )  # fmt: skip
    number("--max_m", default=0.5, type=_number(float, low=0), help="LDAM's largest margin (default: %(default)s)")
    number(
        "--la_tau", default=1.0, type=_number(float, low=0), help="LA's weight of the log prior (default: %(default)s)"
    )
    number("--s", default=30.0, type=_number(float, above=0), help="LDAM's scale (default: %(default)s)")
    number(
        "--drw_epoch", default=drw_epoch, type=_number(int, low=0), metavar="E",
        help="first epoch of DRW's class weights (default: %(default)s)",
    )  # fmt: skip


def add_training_flags(parser, epochs=200, milestones=(160, 180), lr_factors=(0.01, 0.01)):
    group = parser.add_argument_group("training")
    number = group.add_argument
    number("--epochs", default=epochs, type=_number(int, low=1), metavar="N", help="default: %(default)s")
    number(
        "--start-epoch", default=0, type=_number(int, low=0), metavar="E", dest="start_epoch",
        help="number of the first epoch, for restarts by hand; --resume sets it (default: %(default)s)",
    )  # fmt: skip
    number(
        "-b", "--batch-size", default=128, type=_number(int, low=1), metavar="N", dest="batch_size", help="default: 128"
    )
    number(
        "--lr", "--learning-rate", default=0.1, type=_number(float, low=0), metavar="LR", dest="lr",
        help="before its factors (default: %(default)s)",
    )  # fmt: skip
    number("--momentum", default=0.9, type=_number(float, low=0), metavar="M", help="default: %(default)s")
    number(
        "--wd", "--weight-decay", default=2e-4, type=_number(float, low=0), metavar="W", dest="weight_decay",
        help="default: %(default)s",
    )  # fmt: skip
    number(
        "--warmup_epochs",
        default=5,
        type=_number(int, low=0),
        metavar="N",
        help="linear warm-up (default: %(default)s)",
    )
    number("--keep_warmup", action="store_true", help="warm up also where the IB phase starts before its end")
    number(
        "--milestones", nargs="*", default=None, type=_number(int, low=0), metavar="E",
        help=f"epochs at which the lr falls (default: {' '.join(map(str, milestones))})",
    )  # fmt: skip
    number(
        "--lr_factors", nargs="*", default=None, type=_number(float, above=0), metavar="F",
        help=f"what it is multiplied by there (default: {' '.join(map(str, lr_factors))})",
    )  # fmt: skip
    number(
        "--ib_lr_factor", default=0.01, type=_number(float, above=0), metavar="F",
        help="what the lr is multiplied by in the IB phase (default: %(default)s)",
    )  # fmt: skip
    number(
        "--seed", default=None, type=_number(int, low=0, high=2**31 - 1), help="drawn, printed and recorded if left out"
    )
    parser.set_defaults(_published_milestones=tuple(milestones), _published_lr_factors=tuple(lr_factors))


def add_run_flags(parser, workers_help="number of data loading processes"):
    group = parser.add_argument_group("run")
    flag = group.add_argument
    flag("--gpu", default=None, type=int, metavar="N", help="CUDA device (default: the first one, else the CPU)")
    flag("--threads", default=None, type=_number(int, low=1), metavar="N", help="CPU threads (default: torch's)")
    flag(
        "--amp",
        default="none",
        choices=list(AMP_TYPES),
        help="mixed precision; the losses stay float32 (default: none)",
    )
    flag("--sync_bn", action="store_true", help="batch norm over all GPUs, as on a single one (with torchrun)")
    flag("--compile", action="store_true", help="torch.compile; with CUDA graphs on a GPU")
    flag("--deterministic", action="store_true", help="bitwise repeatable on CUDA too, and slower there")
    flag("-j", "--workers", default=4, type=_number(int, low=0), metavar="N", help=workers_help)
    flag(
        "-p",
        "--print_freq",
        default=10,
        type=_number(int, low=1),
        metavar="N",
        help="batches between progress lines (default: %(default)s)",
    )
    flag("--resume", default="", metavar="PATH|auto", help="go on from a checkpoint; auto: from this run's newest")
    flag("-e", "--evaluate", action="store_true", help="evaluate the checkpoint of --resume, train nothing")
    flag(
        "--keep_epochs",
        nargs="*",
        default=[],
        type=_number(int, low=1),
        metavar="N",
        help="also keep the checkpoints after N epochs",
    )
    flag(
        "--exp_str",
        default="0",
        type=_plain_name,
        metavar="NAME",
        help="last part of the run's name (default: %(default)s)",
    )
    flag("--root_log", default="log", metavar="DIR", help="default: %(default)s")
    flag("--root_model", default="checkpoint", metavar="DIR", help="default: %(default)s")
    flag("--dry_run", action="store_true", help="print the recipe, one CSV row an epoch, and stop")
    flag("--force", action="store_true", help="resume although settings differ from the checkpoint's")
    flag("--overwrite", action="store_true", help="delete the run that the folder holds, and start anew")


def complete(options):
    """Check what argparse cannot, fill in what was left out, warn about what will not happen. In place."""
    asked = options.milestones is not None
    milestones, factors = options.__dict__.pop("_published_milestones"), options.__dict__.pop("_published_lr_factors")
    options.milestones = list(milestones if options.milestones is None else options.milestones)
    if options.lr_factors is None:
        options.lr_factors = (
            list(factors) if len(options.milestones) == len(factors) else [factors[0]] * len(options.milestones)
        )
    if len(options.lr_factors) != len(options.milestones):
        raise UsageError(f"--lr_factors needs one factor for each of the {len(options.milestones)} milestones")
    if options.milestones != sorted(set(options.milestones)):
        raise UsageError("--milestones must rise")
    never = [m for m in options.milestones if m >= options.epochs]
    if never and asked:
        raise UsageError(f"--milestones {never[0]} never comes: the last epoch is {options.epochs - 1}")
    if never:
        warn(f"the lr milestones {never} never come in {options.epochs} epochs (set --milestones)")
    if options.loss_type in IB_LOSSES and options.start_ib_epoch >= options.epochs:
        warn(
            f"--start_ib_epoch {options.start_ib_epoch} never comes in {options.epochs} epochs: "
            f"--loss_type {options.loss_type} will be plain CE throughout"
        )
    if options.loss_type in IB_LOSSES and options.ib_norm == "none" and options.epsilon == 0:
        raise UsageError("--ib_norm none needs an --epsilon over 0: the factor is alpha / epsilon")
    if options.train_rule == "DRW" and options.drw_epoch >= options.epochs:
        warn(f"--drw_epoch {options.drw_epoch} never comes in {options.epochs} epochs: no class weights at all")
    if options.start_epoch >= options.epochs:
        raise UsageError(f"--start-epoch {options.start_epoch} is past the last epoch, {options.epochs - 1}")
    if options.evaluate and not options.resume:
        raise UsageError("--evaluate needs --resume PATH")
    options.use_norm = options.loss_type == "LDAM"
    if options.pretrained == "none":
        options.pretrained = None
    return options


def recipe_of(options):
    """The Recipe that the options describe; `options` is a namespace."""
    return Recipe(
        loss_type=options.loss_type,
        train_rule=options.train_rule,
        epochs=options.epochs,
        lr=options.lr,
        start_ib_epoch=options.start_ib_epoch,
        warmup_epochs=options.warmup_epochs,
        milestones=tuple(options.milestones),
        lr_factors=tuple(options.lr_factors),
        ib_lr_factor=options.ib_lr_factor,
        keep_warmup=options.keep_warmup,
        drw_epoch=options.drw_epoch,
    )


def dry_run(options):
    """The CSV that --dry_run prints: a row an epoch, counted from 0."""
    lines = ["epoch,lr,loss,class_weights,sampler"]
    for epoch, stage in enumerate(recipe_of(options).stages()):
        lines.append(f"{epoch},{stage.lr!r},{stage.loss},{stage.class_weights},{stage.sampler}")
    return "\n".join(lines)


def plan(options, epoch):
    """All that decides how `epoch` is trained: its Stage, and the constants of its criterion."""
    stage = recipe_of(options).stage(epoch)
    return {"lr": stage.lr, "loss": stage.loss, "class_weights": stage.class_weights, "sampler": stage.sampler,
            **constants(stage, options)}  # fmt: skip


def settings_of(options):
    """The options as a plain dict, for args.json and checkpoints."""
    return dict(sorted(vars(options).items()))


def store_name(options):
    """The published name of a run's folder."""
    parts = (options.dataset, options.arch, options.loss_type, options.train_rule, options.imb_type)
    return "_".join([*parts, str(options.imb_factor), options.exp_str])
