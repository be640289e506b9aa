"""Plant one fault at a time in a copy of the repository, and see whether a test fails.

    python tests/faults/planted.py
    python tests/faults/planted.py --only 7 12

Prints a table of what was caught and what was missed; the status is 1 if a fault was missed. Each fault has the test
that should fail. First every test must pass without a fault. `tests/unit/test_planted.py` sees to it that the text of
each fault is in its file: change it with the code.
"""

# ruff: noqa: E501  (the text of a fault is the code's)

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
#: Then the test is stopped, and the fault counts as missed.
SECONDS = 300
#: pytest's exit status where a test fails.
FAILED = 1

LOSSES, FORMS, RECIPE = "tests/unit/test_losses.py", "tests/unit/test_loss_forms.py", "tests/unit/test_recipe.py"
IMBALANCE, MEMORY, FILES = (
    "tests/unit/test_imbalance.py",
    "tests/unit/test_in_memory.py",
    "tests/unit/test_image_batches.py",
)
RESUME, OTHER = "tests/cli/test_resume.py", "tests/cli/test_other_run.py"
RECORDS, METRICS, OPTIMIZER = "tests/cli/test_records.py", "tests/unit/test_metrics.py", "tests/unit/test_optimizer.py"
STATISTICS, REPORT, GRADIENTS = (
    "tests/unit/test_statistics.py",
    "tests/unit/test_report.py",
    "tests/unit/test_gradients.py",
)
CHECKPOINTS, EMA, REGISTRY = (
    "tests/faults/test_checkpoints.py",
    "tests/unit/test_ema_mixup.py",
    "tests/unit/test_registry.py",
)
STOPPED = f"{RESUME}::test_a_run_broken_off_in_any_epoch_is_resumed_to_the_same_end"
KINDS = f"{RESUME}::test_every_kind_of_run_is_resumed_to_the_same_end"

