"""The open run: device, ranks, folders and their lock, where it starts; its epochs, checkpoints and records."""

import contextlib
import dataclasses
import math
import os
import pathlib
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import models
from experiment import checkpoint, plots, provenance
from experiment.compare import refuse_or_force
from experiment.data import Data, check_data, preprocessing
from experiment.records import Records, best_epoch
from experiment.resume import FACTS, Start, find_evaluated, find_start
from experiment.screen import Progress, print_classes, summary_line
from experiment.settings import Settings, recorded
from files import run_lock, write_text
from imbalance import GROUP_RULE, groups
from training import distributed
from training.loop import NonFiniteLoss, OnBatch, evaluate
from training.precision import Precision, set_determinism
from training.registry import Stage
from utils import DataError, NothingToDo, UsageError, format_metric, one_line, warn


@contextlib.contextmanager
def open_run(settings: Settings) -> Iterator["Run"]:
    """Join the ranks, choose the device, lock the folders, and find where the run starts.

    The Run's settings are complete: threads and ranks are counted, the seed is drawn or the checkpoint's; with -e data,
    model and method are the checkpoint's. After an error, Ctrl-C or SIGTERM too, the last finished epoch is written to
    the checkpoint.

    Raises:
        UsageError, DataError: see `resume.find_start`, `files.run_lock`, `utils.choose_device`.
    """
    device = distributed.start(settings.gpu)
    try:
        settings = _prepared(settings, device)
        if settings.evaluate:
            yield Run(*find_evaluated(settings), device)
            return
        lock = run_lock(settings.log_folder, settings.model_folder)
        with lock if distributed.is_main() else contextlib.nullcontext():
            if distributed.restarts() and checkpoint.exists(settings.model_folder):
                settings = dataclasses.replace(settings, resume="auto", overwrite=False)
                print("restarted by torchrun: --resume auto", flush=True)
            start = find_start(settings)
            _check_shared(start.path and start.epoch, "--root_model")
            settings = dataclasses.replace(settings, seed=_seed(settings, start))
            run = Run(settings, start, device)
            try:
                yield run
            except BaseException:
                with contextlib.suppress(OSError):  # the first error is the one to tell
                    run.write()
                raise
            finally:
                run.close()
    except NonFiniteLoss as bad:
        hint = "try a smaller --lr, or with an IB loss a smaller --alpha (or --alpha auto)"
        raise DataError(f"the loss is not finite in epoch {run.epoch + 1}, batch {bad.batch + 1}: {hint}") from None
    except RuntimeError as error:
        if explained := _explained(error, settings):
            raise explained from None
        raise
    except KeyboardInterrupt as stop:
        if settings.evaluate:
            raise
        newest = os.path.join(settings.model_folder, checkpoint.NEWEST)
        how = " with --resume auto" if settings.overwrite or settings.force else ""
        how += " in place of --overwrite" if settings.overwrite else ""
        hint = f"the same command{how} continues from {newest}" if os.path.exists(newest) else "no epoch was finished"
        stop.args = (f": {hint}",)
        raise
    finally:
        # after an error this rank ends at once: NCCL would wait for the others, which wait for it
        if sys.exc_info()[0] in (None, NothingToDo):
            distributed.stop()


def _prepared(settings, device):
    """Set threads and determinism; the settings with the counts of threads and ranks."""
    if settings.amp == "fp16" and device.type == "cpu":
        raise UsageError("--amp fp16 needs a CUDA device; --amp bf16 runs on the CPU too")
    if settings.sync_bn and device.type == "cpu":
        raise UsageError("--sync_bn needs CUDA devices")
    if settings.gpu is not None and device.type == "cpu":
        warn(f"--gpu {settings.gpu}: there is no CUDA device, the run is on the CPU")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    set_determinism(settings.deterministic, settings.tf32)
    return dataclasses.replace(settings, threads=torch.get_num_threads(), processes=distributed.world_size())


