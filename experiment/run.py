"""The open run: device, ranks, folders and their lock, where it starts; what it is; its checkpoints and records."""

import concurrent.futures
import contextlib
import copy
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import models
from experiment import checkpoint, provenance
from experiment.records import Records, best_epoch
from experiment.resume import ResumeState, clear, find_start, load_for_evaluation, read_inherited, take_over
from experiment.settings import Settings, recorded
from files import files_sha256, run_lock, write_text
from imbalance import GROUP_RULE, count_classes, groups, split_sha256
from loaders import batch_slices
from training import distributed, optimizer
from training.precision import Precision, set_determinism
from utils import DataError, NothingToDo, UsageError, draw_seed, named, one_line, warn


@contextlib.contextmanager
def open_run(settings: Settings) -> Iterator["Run"]:
    """Join the ranks, choose the device, lock the folders, and find where the run starts.

    The Run's settings are complete: the seed is drawn or the checkpoint's, threads and ranks are counted; with -e data,
    model and method are the checkpoint's.

    Raises:
        UsageError, DataError: see `resume.find_start`, `files.run_lock`, `utils.choose_device`.
    """
    device = distributed.start(settings.gpu)
    try:
        settings = _prepared(settings, device)
        if settings.evaluate:
            settings, path, state = load_for_evaluation(settings)
            start = ResumeState(
                state.get("epoch", 0),
                state_dict=state["state_dict"],
                path=path,
                split_sha256=state.get("split_sha256"),
                files_sha256=state.get("files_sha256"),
                classes=state.get("classes"),
                class_counts=state.get("class_counts"),
            )
            yield Run(settings, device, start)
            return
        lock = run_lock(settings.log_folder, settings.model_folder)
        with lock if distributed.is_main() else contextlib.nullcontext():
            if distributed.restarts() and checkpoint.exists(settings.model_folder):
                settings = dataclasses.replace(settings, resume="auto", overwrite=False)
                print("restarted by torchrun: --resume auto", flush=True)
            start = find_start(settings)
            seed = start.seed if settings.seed is None else settings.seed
            seed = distributed.broadcast(draw_seed()) if seed is None else seed
            yield Run(dataclasses.replace(settings, seed=seed), device, start)
    except RuntimeError as error:
        if distributed.world_size() == 1 or not distributed.is_lost(error):
            raise
        raise DataError(f"another process of this job has ended ({str(error).splitlines()[0]})") from None
    except KeyboardInterrupt as stop:
        newest = os.path.join(settings.model_folder, checkpoint.NEWEST)
        found = newest if os.path.exists(newest) else checkpoint.newest_kept(settings.model_folder)
        hint = f"add --resume auto to continue from {found}" if found else "no epoch was finished"
        raise type(stop)(f": {hint}") from None
    finally:
        distributed.stop()


def _prepared(settings, device):
    """Set threads and determinism; the settings with the counts of threads and ranks."""
    if settings.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a CUDA device; --amp bf16 runs on the CPU too")
    if settings.sync_bn and device.type == "cpu":
        raise UsageError("--sync_bn needs CUDA devices")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    set_determinism(settings.deterministic, settings.tf32)
    return dataclasses.replace(settings, threads=torch.get_num_threads(), processes=distributed.world_size())


