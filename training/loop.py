"""The training loop that every script shares: an epoch, an evaluation, a run."""

import dataclasses
import os
import time
from typing import Any

import torch
from torch.nn import functional as F

import losses
from training import checkpoint, distributed
from training.criteria import build_criterion
from training.metrics import Counts, group_accuracy
from training.precision import Precision
from training.recipe import Recipe
from training.records import Progress, Records, best_epoch, shown
from training.resume import adopt
from utils import DataError, UsageError, epoch_seed


class NonFiniteLoss(DataError):
    """The loss became NaN or infinite."""


def train_one_epoch(model, batches, criterion, optimizer, num_classes, on_batch=None, precision=None):
    """One pass over `batches`, an iterable of (images, targets) on the model's device: this rank's parts of them.

    Nothing is read from the device in between, but what `on_batch(batch, counts, first_bad)` reads.

    Returns:
        dict(loss, acc1, acc5, seen, ib_factor): ib_factor is the mean factor of each class (None for a class
        without samples), or None for a criterion that has no factor.

    Raises:
        NonFiniteLoss: with the number of the first bad batch.
    """
    model.train()
    precision = precision or Precision()
    device = next(model.parameters()).device
    counts = Counts(num_classes, device, confusion=False)
    factors = torch.zeros(2, num_classes, device=device, dtype=torch.float64)
    first_bad = torch.full((), -1, device=device)
    for batch, (images, target) in enumerate(batches):
        n = len(target)
        if n == 0:  # a last batch smaller than the number of ranks: two blank pictures take part, and count nothing
            images, target = images.new_zeros((2, *images.shape[1:])), target.new_zeros(2)
        with precision.autocast():
            logits, features = model(images)
        inputs = (logits, target, features) if criterion.needs_features else (logits, target)
        loss, weight = _loss_of_part(criterion, inputs, n)
        precision.step(loss * distributed.size(), optimizer)
        first_bad = torch.where((first_bad < 0) & ~torch.isfinite(loss.detach()), batch, first_bad)
        logits, target, features = logits.detach()[:n], target[:n], features.detach()[:n]
        counts.add(logits, target, loss, weight)
        if criterion.needs_features:
            factor = criterion.factor(logits, target, features).double()
            factors.index_add_(1, target, torch.stack([factor, torch.ones_like(factor)]))
        if on_batch is not None:
            on_batch(batch, counts, first_bad)
    raise_if_bad(first_bad)
    return {**counts.read(), "ib_factor": _mean_factors(factors) if criterion.needs_features else None}


def _loss_of_part(criterion, inputs, n):
    """The loss of this rank's part of a batch, n samples, so that the ranks' sum is the loss of the whole batch.

    Returns:
        (loss, how often it counts in the epoch's mean: the samples of the whole batch, or None with one rank).
    """
    if distributed.size() == 1:
        return criterion(*inputs), None
    share = criterion.normaliser(inputs[1]).double() * (n > 0)
    whole, samples = distributed.total(torch.stack([share, torch.full_like(share, n)]))
    criterion.of_whole_batch = lambda means: distributed.total(means * n if n else torch.zeros_like(means)) / samples
    loss = criterion(*inputs)
    return (loss * (share / whole) if n else inputs[0][:0].sum()), samples


def raise_if_bad(first_bad):
    """Raise NonFiniteLoss, on every rank, if a batch was noted on any."""
    first_bad = distributed.smallest(torch.where(first_bad < 0, torch.iinfo(torch.int64).max, first_bad)).item()
    if first_bad < torch.iinfo(torch.int64).max:
        raise NonFiniteLoss(str(first_bad))


def _mean_factors(factors):
    return [s / n if n else None for s, n in zip(*distributed.total(factors).tolist(), strict=True)]


@torch.no_grad()
def evaluate(model, batches, class_counts, precision=None):
    """Accuracy on `batches`, and the plain CE, whatever the run trains with, so that its curve does not jump.

    Returns:
        dict(loss, acc1, acc5, seen, class_mean, many, medium, few, per_class, confusion), accuracies in percent,
        None for what has no images.
    """
    model.eval()
    precision = precision or Precision()
    counts = Counts(len(class_counts), next(model.parameters()).device)
    for images, target in batches:
        if len(target) == 0:  # another rank's
            continue
        with precision.autocast():
            logits, _ = model(images)
        counts.add(logits, target, F.cross_entropy(logits.float(), target))
    per_class, confusion = counts.per_class()
    groups = group_accuracy(per_class, class_counts)
    return {**counts.read(), **groups, "per_class": per_class, "confusion": confusion}


def make_optimizer(model, options):
    """SGD as published: momentum, L2 weight decay on all parameters, no Nesterov."""
    return torch.optim.SGD(
        model.parameters(), options.lr, momentum=options.momentum, weight_decay=options.weight_decay, fused=True
    )


@dataclasses.dataclass
class Run:
    """All that `fit` needs, put together by a script.

    train, test, val (or None): batch sources with `train_epoch(epoch, rates)` / `eval_epoch()`;
    class_counts: training images of each class; info: see `Records`; start: a `resume.Start`.
    """

    options: Any
    recipe: Recipe
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    train: object
    test: object
    val: object
    class_counts: list
    class_names: list
    info: dict
    log_folder: str
    model_folder: str
    start: object

    def __post_init__(self):
        """The net as it is trained, with the weights of `model`: gradients over all ranks, compiled if asked for."""
        self.forward = distributed.wrap(self.model, self.options.sync_bn)
        if self.options.compile:
            on_cuda = next(self.model.parameters()).is_cuda
            self.forward = torch.compile(self.forward, mode="reduce-overhead" if on_cuda else None, dynamic=False)