def _check_shared(found, flag):
    """Refuse ranks on machines that do not see the same files."""
    if len(set(distributed.gather(found))) > 1:
        raise DataError(f"the processes of this job do not find the same files: {flag} must be the same disk for all")


def _seed(settings, start):
    """--seed, else the checkpoint's, else one drawn for all ranks."""
    seed = settings.seed
    if seed is None:
        seed = (start.checkpoint.get("settings") or {}).get("seed")
    return distributed.gather(secrets.randbelow(2**31))[0] if seed is None else seed


def _explained(error, settings):
    """The error in one line, for what a flag or another process has caused; None for anything else."""
    text = (str(error) or type(error).__name__).splitlines()[0]
    if distributed.world_size() > 1 and distributed.is_lost(error):
        return DataError(f"another process of this job has ended ({text})")
    if "does not have a deterministic implementation" in text:
        return UsageError(f"this model cannot be trained with --deterministic on a GPU: {text.split(',')[0]}")
    kind = f"{type(error).__name__} {error}".lower()
    if settings.compile and ("compiler" in kind or "triton" in kind):
        return UsageError(f"--compile needs a working compiler (g++ on a CPU, triton on a GPU): {text}")
    return None


class Run:
    """One run on one device.

    Attributes: settings (complete), start, device, seed, history (a record of each epoch), epoch (the one in training),
    data and class_counts (after `use_data`).
    """

    data: Data
    class_counts: list[int]
    progress: Any = None
    _records: Records | None = None
    _unwritten: dict | None = None  # the checkpoint of the last epoch, and of the best one
    _unwritten_best: dict | None = None
    _written_at = -math.inf

    def __init__(self, settings: Settings, start: Start, device: torch.device) -> None:
        self.settings, self.start, self.device = settings, start, device
        self.seed, self.epoch = settings.seed or 0, start.epoch
        self.history, self.forced = list(start.history), list(start.forced)
        self.parts: dict[str, Any] = {}
        self.info: dict[str, Any] = {}

    @property
    def loading(self) -> dict[str, Any]:
        """What every loader is told, see `loaders.Batches`."""
        return {
            "batch_size": self.settings.batch_size, "device": self.device, "seed": self.seed,
            "flip": {"on": True, "off": False}.get(self.settings.flip),  # None: as the data set says
            "rank": distributed.rank(), "world_size": distributed.world_size(),
        }  # fmt: skip

    # ---------------------------------------------------------------------------------------- before training

    def use_data(self, data: Data) -> None:
        """Set `data` and `class_counts`, and compare the data with the checkpoint's.

        With -e the class counts are the checkpoint's, where it records them.

        Raises:
            UsageError, DataError: see `data.check_data`. NothingToDo: the folder holds this run, finished; or
                --export_split has written the indices of the images.
        """
        settings, start = self.settings, self.start
        if settings.export_split:
            write_text(settings.export_split, "".join(f"{index}\n" for index in data.indices))
            raise NothingToDo(f"{settings.export_split}: indices of {len(data.indices)} training images, one a line")
        _check_shared((data.split_sha256, data.files_sha256), "--data_dir")
        self.data, self.class_counts = data, data.class_counts
        self.forced += check_data(data, start, settings)
        if start.is_finished:
            raise NothingToDo(f"{settings.log_folder} holds this run, finished: nothing to do (--overwrite repeats it)")
        if settings.evaluate and start.checkpoint.get("class_counts"):
            self.class_counts = list(start.checkpoint["class_counts"])  # groups and prior are the model's

    def restore(self, **parts: Any) -> None:
        """Name all that has a state, the model as `model`; load what the checkpoint has of each, or --pretrained's.

        The parts are saved under these names; None is skipped. Without a checkpoint the parts do not change.

        Raises:
            DataError: a state that does not fit, or, with -e, one that is missing. ValueError: a name that is taken.
        """
        start, model = self.start, parts["model"]
        named = {"state_dict" if name == "model" else name: part for name, part in parts.items()}  # the published name
        self.parts = {name: part for name, part in named.items() if part is not None}
        if taken := FACTS & self.parts.keys():
            raise ValueError(f"a part cannot be called {min(taken)!r}, which a checkpoint has already")
        if start.path is None:
            _load_pretrained(self.settings, model)
        for name, part in self.parts.items():
            state = start.states.get(name)
            if state is None:
                if self.settings.evaluate:
                    raise DataError(f"{start.path} holds no state of {name!r}")
            elif part is model:
                checkpoint.load_weights(model, state, str(start.path))
            else:
                try:
                    part.load_state_dict(state)
                except Exception as error:  # whatever a foreign state makes torch raise
                    raise DataError(f"{start.path} does not fit this model's {name}: {error}") from None
        if self.settings.evaluate:
            unread = start.states.keys() - self.parts.keys() - {"optimizer", "criterion", "scaler"}
            if unread and start.checkpoint.get("settings"):  # not of a foreign checkpoint
                what = f"{start.path} holds a state of {min(unread)!r}, which nothing restores"
                refuse_or_force(self.settings, what)
        else:
            self._describe(sum(p.numel() for p in model.parameters()))
            distributed.barrier()  # until every rank has read what rank 0 is about to write

    def _describe(self, parameters):
        """What does not change during the run, for summary.json and the screen."""
        settings, data, counts = self.settings, self.data, self.class_counts
        process = provenance.of_this_process(settings, self.device)
        trained_on = provenance.trained_on(self.start, process, settings.epochs)
        last = trained_on[-1]  # this process, if it has something to train
        written = {**recorded(settings), "num_classes": len(data.classes)}
        self.info = {
            "name": settings.name,
            "settings": {**written, **{name: last.get(name) for name in provenance.OF_PROCESS}},
            **{name: last[name] for name in ("versions", "code", "device")},
            "trained_on": trained_on,
            "forced": self.forced,
            "classes": data.classes,
            "class_counts": counts,
            "group_rule": GROUP_RULE,
            "split": {"sha256": data.split_sha256, "files_sha256": data.files_sha256, "total": sum(counts)},
            "test_images": len(data.test_files),
            "parameters": parameters,
        }
        print(f"run {one_line(settings.name)}, seed {self.seed}, on {last['device']}")
        shown = " ".join(map(str, counts))
        if len(counts) > 200:
            shown = f"{len(counts)} classes, {max(counts)} to {min(counts)} images"
        print(f"class counts: {shown}, total {sum(counts)}")
        sizes = ", ".join(f"{name} {len(labels) or 'n/a'}" for name, labels in groups(counts).items())
        print(f"classes by group: {sizes} ({GROUP_RULE})")
        print(f"parameters: {parameters:,}; sha256 of the chosen indices: {data.split_sha256}")
        print("versions: " + ", ".join(f"{name} {value}" for name, value in last["versions"].items()))
        if self.start.path is not None:
            print(f"resumes from {one_line(self.start.path)} after {self.start.epoch} epochs")
        sys.stdout.flush()

    # --------------------------------------------------------------------------------------------- the epochs

    def epochs(self) -> Iterator[int]:
        """The epochs to train, counted from 0. Logs and checkpoints begin here, an old run is deleted here."""
        if distributed.is_main():
            self._begin()
        self.progress = Progress(self.start.epoch, self.settings.epochs, self.settings.print_freq)
        for epoch in range(self.start.epoch, self.settings.epochs):
            self.epoch, self._began = epoch, time.monotonic()
            yield epoch

    def on_batch(self, batches: int, lr: float) -> OnBatch:
        """Start the progress display of an epoch. Returns the callback for `train_one_epoch`.

        Args:
            batches: number of batches in the epoch. lr: as displayed.
        """
        self.progress.epoch(self.epoch, batches, lr)
        return self.progress.on_batch

    def save(
        self, stage: Stage, train: dict, test: dict, val: dict | None, criterion: Any, gradient: dict | None = None
    ) -> dict:
        """Add the epoch to the history and the logs, and write a checkpoint where one is due. Returns its record.

        gradient: what `gradients.match_gradient` found before the epoch, if it was called.
        """
        finite = math.isfinite(test["loss"] + (val["loss"] if val else 0))
        score = val["class_mean"] if val else test["acc1"]
        record = {
            "epoch": self.epoch,
            "time": time.time(),
            "seconds": time.monotonic() - self._began,
            "stage": dataclasses.asdict(stage),
            "train": {name: value for name, value in train.items() if name != "ib_factor"},
            "test": {name: value for name, value in test.items() if name != "confusion"},
            "val": val and {name: value for name, value in val.items() if name != "confusion"},
            "score": score if finite else -1.0,  # outputs of NaN count as class 0, which may be the largest
            "ib_factor": train["ib_factor"],
            "alpha": None if criterion.current_alpha is None else float(criterion.current_alpha),
            "gradient": gradient,
        }
        if not finite:  # batch norm's first statistics may do it
            warn(f"after epoch {self.epoch + 1} the model has outputs that are not finite: its accuracy means nothing")
        self.history = [*self.history, record]
        if self._records is not None:
            self._records.add(record)
            self._unwritten = self._state()
            if best_epoch(self.history) is record:
                self._unwritten_best = self._unwritten
            is_due = time.monotonic() - self._written_at >= self.settings.checkpoint_seconds
            if is_due or self._is_kept(self.epoch + 1) or self.epoch + 1 == self.settings.epochs:
                self.write()
        self.progress.done(record, self.history)
        return record

    def _is_kept(self, done):
        return done in (self.settings.start_ib_epoch, *self.settings.keep_epochs)

    def write(self) -> None:
        """Write the checkpoints that are not on the disk yet, and summary.json.

        The best one comes first and the newest last, so that what the newest tells is true after a kill, too. Beside
        one that is kept, to fork from, the best one so far is kept.
        """
        state, folder = self._unwritten, self.settings.model_folder
        if state is None:
            return
        best = os.path.join(folder, checkpoint.BEST)
        if self._unwritten_best is not None:
            checkpoint.save(best, self._unwritten_best)
            self._unwritten_best = None
        if self._is_kept(state["epoch"]):
            if os.path.exists(best):
                shutil.copyfile(best, os.path.join(folder, checkpoint.best_name(state["epoch"])))
            checkpoint.save(os.path.join(folder, checkpoint.epoch_name(state["epoch"])), state)
        checkpoint.save(os.path.join(folder, checkpoint.NEWEST), state)
        if self._records is not None:
            self._records.write_summary(state["history"])
        self._unwritten, self._written_at = None, time.monotonic()

    def _state(self):
        """A checkpoint: the parts' states, copied to the CPU, and what the run is."""
        info = self.info
        return {
            "epoch": self.epoch + 1,
            "arch": self.settings.arch,
            "best_acc1": best_epoch(self.history)["test"]["acc1"],
            **checkpoint.on_cpu({name: part.state_dict() for name, part in self.parts.items()}),
            **{name: info[name] for name in ("settings", "classes", "class_counts", "trained_on", "forced")},
            **{name: getattr(self.data, name) for name in ("split_sha256", "files_sha256", "class_names")},
            "preprocessing": preprocessing(self.settings, self.data),
            "history": self.history,
        }

    # ------------------------------------------------------------------------------------------------ folders

    def _begin(self):
        """Empty the folders with --overwrite; write what a fork brings; open the logs."""
        settings, start = self.settings, self.start
        best = None if start.is_own else _inherited_best(start)
        if settings.overwrite:
            _empty(settings.log_folder)
            _empty(settings.model_folder)
        if start.path is not None and not start.is_own:
            pathlib.Path(settings.model_folder, checkpoint.BEST).unlink(missing_ok=True)
            if start.history:
                mine = {name: self.info[name] for name in ("settings", "forced", "classes", "class_counts")}
                facts = {name: value for name, value in start.checkpoint.items() if name in FACTS}
                self._unwritten, self._unwritten_best = {**facts, **start.states, **mine}, best
                self.write()
        for name in (*plots.FIGURES, "confusion.png"):  # of a run that is made longer
            pathlib.Path(settings.log_folder, name).unlink(missing_ok=True)
        self._records = Records(settings.log_folder, self.data.class_names, self.info, self.history)
        self._written_at = time.monotonic()

    def report(self, model: torch.nn.Module, test_batches: Any, precision: Precision) -> None:
        """Print the per-class table, best and last; draw the figures."""
        settings, best, last = self.settings, best_epoch(self.history), self.history[-1]
        final = evaluate(model, test_batches.eval_epoch(), self.class_counts, precision)
        if not distributed.is_main():
            return
        self.progress.close()
        print_classes(self.data.class_names, self.class_counts, best["test"], last["test"])
        for name, record in (("best", best), ("last", last)):
            chosen_by = f"  (val class mean {format_metric(record['val']['class_mean'])})" if record.get("val") else ""
            print(f"{name} (epoch {record['epoch'] + 1}): {summary_line(record['test'])}{chosen_by}")
        if {**best["stage"], "lr": 0} != {**last["stage"], "lr": 0}:
            print(f"the best epoch ({best['stage']['loss']}) is from before the last stage of this recipe")
        print(f"({GROUP_RULE}; accuracies in percent of the test set)")
        folder = settings.log_folder
        drawn = plots.of_evaluation(final, self.data.class_names, self.class_counts, folder, settings.name)
        drawn += plots.of_history(self.history, settings.start_ib_epoch, folder, settings.name)
        print(f"logs: {folder}; checkpoints: {settings.model_folder}; figures: {' '.join(drawn) or 'none'}", flush=True)

    def close(self) -> None:
        """Close the logs and the progress bar."""
        if self.progress is not None:
            self.progress.close()
        if self._records is not None:
            self._records.close()


