"""-e: what a checkpoint reaches on the test set; post-hoc corrections; logits and calibration."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import models
from experiment import plots
from experiment.records import csv_text, to_json
from experiment.run import Run
from experiment.screen import print_classes, summary_line
from files import write_atomically, write_text
from imbalance import GROUP_RULE
from losses import log_prior
from training import distributed
from training.loop import evaluate
from training.metrics import group_accuracy
from training.precision import Precision
from utils import DataError, UsageError, format_metric

#: What -e writes: a folder below the run's logs, in it the file of --save_logits, and the test images it got wrong.
EVALUATION, LOGITS, ERRORS = "evaluate", "logits.npz", "errors.csv"
#: Equal bins of the confidence, of the expected calibration error.
BINS = 15


def evaluate_checkpoint(
    run: Run, model: torch.nn.Module, test_batches: Any, val_batches: Any, precision: Precision
) -> dict:
    """Print the figures of a restored model and write them to log/<its name>/evaluate. Returns them.

    Those of a correction go to a folder of their own in there, `posthoc_la_1` for example.

    The flags of CORRECTIONS take one value; of several the one with the best class mean on the held-out part.

    Raises:
        UsageError: several values without a held-out part. DataError: weights that do not fit, logits that are not
            finite.
    """
    settings = run.settings
    correction = correct_head(run, model, val_batches, precision)
    logits, target = collect_logits(model, test_batches, precision)
    if not logits.isfinite().all():
        raise DataError(f"{run.start.path} gives logits that are not finite: its weights, or the correction, are bad")
    result = _evaluate_logits(logits.to(run.device), target.to(run.device), run.class_counts, test_batches.batch_size)
    if not distributed.is_main():
        return result
    print_classes(run.data.class_names, run.class_counts, result)
    ece = f"  calibration error {result['calibration_error']:.2f}"
    print(f"{summary_line(result)}  loss {result['loss']:.4f}{ece} ({GROUP_RULE})")
    folder = output_folder(run, EVALUATION, correction)
    where = {"checkpoint": run.start.path, "epoch": run.start.epoch, **correction, "data_dir": settings.data_dir}
    path = os.path.join(folder, "evaluation.json")
    write_text(path, to_json({**where, "classes": run.data.classes, **result}))
    written = [path, *plots.of_evaluation(result, run.data.class_names, run.class_counts, folder, settings.name)]
    written += plots.of_calibration(result["calibration"], folder, settings.name)
    files = [os.path.relpath(path, settings.data_dir) if os.sep in path else path for path in run.data.test_files]
    written.append(os.path.join(folder, ERRORS))
    write_text(written[-1], _errors(logits, target, files, run.data.class_names))
    if settings.save_logits:
        written.append(os.path.join(folder, LOGITS))
        rows: dict[str, Any] = {"logits": logits.float().numpy(), "target": target.numpy()}
        rows |= {"files": np.array(files), "classes": np.array(run.data.class_names)}
        write_atomically(written[-1], lambda file: np.savez(file, **rows))
    print(f"written: {' '.join(written)}")
    return result


def output_folder(run: Run, name: str, correction: Mapping[str, float]) -> str:
    """The folder `name` of a checkpoint's logs, made; of a correction one below it.

    The logs are those of the checkpoint's run, or, where its folders were renamed, those named as its folder.
    """
    settings, path = run.settings, os.path.abspath(str(run.start.path))
    logs = os.path.join(settings.root_log, os.path.basename(os.path.dirname(path)))
    if not os.path.isdir(logs):
        logs = settings.log_folder
    folder = os.path.join(logs, name, *(f"{flag}_{value:g}" for flag, value in correction.items()))
    os.makedirs(folder, exist_ok=True)
    return folder


def _errors(logits, target, files, class_names):
    """CSV text: the images taken for another class, the one most believed in first."""
    probability, predicted = logits.double().softmax(1).max(1)
    order = probability.argsort(descending=True, stable=True)
    wrong = order[predicted[order] != target[order]].tolist()
    rows = [
        (files[i], class_names[target[i]], class_names[predicted[i]], f"{probability[i].item():.4f}") for i in wrong
    ]
    return csv_text([("file", "class", "predicted", "probability"), *rows])


@torch.no_grad()
def collect_logits(model: torch.nn.Module, batches: Any, precision: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K) and targets (N,) of every image, in order, on the CPU; with ranks, of all of them on rank 0's.

    Every rank sees its slice of each batch; the slices are put together in the order of the batches.
    """
    model.eval()
    parts = []
    for images, target in batches.eval_epoch():
        if len(target):
            with precision.autocast():
                logits, _ = model(images)
            parts.append((logits.float().cpu(), target.cpu()))
        else:
            parts.append((None, target.cpu()))
    if distributed.world_size() > 1:
        ranks = distributed.gather(parts)
        parts = [part for batch in zip(*ranks, strict=True) for part in batch]
    parts = [part for part in parts if part[0] is not None]
    return torch.cat([logits for logits, _ in parts]), torch.cat([target for _, target in parts])


