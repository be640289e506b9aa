"""-e: what a checkpoint reaches on the test set; post-hoc corrections; logits and calibration."""

import itertools
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import models
from experiment import checkpoint, plots
from experiment.records import csv_text, to_json
from experiment.run import Run
from experiment.screen import print_classes, summary_line
from files import write_atomically, write_text
from imbalance import GROUP_RULE
from losses import log_prior
from training import distributed
from training.loop import evaluate
from training.precision import Precision
from training.registry import LOSSES, RULES
from utils import DataError, UsageError, format_metric, warn

#: Equal bins of the confidence, of the expected calibration error.
BINS = 15


def evaluate_checkpoint(
    run: Run, model: torch.nn.Module, test_batches: Any, val_batches: Any, precision: Precision
) -> dict:
    """Print the figures of a restored model, write them to log/<its name>/evaluate (see `output_folder`), return them.

    Where the images, of training or test, are not the run's, they go to a folder below it, see `path_name`.

    The flags of CORRECTIONS take one value; of several the one with the best class mean on the held-out part.

    Raises:
        UsageError: several values without a held-out part. DataError: weights that do not fit, logits that are not
            finite.
    """
    settings = run.settings
    correction, seen = correct_head(run, model, val_batches, precision), []
    result = evaluate(model, test_batches.eval_epoch(), run.class_counts, precision, seen)
    logits, target = _of_all_ranks(seen)
    check_finite(run, logits)
    scaled = settings.logit_scale * logits
    calibration = reliability(scaled, target)
    result |= {"calibration": calibration, "calibration_error": expected_calibration_error(calibration)}
    if not distributed.is_main():
        return result
    print_classes(run.data.class_names, run.class_counts, result)
    ece = f"  calibration error {result['calibration_error']:.2f}"
    print(f"{summary_line(result)}  loss {result['loss']:.4f}{ece} ({GROUP_RULE})")
    state, tested = run.start.checkpoint, {name: getattr(settings, name) for name in ("data_dir", "val_list")}
    others = state.get("files_sha256") not in (None, run.data.files_sha256)
    below = path_name(settings.val_list or settings.data_dir) if others else ""
    folder = output_folder(run, os.path.join("evaluate", below), correction)
    forced = [*state.get("forced", ()), *run.forced]
    where = {"checkpoint": run.start.path, "epoch": run.start.epoch, **correction, **tested, "forced": forced}
    path = os.path.join(folder, "evaluation.json")
    write_text(path, to_json({**where, "classes": run.data.classes, **result}))
    written = [path, *plots.of_evaluation(result, run.data.class_names, run.class_counts, folder, settings.name)]
    files = [os.path.relpath(path, settings.data_dir) if os.sep in path else path for path in run.data.test_files]
    written.append(os.path.join(folder, "errors.csv"))
    write_text(written[-1], _errors(scaled, target, files, run.data.class_names))
    if settings.save_logits:
        written.append(os.path.join(folder, "logits.npz"))
        rows: dict[str, Any] = {"logits": logits.float().numpy(), "target": target.numpy()}
        rows |= {"files": np.array(files), "classes": np.array(run.data.class_names)}
        write_atomically(written[-1], lambda file: np.savez(file, **rows))
    print(f"written: {' '.join(written)}")
    return result


def output_folder(run: Run, name: str, correction: Mapping[str, float]) -> str:
    """The folder `name` of a checkpoint's logs, made; one below it for any but the newest checkpoint (ckpt.best, say),
    and for a correction.

    The logs are those of the checkpoint's run, or, where its folders were renamed, those named as its folder.
    """
    settings, path = run.settings, os.path.abspath(str(run.start.path))
    logs = os.path.join(settings.root_log, os.path.basename(os.path.dirname(path)))
    if not os.path.isdir(logs):
        logs = settings.log_folder
    file = os.path.basename(path)
    below = [] if file == checkpoint.NEWEST else [file.removesuffix(".pth.tar")]
    below += [f"{flag}_{value:g}" for flag, value in correction.items()]
    folder = os.path.join(logs, name, *below)
    os.makedirs(folder, exist_ok=True)
    return folder


