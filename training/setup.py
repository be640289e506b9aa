"""From flags to a run: what every script does before the first epoch and after the last one."""

import contextlib
import copy
import json
import os
import sys
import time

import torch

import models
from imbalance import GROUP_RULE, count_classes, groups, hold_out, split_sha256
from training import checkpoint, distributed, plots
from training.folders import claimed
from training.loop import Run, evaluate, fit, make_optimizer
from training.options import dry_run, recipe_of, settings_of, store_name
from training.precision import Precision, set_determinism
from training.records import best_epoch, shown
from training.resume import Finished, clear, find_start, load_for_evaluation
from utils import DataError, UsageError, code_version, draw_seed, duration, files_sha256, one_line, versions, warn


def train_or_evaluate(options, load_data, build_model, make_batches):
    """Do what the completed options ask for: --dry_run, -e, or a run.

    Args:
        options: see options.py.
        load_data: (options) -> (training set, test set), with `.targets`, `.classes`, and `.chosen` of the first.
        build_model: (options) -> a net, initialised from torch's global generator.
        make_batches: (options, data set, positions or None, device) -> a batch source, see batches.py.
    """
    if options.dry_run:
        print(dry_run(options))
        return
    device = distributed.start(options.gpu)
    try:
        _train_or_evaluate(options, load_data, build_model, make_batches, device)
    except RuntimeError as error:
        if distributed.size() == 1 or not distributed.is_lost(error):
            raise
        raise DataError(f"another process of this job has ended ({str(error).splitlines()[0]})") from None
    finally:
        distributed.stop()


def _train_or_evaluate(options, load_data, build_model, make_batches, device):
    if options.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a CUDA device; --amp bf16 runs on the CPU too")
    if options.threads:
        torch.set_num_threads(options.threads)
    options.threads, options.processes = torch.get_num_threads(), distributed.size()
    set_determinism(options.deterministic)
    log_folder = os.path.join(options.root_log, store_name(options))
    model_folder = os.path.join(options.root_model, store_name(options))
    if options.evaluate:
        state = load_for_evaluation(options, model_folder)
        with distributed.main_first():
            data = load_data(options)
        _evaluate(options, state, data, build_model, make_batches, device, log_folder)
        return
    with claimed(log_folder, model_folder) if distributed.is_main() else contextlib.nullcontext():
        _go_on_after_restart(options, model_folder)
        try:
            start = find_start(options, log_folder, model_folder)
        except Finished:
            print(f"{log_folder} holds this run, finished: nothing to do (--overwrite runs it again)")
            return
        if options.seed is None:
            options.seed = distributed.agree(draw_seed())
        with distributed.main_first():
            data = load_data(options)
        run = _prepare(options, data, build_model, make_batches, device, start, log_folder, model_folder)
        distributed.wait_for_all()  # until every rank has read what rank 0 is about to write
        if options.overwrite and distributed.is_main():
            clear(log_folder, model_folder)
        if options.gpu is not None and device.type == "cpu" and distributed.is_main():
            _warn_of_cpu(run)
        _train(run)


def _go_on_after_restart(options, model_folder):
    """torchrun --max-restarts: the second try goes on from the checkpoint that the first one left."""
    if distributed.restarts() and checkpoint.exists(model_folder):
        options.resume, options.overwrite = "auto", False
        print("started again by torchrun: --resume auto", flush=True)


def _load_optimizer(optimizer, start):
    try:
        optimizer.load_state_dict(start.optimizer)
    except Exception as error:  # whatever a foreign state makes torch raise
        raise DataError(f"{start.path} does not fit this net's optimizer: {error}") from None