#: (what is wrong, file, text there, text planted, test that should fail)
FAULTS = [
    # losses
    ("detach does nothing", "losses.py", "factor.detach() if self.detach else", "factor if self.detach else", LOSSES),
    ("detached always", "losses.py", "factor.detach() if self.detach else factor", "factor.detach()", LOSSES),
    ("epsilon left out", "losses.py", "self.raw_features) + epsilon)", "self.raw_features))", LOSSES),
    ("IB mean over weights", "losses.py", "needs_features = True\n    divides_by_weights = False",
     "needs_features = True", LOSSES),
    ("class weights of IB left out", "losses.py", "loss = _cross_entropy(logits, target)\n        return loss if weight is"
     " None else", "loss = _cross_entropy(logits, target)\n        return loss if True else", LOSSES),
    ("weights sum to 1", "losses.py", "* int((weights > 0).sum())).float()", ").float()", LOSSES),
    ("weights by sqrt(n)", "losses.py", "_sum_to_k(1.0 / counts.where", "_sum_to_k(1.0 / counts.sqrt().where", LOSSES),
    ("focal: p without its weight", "losses.py", "self.scale * (_focal_factor(ce,", "self.scale * (_focal_factor(ce / 2,",
     LOSSES),
    ("LDAM: margins by n ** -0.5", "losses.py", '** -0.25\n', '** -0.5\n', LOSSES),
    ("LDAM: margin added", "losses.py", "self.s * (logits - _prob", "self.s * (logits + _prob", LOSSES),
    ("VS: scale inverted", "losses.py", "(counts / counts.max()) ** gamma", "(counts.max() / counts) ** gamma", LOSSES),
    ("soft targets: CE under the factor", "losses.py", "loss = F.kl_div(F.log_softmax(logits, 1), target, reduction="
     '"none").sum(1)', "loss = -(F.log_softmax(logits, 1) * target).sum(1)", FORMS),
    ("ignored samples count", "losses.py", "count.where(kept, 0.0)", "count", FORMS),
    ("losses under autocast", "losses.py", "torch.autocast(logits.device.type, enabled=False):\n            logits, target,"
     " weight, kept = self._checked(logits, target)\n            loss, factor",
     "torch.autocast(logits.device.type, enabled=torch.is_autocast_enabled('cpu')):\n            logits, target, weight,"
     " kept = self._checked(logits, target)\n            loss, factor", LOSSES),
    ("half precision not widened", "losses.py", "x.float() if x.dtype in", "x if x.dtype in", LOSSES),
    ("calibration never ends", "losses.py", "(self.sums[2] < self.AUTO_BATCHES) & ", "", FORMS),
    # recipe
    ("IB one epoch late", "training/recipe.py", "epoch >= self.settings.start_ib_epoch", "epoch > self.settings.start_ib_epoch", RECIPE),
    ("milestones one epoch late", "training/recipe.py", "if epoch >= milestone", "if epoch > milestone", RECIPE),
    ("warm-up from 0", "training/recipe.py", "lr * (epoch + 1) / self", "lr * epoch / self", RECIPE),
    ("warm-up one epoch longer", "training/recipe.py", "epoch < self.settings.warmup_epochs", "epoch <= self.settings.warmup_epochs", RECIPE),
    ("lr of the IB phase as before", "training/recipe.py", "if in_ib_phase:\n            lr *= self.settings.ib_lr_factor",
     "if in_ib_phase:\n            lr *= 1", RECIPE),
    ("weights in phase one", "training/recipe.py", 'loss, weights = "CE", "none"', 'loss = "CE"', RECIPE),
    ("DRW one epoch early", "training/recipe.py", "epoch >= self.rule_start\n", "epoch + 1 >= self.rule_start\n", RECIPE),
    ("CB and IB weights swapped", "training/registry.py", "losses.inverse_frequency_weights(counts),\n}",
     "losses.effective_number_weights(counts),\n}", REGISTRY),
    # splits
    ("counts rounded", "imbalance.py", "int(n_max * factor ** (k", "round(n_max * factor ** (k", IMBALANCE),
    ("classes reversed", "imbalance.py", "for label in range(len(counts))]\n    for", "for label in range(len(counts))][::-1]"
     "\n    for", IMBALANCE),
    ("step: head rounded down", "imbalance.py", "(classes + 1) // 2", "classes // 2", IMBALANCE),
    ("left out: images that are kept", "imbalance.py", "indices[n : n + limit]", "indices[:limit]", IMBALANCE),
    ("held out: in training too", "imbalance.py", "np.setdiff1d(np.arange(len(targets)), validation), validation",
     "np.arange(len(targets)), validation", IMBALANCE),
    ("few: 20 too", "imbalance.py", "count < FEW_UNDER", "count <= FEW_UNDER", IMBALANCE),
    # sampler and loaders
    ("sampling without rates", "loaders/__init__.py", "torch.multinomial(rates,", "torch.multinomial(torch.ones(n),", MEMORY),
    ("drawn without replacement", "loaders/__init__.py", "n, replacement=True", "n, replacement=False", MEMORY),
    ("every epoch alike", "utils.py", "SeedSequence([seed, epoch])", "SeedSequence([seed, 0])", MEMORY),
    ("digits are mirrored", "imbalance_cifar.py", "flip = False", "flip = True", MEMORY),
    ("crops are never shifted", "loaders/in_memory.py", "0, 2 * self.padding + 1,", "self.padding, self.padding + 1,", MEMORY),
    ("evaluation is augmented", "loaders/in_memory.py", "yield self._normalised(self.images[batch])",
     "yield self._normalised(self.images[batch].flip(2))", MEMORY),
    ("files: evaluation is augmented", "loaders/image_folder.py", "self.evaluate(image) if seed is None else",
     "self.train(image) if seed is None else", FILES),
    ("files: targets in another order", "loaders/image_folder.py", "self.targets[order.to(", "self.targets[order.sort()[0].to(",
     FILES),
    # resume, forks, checkpoints
    ("momentum is not restored", "training/optimizer.py", 'torch.empty_like(parameter).copy_(value)',
     'torch.zeros_like(parameter)', OPTIMIZER),
    ("optimizer is not loaded", "experiment/run.py", "part.load_state_dict(state)", 'name == "optimizer" or'
     " part.load_state_dict(state)", STOPPED),
    ("EMA is not loaded", "experiment/run.py", "part.load_state_dict(state)", 'name == "ema" or part.load_state_dict(state)',
     KINDS),
    ("criterion is not loaded", "training/stages.py", "self._state = state\n", "pass\n", KINDS),
    ("resumes one epoch late", "experiment/run.py", "range(self.start.epoch, self.settings.epochs)",
     "range(self.start.epoch + (self.start.epoch > 0), self.settings.epochs)", STOPPED),
    ("fork: recipes are not compared", "experiment/compare.py", "for epoch in range(epochs):", "for epoch in range(0):", OTHER),
    ("fork: settings are not compared", "experiment/compare.py", "in found if text", "in found[1:] if text", OTHER),
    ("checkpoint written in place", "files.py", 'os.path.join(folder, f".{name}.{os.getpid()}{TEMPORARY}")',
     "os.fspath(path)", CHECKPOINTS),
    ("sums are not checked", "experiment/checkpoint.py", "            _check_sums(path)\n", "", CHECKPOINTS),
    ("checkpoint not copied", "experiment/checkpoint.py", 'value.detach().to("cpu", copy=True)', "value.detach()", CHECKPOINTS),
    # evaluation, metrics
    ("EMA: raw weights are tested", "cifar_train.py", "tested = ema.module if ema else model", "tested = model", RECORDS),
    ("EMA: decay inverted", "training/ema.py", "floats, 1 - self.decay)", "floats, self.decay)", EMA),
    ("mixup: labels shared otherwise", "training/mixup.py", "torch.lerp(soft[other], soft, share)",
     "torch.lerp(soft, soft[other], share)", EMA),
    ("class mean over images", "training/metrics.py", "sum(values) / len(values) if values",
     "sum(values) / len(per_class) if values", METRICS),
    ("IB factor of a class: sum", "training/metrics.py", "[s / n if n else None", "[s if n else None", METRICS),
    ("groups of test images", "training/metrics.py", "groups(counts)[name]",
     "groups([max(counts)] * len(counts))[name]", METRICS),
    ("one lr for all groups", "training/stages.py", 'stage.lr * group.get("lr_scale", 1.0)', "stage.lr", OPTIMIZER),
    ("EMA: a new head keeps its average", "training/stages.py", "        ema.restart()", "        pass", OPTIMIZER),
    ("what groups count is lost", "training/optimizer.py", "if name not in kept", "if False",
     OPTIMIZER),
    ("a new flag goes unnoticed", "experiment/settings.py", "{*READS, *all_constants(),", "{*fields_affecting('schedule'),",
     "tests/cli/test_extending.py"),
    ("evaluation in training mode", "training/loop.py", "    model.eval()\n", "    model.train()\n", METRICS),
    ("validation images in training", "experiment/data.py", "train_set, val_set = train_set.hold_out(", "_, val_set ="
     " train_set.hold_out(", RECORDS),
    ("test set chooses beside a validation set", "experiment/run.py", 'val["class_mean"] if val else test["acc1"]',
     'test["acc1"]', RECORDS),
    # gradients, statistics, report, driver
    ("gradient ratio inverted", "training/gradients.py", "criterion.auto_ratio * ce / at_one)", "criterion.auto_ratio * at_one"
     " / ce)", GRADIENTS),
    ("the model itself is measured", "training/gradients.py", "copy.deepcopy(model).train()", "model.train()", GRADIENTS),
    ("spread over n", "paper/statistics.py", "ddof=1", "ddof=0", STATISTICS),
    ("Holm: no multiplier", "paper/statistics.py", "((size or len(order)) - rank) * ps[i]", "ps[i]", STATISTICS),
    ("equivalence at 95 %", "paper/statistics.py", "(LEVEL, 2 * level)]", "(LEVEL, level)]", STATISTICS),
    ("posthoc LA: sign", "experiment/evaluation.py", "head.bias.sub_(tau", "head.bias.add_(tau", "tests/cli/test_evaluation.py"),
    ("predictions shift after a damaged image", "experiment/predict.py", "k, values, labels in zip(whole,",
     "k, values, labels in zip(part,", "tests/cli/test_production.py"),
    ("iNaturalist: classes in another order", "imbalance_inat.py", "enumerate(sorted(names))",
     "enumerate(sorted(names, reverse=True))", "tests/cli/test_inat_train.py"),
    ("plateau: last fifth", "experiment/records.py", "+ 1) // 10) :]", "+ 1) // 5) :]", REPORT),
    ("all runs on the first card", "paper/executors.py", "min(self.cards, key=lambda card: taken[card])", "self.cards[0]",
     "tests/unit/test_executors.py"),
]  # fmt: skip