class Run:
    """One run on one device.

    Attributes: settings (complete), device, precision, start (a `ResumeState`), class_counts, classes (as the
    data set calls them), class_names (for people), info (what does not change during the run, for summary.json).
    """

    class_counts: list[int]
    classes: list[str]
    class_names: list[str]
    info: dict[str, Any]

    def __init__(self, settings: Settings, device: torch.device, start: ResumeState) -> None:
        self.settings, self.device, self.start = settings, device, start
        self.precision = Precision(settings.amp, device.type)
        self.precision.load_state_dict(start.scaler)
        self.history, self.forced = list(start.history), list(start.forced)
        self._writer: Writer | None = None

    @property
    def seed(self) -> int:
        """The run's seed: given, drawn, or the checkpoint's."""
        return self.settings.seed or 0

    # ------------------------------------------------------------------------------------------------ data

    def use_data(self, train_set: Any, test_set: Any) -> tuple[Any, Any]:
        """Take the data sets in: check them against the checkpoint, hold out the validation part.

        Returns:
            (training set, validation set or None).

        Raises:
            UsageError: a class count or a fraction that the data contradict. DataError: not the checkpoint's images.
            NothingToDo: --export_split; or the folder holds this run, finished, on the same images.
        """
        settings, known = self.settings, len(train_set.classes)
        self._check_classes(train_set.classes)
        if settings.num_classes not in (None, known):
            raise UsageError(f"--num_classes {settings.num_classes}: {settings.dataset} has {known} classes")
        self.settings = settings = dataclasses.replace(settings, num_classes=known)
        split = {"sha256": split_sha256(train_set.chosen), "files_sha256": _files_sha256(train_set, test_set)}
        train_set, val_set = _hold_out(train_set, settings.val_fraction)
        if settings.export_split:
            _export_split(train_set, settings.export_split)
        self.classes, self.class_names = list(train_set.classes), list(train_set.class_names)
        self.class_counts = count_classes(train_set.targets, known)
        chooses = len(settings.posthoc_la) > 1 or len(settings.tau_norm) > 1  # on a held-out part of these images
        if not settings.evaluate or settings.test_fraction or chooses:  # else what is tested may have been trained on
            self._check_images(split)
        if chooses and self.start.split_sha256 is None:
            what = f"{self.start.path} does not tell on which images it was trained: maybe on those held out here"
            self._unless_forced("unknown images", UsageError(what))
        if not settings.evaluate:
            self._check_flip(train_set)
        if settings.evaluate and self.start.class_counts:  # groups and prior are the model's, whatever is tested on
            self.class_counts = list(self.start.class_counts)
        elif settings.evaluate and settings.posthoc_la:
            warn(f"{self.start.path} records no class counts: --posthoc_la takes those of the data given")
        split["total"] = len(train_set.targets)
        process = provenance.of_this_process(settings, self.device)
        trained_on = provenance.trained_on(self.start, process, settings.epochs)
        last = trained_on[-1]  # this process, if it has something to train
        self.info = {
            "name": settings.name,
            "settings": {**recorded(settings), **{name: last.get(name) for name in provenance.OF_PROCESS}},
            "versions": last["versions"],
            "code": last["code"],
            "device": last["device"],
            "trained_on": trained_on,
            "forced": self.forced,
            "classes": self.classes,
            "class_counts": self.class_counts,
            "group_rule": GROUP_RULE,
            "split": split,
            "test_images": len(test_set.targets),
        }
        if self.start.is_finished:
            raise NothingToDo(
                f"{settings.log_folder} holds this run, finished: nothing to do (--overwrite runs it again)"
            )
        return train_set, val_set

    def _check_classes(self, classes):
        """Refuse data with other classes than the checkpoint's, or in another order: its head would be misread."""
        start, here = self.start, list(classes)
        there = here if start.classes is None else list(start.classes)
        if there != here:
            first = next((pair for pair in zip(there, here, strict=False) if pair[0] != pair[1]), None)
            differs = f"{first[0]!r} there and {first[1]!r} here" if first else f"{len(there)} there, {len(here)} here"
            what = f"{start.path} has other classes than {self.settings.data_dir}: {differs}"
            self._unless_forced("other classes", DataError(what))

    def _check_images(self, split):
        """Refuse other images than those that the checkpoint was trained on, or changed files."""
        start, where = self.start, self.settings.data_dir
        counts = f"{sum(start.class_counts or ())} of them, {sum(self.class_counts)} here"
        checks = [
            ("other images", start.split_sha256, split["sha256"], f"was trained on other images of {where}"),
            (
                "changed image files", start.files_sha256, split["files_sha256"],
                f"was trained on other image files than those in {where}: names, classes or sizes differ",
            ),
            (
                "another part of the images", start.class_counts, self.class_counts,
                f"was trained on another part of the images, {counts}",
            ),
        ]  # fmt: skip
        for kind, there, here, what in checks:
            if there in (None, here):
                continue
            if start.is_finished:
                raise DataError(f"{start.path} {what} (--overwrite trains it anew)")
            self._unless_forced(kind, DataError(f"{start.path} {what}"))

    def _check_flip(self, train_set):
        """Refuse to continue with mirrored images what was trained without, and the other way round."""
        flips = [{"on": True, "off": False}.get(flip, train_set.flip) for flip in (self.start.flip, self.settings.flip)]
        if self.start.path is not None and flips[0] != flips[1]:
            what = f"was trained {'with' if flips[0] else 'without'} mirrored images"
            way = f"use --flip {'on' if flips[0] else 'off'}"
            self._unless_forced(what, UsageError(f"{self.start.path} {what}: {way}"))

    def _unless_forced(self, kind, error):
        """Refuse to continue; --force continues, with a warning, and the run's records name the `kind`."""
        if not self.settings.force:
            raise type(error)(f"{error} (use --force to continue anyway)")
        warn(f"{error}; continuing because of --force")
        self.forced.append(kind)

    def check_last_batch(self, model: torch.nn.Module, batches: Any) -> None:
        """Refuse a batch of one image, on any rank, where batch norm cannot take it, before training gets there.

        Raises:
            UsageError: see above.
        """
        size, images = self.settings.batch_size, len(batches.targets)
        ranks = 1 if self.settings.sync_bn else distributed.world_size()  # which normalises all ranks' images together
        sizes = {part.stop - part.start for rank in range(ranks) for part in batch_slices(images, size, rank, ranks)}
        if 1 not in sizes:
            return
        one = torch.zeros(1, 3, *[self.settings.image_size or 32] * 2, device=self.device)
        try:
            with torch.no_grad():
                copy.deepcopy(model).train()(one)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            leaves = "leaves a last batch" if ranks == 1 else f"over {ranks} processes leaves one of them a batch"
            raise UsageError(
                f"--batch-size {size} {leaves} of one image of {images}, which batch norm cannot take at this image "
                "size: choose another --batch-size"
            ) from None

    def check_deterministic(self, model: torch.nn.Module) -> None:
        """Try a backward pass with --deterministic, before an old run is deleted or an epoch lost.

        Raises:
            UsageError: the model has an operator that cannot be repeated to the bit on this device.
        """
        if not self.settings.deterministic:
            return
        images = torch.zeros(2, 3, *[self.settings.image_size or 32] * 2, device=self.device)
        try:
            copy.deepcopy(model).train()(images)[0].sum().backward()
        except RuntimeError as error:
            if "does not have a deterministic implementation" not in str(error):
                raise
            raise UsageError(
                f"-a {self.settings.arch} cannot be trained with --deterministic on a GPU: {str(error).split(',')[0]}"
            ) from None

    # ----------------------------------------------------------------------------------------------- model

    def restore(self, model: torch.nn.Module, optim: torch.optim.Optimizer | None = None) -> None:
        """Load the checkpoint's weights and optimizer state, or --pretrained's weights; say what the run is.

        Raises:
            DataError: weights or a state that do not fit.
        """
        settings, start = self.settings, self.start
        self.info["parameters"] = sum(p.numel() for p in model.parameters())
        if start.state_dict is not None:
            checkpoint.load_weights(model, start.state_dict, str(start.path))
        else:
            _load_pretrained(settings, model)
        if optim is None:
            return
        if start.optimizer is not None:
            try:
                optimizer.load_state(optim, start.optimizer)
            except Exception as error:  # whatever a foreign state makes torch raise
                raise DataError(f"{start.path} does not fit this model's optimizer: {error}") from None
        self._print_info()
        distributed.barrier()  # until every rank has read what rank 0 is about to write

    def _print_info(self):
        info, counts = self.info, self.class_counts
        print(f"run {one_line(info['name'])}, seed {self.settings.seed}, on {info['device']}")
        print(f"class counts: {_shortened(counts)}, total {sum(counts)}")
        sizes = ", ".join(f"{name} {len(labels) or 'n/a'}" for name, labels in groups(counts).items())
        print(f"classes by group: {sizes} ({GROUP_RULE})")
        print(f"parameters: {info['parameters']:,}; sha256 of the chosen indices: {info['split']['sha256']}")
        print("versions: " + ", ".join(f"{name} {value}" for name, value in info["versions"].items()))
        if self.start.path is not None:
            print(f"resumes from {one_line(self.start.path)} after {self.start.epoch} epochs")
        sys.stdout.flush()

    # ------------------------------------------------------------------------------------------- what is kept

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Keep checkpoints and logs while epochs are trained; rank 0 does. All is written when it ends.

        With --overwrite the old run is deleted now, not earlier.
        """
        if not distributed.is_main():
            yield
            return
        settings = self.settings
        inherited = read_inherited(self.start)
        if settings.overwrite:
            clear(settings.log_folder, settings.model_folder)
        take_over(self.start, inherited, settings.model_folder)
        records = Records(settings.log_folder, self.class_names, self.info, self.history)
        with contextlib.closing(records) as self._records, contextlib.closing(Writer()) as self._writer:
            yield

    def save(
        self, record: dict, model: torch.nn.Module, optim: torch.optim.Optimizer, criterion: torch.nn.Module
    ) -> None:
        """Add an epoch's record to the history; write checkpoints and logs while the next epoch is trained.

        Raises:
            Exception: what went wrong in the writing of the epoch before.
        """
        self.history = [*self.history, record]
        if self._writer is not None:
            self._writer.wait()
            state = self._state(model, optim, criterion)
            self._writer.start(self._write, state)

    def raise_write_error(self) -> None:
        """Raise what went wrong in the writing, if anything has by now; never waits."""
        if self._writer is not None and self._writer.is_done():
            self._writer.wait()

    def _state(self, model, optim, criterion):
        """A checkpoint's content; its tensors are copies on the CPU."""
        best, done = best_epoch(self.history), self.history[-1]["epoch"] + 1
        return {
            "epoch": done,
            "arch": self.settings.arch,
            "state_dict": on_cpu(model.state_dict()),
            "best_acc1": max(best["test"]["acc1"], self.start.best_acc1),
            "optimizer": on_cpu(optim.state_dict()),
            "criterion": on_cpu(criterion.state_dict()),
            "scaler": self.precision.state_dict(),
            "settings": self.info["settings"],
            "split_sha256": self.info["split"]["sha256"],
            "files_sha256": self.info["split"]["files_sha256"],
            "classes": self.classes,
            "class_counts": self.class_counts,
            "trained_on": self.info["trained_on"],
            "forced": self.forced,
            "history": self.history,
        }

    def _write(self, state):
        """The newest checkpoint; beside it the best, and those asked for; then the logs."""
        settings, history, folder = self.settings, state["history"], self.settings.model_folder
        best, done = best_epoch(history), state["epoch"]
        names = [checkpoint.NEWEST]
        if best is history[-1] and best["test"]["acc1"] > self.start.best_acc1:
            names.append(checkpoint.BEST)
        keep = done in (settings.start_ib_epoch, *settings.keep_epochs)
        if keep:
            names.append(checkpoint.epoch_name(done))
        checkpoint.save(folder, reversed(names), state)  # the newest last: it says that the others are there
        best_path = os.path.join(folder, checkpoint.BEST)
        if keep and os.path.exists(best_path):
            checkpoint.write(os.path.join(folder, checkpoint.best_name(done)), checkpoint.read(best_path)[0])
        self._records.add(history[-1])