def _prepare(options, data, build_model, make_batches, device, start, log_folder, model_folder):
    """Build the Run, and print what it is."""
    train_set, test_set = data
    kept, held = hold_out(train_set.targets, options.val_fraction) if options.val_fraction else (None, None)
    targets = train_set.targets if kept is None else [train_set.targets[i] for i in kept]
    class_counts = count_classes(targets, options.num_classes)
    torch.manual_seed(options.seed)
    model = build_model(options).to(device, memory_format=torch.channels_last)
    if start.state_dict is not None:
        checkpoint.load_weights(model, start.state_dict, start.path)
    else:
        load_pretrained(options, model)
    optimizer = make_optimizer(model, options)
    if start.optimizer is not None:
        _load_optimizer(optimizer, start)
    split = {"sha256": split_sha256(train_set.chosen), "total": len(targets), "files_sha256": _files_sha256(data)}
    _check_images(start, split, options)
    info = {
        "name": store_name(options),
        "settings": settings_of(options),
        "versions": versions(),
        "code": code_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "parameters": sum(p.numel() for p in model.parameters()),
        "classes": list(train_set.classes),
        "class_counts": class_counts,
        "group_rule": GROUP_RULE,
        "split": split,
    }
    print_info(info, start)
    with distributed.main_first():
        batches = {
            "train": make_batches(options, train_set, kept, device),
            "test": make_batches(options, test_set, None, device),
            "val": make_batches(options, train_set, held, device) if held is not None else None,
        }
    return Run(
        options=options,
        recipe=recipe_of(options),
        model=model,
        optimizer=optimizer,
        precision=Precision(options.amp, device.type),
        **batches,
        class_counts=class_counts,
        class_names=list(train_set.classes),
        info=info,
        log_folder=log_folder,
        model_folder=model_folder,
        start=start,
    )


def _files_sha256(data):
    """Of the picture files of training and test; None for data in memory, of which torchvision checks the md5."""
    samples = [sample for part in data for sample in getattr(part, "samples", [])]
    return files_sha256(samples) if samples else None


def _check_images(start, split, options):
    """Refuse to go on with other images than those that the checkpoint was trained on, or with changed files."""
    if options.force:
        return
    if start.split_sha256 not in (None, split["sha256"]):
        raise DataError(
            f"{start.path} was trained on other images of {options.data_dir} (--force goes on all the same)"
        )
    if start.files_sha256 not in (None, split["files_sha256"]):
        raise DataError(
            f"the picture files in {options.data_dir} have changed since {start.path} was written: names, classes or "
            "sizes (--force goes on all the same)"
        )


def print_info(info, start):
    """What the run is, for people and logs."""
    counts, by_group = info["class_counts"], groups(info["class_counts"])
    print(f"run {info['name']}, seed {info['settings']['seed']}, on {info['device']}")
    print(f"class counts: {' '.join(map(str, counts))}, total {sum(counts)}")
    sizes = ", ".join(f"{name} {len(labels) or 'n/a'}" for name, labels in by_group.items())
    print(f"classes by group: {sizes} ({GROUP_RULE})")
    print(f"parameters: {info['parameters']:,}; sha256 of the chosen indices: {info['split']['sha256']}")
    print("versions: " + ", ".join(f"{name} {value}" for name, value in info["versions"].items()))
    if start.path is not None:
        print(f"goes on from {one_line(start.path)} after {start.epoch} epochs")
    sys.stdout.flush()


def _warn_of_cpu(run):
    """Say that there is no CUDA device, and how long the run will take: three steps on a copy are timed."""
    model = copy.deepcopy(run.model)
    optimizer = make_optimizer(model, run.options)
    images, target = next(iter(run.test.eval_epoch()))
    times = []
    for _ in range(3):
        started = time.monotonic()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images)[0], target).backward()
        times.append(time.monotonic() - started)
    # evaluation costs about a third of a training step for a batch
    epoch = min(times) * (len(run.train) + len(run.test) / 3)
    left = duration(epoch * (run.recipe.epochs - run.start.epoch))
    bar = "*" * 78
    lines = [
        f"WARNING: --gpu {run.options.gpu} was asked for, but there is no CUDA device here.",
        f"Training goes on on the CPU, with {run.options.threads} threads: about {duration(epoch)} an epoch,",
        f"{left} (h:mm:ss) for the run. Ctrl-C stops it; --resume auto goes on.",
    ]
    print("\n".join([bar, *(f"* {line}" for line in lines), bar]), file=sys.stderr, flush=True)


def _train(run):
    try:
        _report(run, fit(run))
    except KeyboardInterrupt as stop:
        newest = os.path.join(run.model_folder, checkpoint.NEWEST)
        hint = f"add --resume auto to go on from {newest}" if os.path.exists(newest) else "no epoch was finished"
        raise type(stop)(f": {hint}") from None