def check_finite(run: Run, logits: torch.Tensor) -> None:
    """Raise DataError for logits that are not finite."""
    if not logits.isfinite().all():
        raise DataError(f"{run.start.path} gives logits that are not finite: check its weights and the correction")


def path_name(path: str) -> str:
    """A file's name for a path: a/test and b/test are a__test and b__test.

    The path is relative to the working folder, of images outside of it absolute.
    """
    path = os.path.abspath(path)
    here = os.path.join(os.getcwd(), "")
    name = path.removeprefix(here).strip(os.sep).replace(os.sep, "__").replace(":", "")  # Windows' D:
    return os.fsencode(name)[-200:].decode(errors="ignore")  # a file's name has at most 255 bytes


def _errors(logits, target, files, class_names):
    """CSV text of the misclassified images, sorted by falling probability of the predicted class."""
    probability, predicted = logits.double().softmax(1).max(1)
    order = probability.argsort(descending=True, stable=True)
    wrong = order[predicted[order] != target[order]].tolist()
    rows = [(files[i], class_names[target[i]], class_names[predicted[i]], f"{probability[i]:.4f}") for i in wrong]
    return csv_text([("file", "class", "predicted", "probability"), *rows])


def _of_all_ranks(parts):
    """Logits (N, K) and targets (N,) in the order of the data set, from each rank's slices of the batches."""
    batches = itertools.zip_longest(*distributed.gather(parts))  # ranks without images in the last batch have one less
    logits, target = zip(*(part for batch in batches for part in batch if part is not None), strict=True)
    return torch.cat(logits), torch.cat(target)


def reliability(logits: torch.Tensor, target: torch.Tensor, bins: int = BINS) -> list[dict[str, float | int | None]]:
    """Confidence against accuracy, in `bins` equal bins of the largest probability (Guo et al., ICML 2017).

    Returns:
        dict(images, confidence, accuracy) for each bin; the last two in percent, None in an empty bin.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    each = torch.stack([torch.ones_like(confidence), 100 * confidence, 100 * (predicted == target).double()])
    sums = each.new_zeros(3, bins).index_add_(1, index, each).T.tolist()
    return [
        {"images": int(n), "confidence": c / n if n else None, "accuracy": a / n if n else None} for n, c, a in sums
    ]


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
        raise UsageError(f"--{name} needs a linear layer with a bias, and this model's has none")
    weight, bias = head.weight.detach().clone(), head.bias.detach().clone()

    def correct(value):
        with torch.no_grad():
            head.weight.copy_(weight)
            head.bias.copy_(bias)
            apply(head, value, run.class_counts)

    rule = RULES[settings.train_rule]
    is_corrected = LOSSES[settings.loss_type].corrects_prior or (rule.class_weights, rule.sampler) != ("none", "none")
    if name == "posthoc_la" and is_corrected:
        method = f"--loss_type {settings.loss_type} --train_rule {settings.train_rule}"
        warn(f"--posthoc_la: {method} has corrected for rare classes already, and the prior counts twice")
    if len(values) > 1:
        if settings.predict:
            raise UsageError(f"--{name} takes one value with --predict: -e without --predict finds the best of several")
        if val_batches is None or settings.val_left_out:  # left-out images lack the largest class
            raise UsageError(
                f"--{name} with several values needs images held out by --val_fraction, apart from the test images"
            )
        scores = {}
        for value in values:
            correct(value)
            scores[value] = evaluate(model, val_batches.eval_epoch(), run.class_counts, precision)["class_mean"]
            print(f"--{name} {value:g}: class mean {format_metric(scores[value])} on the held-out part")
        values = (max(scores, key=lambda value: scores[value]),)
    correct(values[0])
    print(f"--{name} {values[0]:g} applied")
    return {name: values[0]}


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