def fit(run):
    """Train from `run.start` to the last epoch; rank 0 keeps records and checkpoints. Returns the history."""
    options, recipe, optimizer = run.options, run.recipe, run.optimizer
    run.precision.load_state_dict(run.start.scaler)
    history, records = list(run.start.history), None
    if distributed.is_main():
        adopt(run.start, run.model_folder)
        records = Records(run.log_folder, run.class_names, run.info, history)
    progress = Progress(recipe.epochs, options.print_freq)
    rates = None
    if options.train_rule == "Resample":
        rates = losses.effective_number_rates(run.class_counts, options.beta)[run.train.targets.cpu()]
    criterion: Any = None
    state, previous = run.start.criterion, None
    try:
        for epoch in range(run.start.epoch, recipe.epochs):
            stage = recipe.stage(epoch)
            if previous is None or (stage.loss, stage.class_weights) != (previous.loss, previous.class_weights):
                if previous is not None:  # other weights, the same alpha
                    state = criterion.state_dict() if stage.loss == previous.loss else None
                criterion = _criterion(run, stage, state)
            previous = stage
            record = _epoch(run, epoch, stage, criterion, optimizer, progress, rates)
            history = [*history, record]
            if records is not None:
                _save(run, history, optimizer, criterion)
                records.add(record)
            progress.done(record["seconds"], _line(record, history, recipe.epochs))
    finally:
        if records is not None:
            records.close()
    return history


def _criterion(run, stage, state):
    """The criterion of a stage on the run's device; `state` is of the same loss in an earlier epoch, or empty."""
    criterion = build_criterion(stage, run.options, run.class_counts)
    if state and state.keys() == criterion.state_dict().keys():
        criterion.load_state_dict(state)
    return criterion.to(next(run.model.parameters()).device)


def _epoch(run, epoch, stage, criterion, optimizer, progress, rates):
    """Train and evaluate one epoch; its record."""
    options, started = run.options, time.monotonic()
    for group in optimizer.param_groups:
        group["lr"] = stage.lr
    torch.manual_seed(epoch_seed(options.seed, epoch) + distributed.rank())  # for nets with dropout
    progress.epoch(epoch, len(run.train), stage.lr)

    def on_batch(batch, counts, first_bad):
        if progress.due(batch):
            raise_if_bad(first_bad)
            progress.show(batch, counts.read())

    try:
        batches = run.train.train_epoch(epoch, rates)
        train = train_one_epoch(
            run.forward, batches, criterion, optimizer, len(run.class_counts), on_batch, run.precision
        )
    except NonFiniteLoss as bad:
        hint = (
            "a smaller --alpha (or --alpha auto), or a smaller --lr" if criterion.needs_features else "a smaller --lr"
        )
        raise NonFiniteLoss(f"the loss is not finite in epoch {epoch}, batch {bad}: try {hint}") from None
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UsageError(
            f"--batch-size {options.batch_size} leaves a last batch of one picture, which batch norm cannot take at "
            "this size of pictures: choose another"
        ) from None
    distributed.share_buffers(run.model)
    factor = train.pop("ib_factor")
    train["seconds"] = time.monotonic() - started
    evaluated = time.monotonic()
    test = evaluate(run.model, run.test.eval_epoch(), run.class_counts, run.precision)
    test["seconds"] = time.monotonic() - evaluated
    val = None
    if run.val is not None:
        val = evaluate(run.model, run.val.eval_epoch(), run.class_counts, run.precision)
        val.pop("confusion")
    alpha = float(criterion.alpha) if criterion.needs_features else None
    return {
        "epoch": epoch,
        "time": time.time(),
        "seconds": time.monotonic() - started,
        "stage": dataclasses.asdict(stage),
        "train": train,
        "test": {name: value for name, value in test.items() if name != "confusion"},
        "val": val,
        "score": val["class_mean"] if val else test["acc1"],
        "ib_factor": factor,
        "alpha": alpha,
    }


def _save(run, history, optimizer, criterion):
    """The newest checkpoint; beside it the best, and those asked for."""
    best = best_epoch(history)
    done = history[-1]["epoch"] + 1
    state = {
        "epoch": done,
        "arch": run.options.arch,
        "state_dict": run.model.state_dict(),
        "best_acc1": max(best["test"]["acc1"], run.start.best_acc1),
        "optimizer": optimizer.state_dict(),
        "criterion": criterion.state_dict(),
        "scaler": run.precision.state_dict(),
        "settings": run.info["settings"],
        "split_sha256": run.info["split"]["sha256"],
        "files_sha256": run.info["split"]["files_sha256"],
        "history": history,
    }
    names = [checkpoint.NEWEST]
    if best is history[-1] and best["test"]["acc1"] > run.start.best_acc1:
        names.append(checkpoint.BEST)
    keep = done in (run.options.start_ib_epoch, *run.options.keep_epochs)
    if keep:
        names.append(checkpoint.epoch_name(done))
    checkpoint.save(run.model_folder, reversed(names), state)  # the newest last: it says that the others are there
    best_path = os.path.join(run.model_folder, checkpoint.BEST)
    if keep and os.path.exists(best_path):
        checkpoint.copy(best_path, os.path.join(run.model_folder, checkpoint.best_name(done)))


def _line(record, history, epochs):
    test, best = record["test"], best_epoch(history)
    parts = [
        f"epoch {record['epoch'] + 1}/{epochs} done in {record['seconds']:.1f} s",
        f"{record['stage']['loss']} loss {record['train']['loss']:.4f}",
        f"test acc1 {test['acc1']:.2f} acc5 {test['acc5']:.2f}",
        f"many {shown(test['many'])} medium {shown(test['medium'])} few {shown(test['few'])}",
        f"best {best['test']['acc1']:.2f} (epoch {best['epoch'] + 1})",
    ]
    return "  ".join(parts)