def _report(run, history):
    """The per-class table, best and last, and the figures."""
    best, last = best_epoch(history), history[-1]
    print_classes(run.class_names, run.class_counts, best["test"], last["test"])
    for name, record in (("best", best), ("last", last)):
        test = record["test"]
        print(
            f"{name} (epoch {record['epoch'] + 1}): top-1 {test['acc1']:.2f}  top-5 {test['acc5']:.2f}  "
            f"class mean {shown(test['class_mean'])}  many {shown(test['many'])}  medium {shown(test['medium'])}  "
            f"few {shown(test['few'])}"
        )
    print(f"({GROUP_RULE}; accuracies in percent of the test set)")
    final = evaluate(run.model, run.test.eval_epoch(), run.class_counts, run.precision)
    if not distributed.is_main():
        return
    written = plots.of_evaluation(final, run.class_names, run.class_counts, run.log_folder)
    written += plots.of_history(history, run.info["settings"], run.log_folder)
    print(f"logs: {run.log_folder}; checkpoints: {run.model_folder}; figures: {' '.join(written) or 'none'}")


def print_classes(names, counts, *results):
    """The per-class table: training images, and accuracy in the best and the last epoch."""
    names = [one_line(name) for name in names]
    width = max(len(name) for name in [*names, "class"])
    heads = ("best", "last")[: len(results)] if len(results) > 1 else ("acc",)
    print(f"{'class':<{width}}  {'train':>6}" + "".join(f"  {head:>6}" for head in heads))
    for label, name in enumerate(names):
        figures = "".join(f"  {shown(result['per_class'][label]):>6}" for result in results)
        print(f"{name:<{width}}  {counts[label]:>6}{figures}")


def _evaluate(options, state, data, build_model, make_batches, device, log_folder):
    """-e: the figures of a checkpoint, in log/<store_name>/evaluate."""
    train_set, test_set = data
    fraction = (state.get("settings") or {}).get("val_fraction", options.val_fraction)
    kept = hold_out(train_set.targets, fraction)[0] if fraction else range(len(train_set.targets))
    class_counts = count_classes([train_set.targets[i] for i in kept], options.num_classes)
    model = build_model(options).to(device, memory_format=torch.channels_last)
    checkpoint.load_weights(model, state["state_dict"], options.resume)
    with distributed.main_first():
        batches = make_batches(options, test_set, None, device)
    result = evaluate(model, batches.eval_epoch(), class_counts)
    if not distributed.is_main():
        return
    print_classes(train_set.classes, class_counts, result)
    line = "  ".join(
        f"{name} {shown(result[name])}" for name in ("acc1", "acc5", "class_mean", "many", "medium", "few")
    )
    print(f"{line}  loss {result['loss']:.4f} ({GROUP_RULE})")
    folder = os.path.join(log_folder, "evaluate")
    os.makedirs(folder, exist_ok=True)
    content = {"checkpoint": options.resume, "epoch": state.get("epoch"), "classes": list(train_set.classes), **result}
    text = json.dumps(content) + "\n"
    path = os.path.join(folder, "evaluation.json")
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
    written = plots.of_evaluation(result, train_set.classes, class_counts, folder)
    print(f"written: {' '.join([path, *written])}")


def check_num_classes(options, known):
    """Fill in --num_classes, or refuse one that contradicts the data."""
    if options.num_classes not in (None, known):
        raise UsageError(f"--num_classes {options.num_classes}: {options.dataset} has {known} classes")
    options.num_classes = known


def load_pretrained(options, model):
    """--pretrained: start from ImageNet's weights, or from those of a file; in place.

    The nets of ImageNet keep their own last layer where the weights have one of another form.
    """
    new_head = None if options.arch in models.CIFAR_NETS else models.last_linear(model)
    if options.pretrained == "imagenet":
        weights = models.imagenet_weights(options.arch)
        checkpoint.load_weights(model, weights, "the file of ImageNet's weights", new_head)
    elif options.pretrained == "published":
        warn("there are no published weights for these nets: --pretrained without a PATH changes nothing")
    elif options.pretrained:
        weights = checkpoint.load(options.pretrained, bare=True)["state_dict"]
        checkpoint.load_weights(model, weights, options.pretrained, new_head)