def _inherited_best(start):
    """The best checkpoint of the epochs before a fork, or None where it is not beside the one that it starts from."""
    if not start.history:
        return None
    best = best_epoch(start.history)
    if best is start.history[-1]:
        return start.checkpoint
    for name in (checkpoint.best_name(start.epoch), checkpoint.BEST):
        path = os.path.join(os.path.dirname(start.path), name)
        if os.path.exists(path):
            state = checkpoint.load(path)
            if state.get("epoch") == best["epoch"] + 1:
                return state
    warn(f"{checkpoint.BEST} of epoch {best['epoch'] + 1} is not beside {start.path}: a better epoch will write one")
    return None


def _empty(folder):
    """Delete all that a folder holds but its lock, a hidden file."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path)
        elif not entry.name.startswith("."):
            os.unlink(entry.path)


def _load_pretrained(settings, model):
    """--pretrained: start from ImageNet's weights, or from those of a file; in place.

    ImageNet models keep their own last layer: always with ImageNet's weights, whose classes are not the data's, else
    where the weights have one of another form.
    """
    new_head = None if settings.script == "cifar_train.py" else models.head_name(model)
    if settings.pretrained == "imagenet":
        weights = models.imagenet_weights(settings.arch)
        body = {name: tensor for name, tensor in weights.items() if not name.startswith(f"{new_head}.")}
        checkpoint.load_weights(model, body, "the file of ImageNet's weights", new_head)
    elif settings.pretrained == "published":
        warn("there are no published weights for these models: --pretrained without a PATH changes nothing")
    elif settings.pretrained:
        weights = models.current_names(checkpoint.load_foreign(settings.pretrained))
        is_new = checkpoint.load_weights(model, weights, settings.pretrained, new_head)
        head = "" if new_head is None else f"; its last layer, {new_head}, is {'new' if is_new else 'from there, too'}"
        if distributed.is_main():
            print(f"--pretrained {settings.pretrained}: {len(weights)} tensors loaded into {settings.arch}{head}")