def _evaluate_logits(logits, target, class_counts, batch_size):
    """As `loop.evaluate`, and the calibration. On a CPU in training's batches: the loss is the recorded one to the bit.

    Every rank has the logits of all images: rank 0 counts them.
    """
    batches = list(zip(logits.split(batch_size), target.split(batch_size), strict=True))
    result = evaluate(_Given().to(logits.device), batches if distributed.is_main() else [], class_counts)
    calibration = reliability(logits, target)
    return {**result, "calibration": calibration, "calibration_error": expected_calibration_error(calibration)}


class _Given(torch.nn.Module):
    """A model whose input is its logits."""

    def __init__(self):
        super().__init__()
        self.on = torch.nn.Parameter(torch.zeros(()))

    def forward(self, logits):
        return logits, logits


def reliability(logits: torch.Tensor, target: torch.Tensor, bins: int = BINS) -> list[dict[str, float | int | None]]:
    """Confidence against accuracy, in `bins` equal bins of the largest probability (Guo et al., ICML 2017).

    Returns:
        a dict(images, confidence, accuracy) a bin; the last two in percent, None in an empty bin.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    hit = (predicted == target).double()
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    rows = []
    for k in range(bins):
        inside = index == k
        n = int(inside.sum())
        means = [100 * part[inside].mean().item() if n else None for part in (confidence, hit)]
        rows.append({"images": n, "confidence": means[0], "accuracy": means[1]})
    return rows


def expected_calibration_error(rows: Sequence[dict]) -> float:
    """Mean |accuracy - confidence| over the images, in percent points, from `reliability`."""
    total = sum(row["images"] for row in rows)
    return sum(row["images"] * abs(row["accuracy"] - row["confidence"]) for row in rows if row["images"]) / total


# ------------------------------------------------------------------------------------- post-hoc corrections


def correct_head(run: Run, model: torch.nn.Module, val_batches: Any, precision: Precision) -> dict[str, float]:
    """Apply one of CORRECTIONS to the head of `model`. Returns what was applied, for the record."""
    settings = run.settings
    name = next((name for name in CORRECTIONS if getattr(settings, name)), None)
    if name is None:
        return {}
    values, apply = getattr(settings, name), CORRECTIONS[name]
    head: Any = model.get_submodule(models.head_name(model))
    if getattr(head, "bias", None) is None:
        raise UsageError(f"--{name} needs a linear layer with a bias: this model has LDAM's normalised head")
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()

    def correct(value):
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            apply(head, value, run.class_counts)

    if len(values) > 1:
        if val_batches is None:
            raise UsageError(
                f"--{name} with several values needs a part of --val_fraction that is held out beside the test images"
            )
        scores = {}
        for value in values:
            correct(value)
            logits, target = collect_logits(model, val_batches, precision)
            scores[value] = _class_mean(logits, target, run.class_counts)
            print(f"--{name} {value:g}: class mean {format_metric(scores[value])} on the held-out part")
        values = (max(scores, key=lambda value: scores[value]),)
    correct(values[0])
    print(f"--{name} {values[0]:g} applied")
    return {name: values[0]}


def _class_mean(logits, target, class_counts):
    hit, classes = (logits.argmax(1) == target).double(), len(class_counts)
    per_class = [100 * hit[target == k].mean().item() if (target == k).any() else None for k in range(classes)]
    return group_accuracy(per_class, class_counts)["class_mean"]


def adjust_logits(head: torch.nn.Linear, tau: float, class_counts: Sequence[int]) -> None:
    """Post-hoc logit adjustment: logits - tau * log prior (Menon et al., ICLR 2021, eq. 9), in the bias, in place."""
    head.bias.sub_(tau * log_prior(class_counts).to(head.bias))


def normalise_weights(head: torch.nn.Linear, tau: float, class_counts: Sequence[int]) -> None:
    """w_k / |w_k| ** tau, the bias as it is (what BagofTricks-LT calls tau-normalisation), in place."""
    head.weight.div_(head.weight.norm(dim=1, keepdim=True) ** tau)


def normalise_classes(head: torch.nn.Linear, tau: float, class_counts: Sequence[int]) -> None:
    """tau-normalisation: w_k / |w_k| ** tau, without bias (Kang et al., ICLR 2020, eq. 5 and Section 4.2), in place."""
    normalise_weights(head, tau, class_counts)
    head.bias.zero_()


#: The post-hoc corrections by their flag.
CORRECTIONS = {"posthoc_la": adjust_logits, "tau_norm": normalise_classes, "tau_norm_bias": normalise_weights}