class Writer:
    """One thread that writes while the main one trains, one job at a time."""

    def __init__(self) -> None:
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self._job: concurrent.futures.Future | None = None

    def start(self, write: Callable, *args: Any) -> None:
        """Have `write(*args)` called in the thread; `wait()` comes before the next one."""
        self._job = self._thread.submit(write, *args)

    def is_done(self) -> bool:
        return self._job is None or self._job.done()

    def wait(self) -> None:
        """Wait for the job and raise its error. Ctrl-C and SIGTERM are raised once it is done."""
        job, stopped = self._job, None
        while job is not None and not job.done():
            try:
                concurrent.futures.wait([job])
            except KeyboardInterrupt as stop:
                stopped = stop
        self._job = None
        if job is not None:
            job.result()
        if stopped is not None:
            raise stopped

    def close(self) -> None:
        """Wait for the job, end the thread, raise the job's error."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()


def on_cpu(value: Any) -> Any:
    """The same nested dicts and lists with a copy on the CPU of every tensor; the host waits once for all of them."""
    copied = _copied(value)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return copied


def _copied(value):
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True, non_blocking=True)  # from a GPU into pinned memory
    if isinstance(value, dict):
        copied = copy.copy(value)  # keeps what a state dict carries beside its items
        copied.update((name, _copied(item)) for name, item in value.items())
        return copied
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _hold_out(train_set, fraction):
    """(training set, validation set or None)."""
    if not fraction:
        return train_set, None
    alone = train_set.classes_of_one_image()
    try:
        train_set, val_set = train_set.hold_out(fraction)
    except ValueError as error:
        raise UsageError(f"--val_fraction {fraction}: {error}") from None
    if alone:
        warn(f"--val_fraction holds out no image of classes that have one image: {named(alone)}")
    return train_set, val_set


def _files_sha256(*data):
    """Of the image files of training and test; None for data in memory, whose md5 torchvision checks."""
    samples = [sample for part in data for sample in getattr(part, "samples", [])]
    return files_sha256(samples) if samples else None


def _export_split(train_set, path):
    write_text(path, "".join(f"{index}\n" for index in train_set.chosen))
    raise NothingToDo(f"{path}: indices of {len(train_set.chosen)} chosen training images, one a line")


def _shortened(counts: Sequence[int]) -> str:
    if len(counts) <= 200:
        return " ".join(map(str, counts))
    return f"{len(counts)} classes, {max(counts)} to {min(counts)} images"


def _load_pretrained(settings, model):
    """--pretrained: start from ImageNet's weights, or from those of a file; in place.

    ImageNet models keep their own last layer: always with ImageNet's weights, whose classes are not the data's, else
    where the weights have one of another form.
    """
    new_head = None if settings.arch in models.CIFAR_MODELS else models.last_linear(model)
    if settings.pretrained == "imagenet":
        weights = models.imagenet_weights(settings.arch)
        body = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{new_head}.")}
        checkpoint.load_weights(model, body, "the file of ImageNet's weights", new_head)
    elif settings.pretrained == "published":
        warn("there are no published weights for these models: --pretrained without a PATH changes nothing")
    elif settings.pretrained:
        weights = checkpoint.load(settings.pretrained, bare=True)["state_dict"]
        checkpoint.load_weights(model, weights, settings.pretrained, new_head)