def is_caught(fault, folder, log):
    """Whether the fault's test fails in `folder`, a copy of the repository; the copy is as before afterwards."""
    _, name, old, new, test = fault
    path = folder / name
    kept = path.read_text()
    path.write_text(kept.replace(old, new))
    try:
        return status_of(test, folder, log) == FAILED
    finally:
        path.write_text(kept)


def status_of(test, folder, log):
    """pytest's exit status for the test in `folder`; 124 where `timeout` stopped it, with all that it had started."""
    command = ["timeout", str(SECONDS), sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test]
    return subprocess.run(command, cwd=folder, stdout=log, stderr=log).returncode


def copy_of_repository(folder):
    """Copy the files that git knows or would add to `folder`."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (REPOSITORY / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, folder / name)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, nargs="+", metavar="N", help="numbers of faults, from 1 (default: all)")
    options = parser.parse_args(argv)
    chosen = options.only or range(1, len(FAULTS) + 1)
    os.environ.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", MPLBACKEND="Agg")
    missed = 0
    print("| n | fault | file | test | |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary, open(os.path.join(temporary, "log"), "wb") as log:
        folder = pathlib.Path(temporary) / "copy"
        copy_of_repository(folder)
        for test in dict.fromkeys(FAULTS[number - 1][-1] for number in chosen):
            status = status_of(test, folder, log)
            if status != 0:
                sys.exit(f"{test} does not pass without a fault: status {status}")
        for number in chosen:
            what, name, _, _, test = FAULTS[number - 1]
            caught = is_caught(FAULTS[number - 1], folder, log)
            missed += not caught
            print(f"| {number} | {what} | {name} | {test} | {'caught' if caught else 'missed'} |", flush=True)
    print(f"\n{len(chosen) - missed} of {len(chosen)} caught")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
