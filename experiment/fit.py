"""The epochs of a run: what each trains with, its record, the checkpoint after it."""

import dataclasses
import math
import sys
import time
from typing import Any

import torch

import models
from experiment import plots
from experiment.records import Progress, best_epoch, epoch_line
from experiment.run import Run
from imbalance import GROUP_RULE
from training import distributed
from training.cuda_graph import step_graph
from training.loop import NonFiniteLoss, evaluate, finite_figures, for_evaluation, train_one_epoch
from training.precision import Compiled, use_native_batch_norm
from training.recipe import Recipe, Stage
from utils import UsageError, duration, epoch_seed, format_metric, one_line, warn


def fit(
    run: Run,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    recipe: Recipe,
    train_batches: Any,
    test_batches: Any,
    val_batches: Any = None,
) -> list[dict]:
    """Train from where the run starts to the last epoch of the recipe; print the tables. Returns the history.

    Batches have `train_epoch(epoch, rates)`, `eval_epoch()` and `targets`, see loaders/.

    Raises:
        NonFiniteLoss: with the epoch and the batch. UsageError: a last batch that batch norm cannot take, or an
            operator that --deterministic cannot.
    """
    settings, epochs = run.settings, recipe.epochs
    if settings.batch_norm == "native":
        use_native_batch_norm(model)
    run.check_last_batch(model, train_batches)
    run.check_deterministic(model)
    if settings.gpu is not None and run.device.type == "cpu":
        _warn_of_cpu(run, model, recipe, test_batches, len(train_batches))
    side = settings.image_size or 32
    test_batches, val_batches = (b and for_evaluation(b, side) for b in (test_batches, val_batches))
    progress, trained, trains = Progress(epochs, settings.print_freq), model, None
    criterion = Criterion(recipe, run.class_counts, run.device, run.start.criterion)
    graph = step_graph(run.device, settings.amp, settings.cuda_graph)
    with run.recording():
        for epoch in range(run.start.epoch, epochs):
            started, stage = time.monotonic(), recipe.stage(epoch)
            if stage.trains == "head" and epoch == recipe.rule_start:
                _redraw_head(model, optimizer, epoch_seed(run.seed, epoch))
            if stage.trains != trains:
                trained, trains = _as_trained(model, stage.trains, settings), stage.trains
            torch.manual_seed(epoch_seed(run.seed, epoch) + distributed.rank())  # for models with dropout
            for group in optimizer.param_groups:
                group["lr"] = stage.lr
            current = criterion.of(stage)
            rates = recipe.sampling_rates(stage, run.class_counts)
            batches = train_batches.train_epoch(epoch, None if rates is None else rates[train_batches.targets.cpu()])
            progress.epoch(epoch, len(train_batches), stage.lr)
            train = _train(run, trained, batches, current, optimizer, progress, graph)
            distributed.broadcast_buffers(model)
            train["seconds"] = time.monotonic() - started
            tested = time.monotonic()
            test = evaluate(model, test_batches.eval_epoch(), run.class_counts, run.precision)
            test["seconds"] = time.monotonic() - tested
            val = val_batches and evaluate(model, val_batches.eval_epoch(), run.class_counts, run.precision)
            if not math.isfinite(test["loss"] + (val["loss"] if val else 0)):  # batch norm's first statistics may do it
                warn(f"after epoch {epoch + 1} the model has outputs that are not finite: its accuracy means nothing")
            record = _record(epoch, started, stage, current, train, test, val)
            run.save(record, model, optimizer, current)
            progress.done(record["seconds"], epoch_line(record, run.history, epochs))
    _report(run, model, test_batches)
    return run.history


class Criterion:
    """The criterion of each epoch; made anew where the loss or its class weights change.

    Args:
        state: of the same loss in the epoch before, from a checkpoint, or None.
    """

    def __init__(self, recipe: Recipe, class_counts: list[int], device: torch.device, state: dict | None) -> None:
        self.recipe, self.class_counts, self.device, self.state = recipe, class_counts, device, state
        self.stage: Stage | None = None
        self.module: Any = None

    def of(self, stage: Stage) -> Any:
        """The criterion of `stage`; other class weights keep the calibrated alpha."""
        before, self.stage = self.stage, stage
        if before is not None and (stage.loss, stage.class_weights) == (before.loss, before.class_weights):
            return self.module
        if before is not None:
            self.state = self.module.state_dict() if stage.loss == before.loss else None
        self.module = self.recipe.criterion(stage, self.class_counts)
        if self.state:
            self.module.load_state_dict(self.state)
        self.module = self.module.to(self.device)
        return self.module


def _redraw_head(model, optimizer, seed):
    """Give the model a head that has learnt nothing: weights from `seed`, momentum zero, the same on every rank."""
    head = model.get_submodule(models.last_linear(model))
    torch.manual_seed(seed)
    models.redraw(head)
    for parameter in head.parameters():
        for buffer in optimizer.state.get(parameter, {}).values():
            buffer.zero_()


def _as_trained(model, trains, settings):
    """What is trained, all or the head: gradients over all ranks, compiled if asked for. Its weights are `model`'s."""
    model = models.HeadOnly(model) if trains == "head" else model
    model = distributed.data_parallel(model, settings.sync_bn)
    return Compiled(model) if settings.compile else model


def _train(run, model, batches, criterion, optimizer, progress, graph):
    """`train_one_epoch` with progress lines; its errors name the epoch, the batch and a way out."""

    def on_batch(batch, metrics):
        if progress.due(batch):
            run.raise_write_error()
            progress.show(batch, finite_figures(metrics))

    classes = len(run.class_counts)
    try:
        return train_one_epoch(model, batches, criterion, optimizer, classes, run.precision, on_batch, graph)
    except NonFiniteLoss as bad:
        smaller = (
            "a smaller --alpha (or --alpha auto), or a smaller --lr" if criterion.needs_features else "a smaller --lr"
        )
        raise NonFiniteLoss(
            f"the loss is not finite in epoch {progress.number + 1}, batch {int(str(bad)) + 1}: try {smaller}"
        ) from None
    except (ValueError, RuntimeError) as error:
        raise _explained(error) or error from None


def _explained(error):
    """A UsageError for what a flag can mend; None for anything else."""
    text = str(error)
    is_compiler = type(error).__name__ in ("InvalidCxxCompiler", "InductorError", "BackendCompilerFailed")
    if is_compiler or "compiler" in text.lower():
        return UsageError(f"--compile needs a working compiler (g++ on a CPU, triton on a GPU): {text.splitlines()[0]}")
    return None


def _record(epoch, started, stage, criterion, train, test, val):
    factor = train.pop("ib_factor")
    return {
        "epoch": epoch,
        "time": time.time(),
        "seconds": time.monotonic() - started,
        "stage": dataclasses.asdict(stage),
        "train": train,
        "test": {name: value for name, value in test.items() if name != "confusion"},
        "val": val and {name: value for name, value in val.items() if name != "confusion"},
        "score": val["class_mean"] if val else test["acc1"],
        "ib_factor": factor,
        "alpha": float(criterion.current_alpha) if criterion.needs_features else None,
    }


def _warn_of_cpu(run, model, recipe, test_batches, batches):
    """There is no CUDA device: say how long the run will take. Three forward passes are timed; a step costs three."""
    images, _ = next(iter(test_batches.eval_epoch()))
    times = []
    model.eval()
    with torch.no_grad():
        for _ in range(3):
            started = time.monotonic()
            model(images)
            times.append(time.monotonic() - started)
    epoch = min(times) * (3 * batches + len(test_batches))
    left = duration(epoch * (recipe.epochs - run.start.epoch))
    warn(
        f"--gpu {run.settings.gpu}: there is no CUDA device, training on the CPU with {run.settings.threads} threads "
        f"takes about {duration(epoch)} an epoch, {left} (h:mm:ss) in all"
    )


# -------------------------------------------------------------------------------------------------- tables


def _report(run, model, test_batches):
    """The per-class table, best and last, and the figures."""
    best, last = best_epoch(run.history), run.history[-1]
    print_classes(run.class_names, run.class_counts, best["test"], last["test"])
    for name, record in (("best", best), ("last", last)):
        print(f"{name} (epoch {record['epoch'] + 1}): {summary_line(record['test'])}")
    print(f"({GROUP_RULE}; accuracies in percent of the test set)")
    final = evaluate(model, test_batches.eval_epoch(), run.class_counts, run.precision)
    if not distributed.is_main():
        return
    settings = run.settings
    written = plots.of_evaluation(final, run.class_names, run.class_counts, settings.log_folder, settings.name)
    written += plots.of_history(run.history, settings.start_ib_epoch, settings.log_folder, settings.name)
    print(f"logs: {settings.log_folder}; checkpoints: {settings.model_folder}; figures: {' '.join(written) or 'none'}")
    sys.stdout.flush()


def summary_line(test: dict) -> str:
    """The figures of a test, for people."""
    names = {
        "acc1": "top-1",
        "acc5": "top-5",
        "class_mean": "class mean",
        "many": "many",
        "medium": "medium",
        "few": "few",
    }
    return "  ".join(f"{title} {format_metric(test[name])}" for name, title in names.items())


#: Rows of the per-class table; of more classes the worst and the best are shown.
MOST_ROWS, SHOWN_OF_MANY = 200, 10


def print_classes(names: list[str], counts: list[int], *results: dict) -> None:
    """The per-class table: training images, and accuracy in the best and the last epoch."""
    rows = list(range(len(names)))
    if len(rows) > MOST_ROWS:
        last = results[-1]["per_class"]
        ranked = sorted((k for k in rows if last[k] is not None), key=lambda k: last[k])
        rows = [*ranked[:SHOWN_OF_MANY], *ranked[-SHOWN_OF_MANY:]]
        print(f"the {SHOWN_OF_MANY} worst and best of {len(names)} classes; all of them are in class_accuracy.csv")
    shown = {k: one_line(names[k]) for k in rows}
    width = max(len(name) for name in [*shown.values(), "class"])
    heads = ("best", "last")[: len(results)] if len(results) > 1 else ("acc",)
    print(f"{'class':<{width}}  {'train':>6}" + "".join(f"  {head:>6}" for head in heads))
    for k, name in shown.items():
        figures = "".join(f"  {format_metric(result['per_class'][k]):>6}" for result in results)
        print(f"{name:<{width}}  {counts[k]:>6}{figures}")
