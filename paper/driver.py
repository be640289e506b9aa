"""Trains the chosen runs once each: what they share is trained once, finished ones are skipped, broken ones continue.

Everything that it knows is in files below `out`, so it can be killed at any moment and started again:
`log/` and `checkpoint/` are the scripts' own, `output/<run>.txt` is what a run printed, and `<results>/<run>.json`
is written when a run has ended well.
"""

import collections
import dataclasses
import os
import pathlib
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta

from experiment import checkpoint
from paper import executors, records
from paper.runs import Run
from utils import UsageError

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
#: A run whose worker goes away this often is given up.
MAX_LOSSES = 5
SECONDS_BETWEEN_LINES = 60
#: Settings that decide which run it is and where it goes: flags after `--` may not change them.
OWN = (
    "dataset", "imb_type", "imb_factor", "rand_number", "arch", "loss_type", "train_rule", "seed", "exp_str",
    "root_log", "root_model", "resume", "keep_epochs", "threads", "start_epoch", "dry_run", "evaluate", "export_split",
    "overwrite", "gpu",
)  # fmt: skip


def check_extra(runs: Iterable[Run], extra: Sequence[str]) -> None:
    """Refuse flags for the scripts that reproduce.py or a variant sets, and those that a script does not know.

    Raises:
        UsageError: the first such flag. SystemExit: a flag that a script does not know.
    """
    for run in runs if extra else ():
        own, asked = records.command_settings(run), records.command_settings(run, tuple(extra))
        if run.variant == "ib-lr" and asked.schedule != "step":
            raise UsageError(f"--control ib-lr lowers the lr at a milestone, which --schedule {asked.schedule} has not")
        of_ib = ("start_ib_epoch", "ib_lr_factor") if run.variant == "ib-lr" else ()  # its milestone is made of them
        for name in (*OWN, *of_ib, *sorted(run.changes.keys() - {"epochs"})):
            if getattr(own, name) != getattr(asked, name):
                who = "reproduce.py" if name in OWN else run.title
                raise UsageError(f"{who} sets --{name} itself: the flags after -- may not change it")


class Driver:
    """Trains runs, and records those that have ended.

    Args:
        runs: each once.
        out: folder below which everything is written; all machines share it.
        results: folder of the small record of each finished run.
        executor: see executors.py.
        extra: flags for every script, after a run's own.
    """

    def __init__(
        self, runs: Sequence[Run], out: str | pathlib.Path, results: str | pathlib.Path, executor: executors.Executor,
        extra: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.runs, self.executor, self.extra = runs, executor, list(extra)
        self.out, self.results = pathlib.Path(out).resolve(), pathlib.Path(results).resolve()
        self.families: dict[tuple, list[Run]] = collections.defaultdict(list)
        for run in runs:
            self.families[run.family].append(run)
        self.losses: collections.Counter[Run] = collections.Counter()
        for folder in (self.out / "output", self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.state = {run: DONE if self._is_recorded(run) else WAITING for run in runs}
        self.started = self.shown = time.monotonic()
        self.left_at_start = self._epochs_left()

    def announcement(self) -> str:
        """'10 runs, 3 of them done, 300 epochs to train ...', and how long where the records tell a pace."""
        done = f", {len(self._in(DONE))} of them done" if self._in(DONE) else ""
        jobs, found = self.executor.jobs, records.read(self.results)[0]
        seconds = [epoch["seconds"] for _, record in found for epoch in record["history"]]
        time_left = "the time shows after the first epochs"
        if seconds:
            expected = self.left_at_start * sum(seconds) / len(seconds) / (jobs or 1)
            time_left = f"about {timedelta(seconds=round(expected))} at the pace of the records in {self.results}"
        epochs = f"{self.left_at_start} epochs to train, shared ones once"
        return f"{len(self.runs)} runs{done}, {epochs}, {jobs or 'as many as fit'} at a time; {time_left}"

    def run(self) -> list[Run]:
        """Train all that is not done. Returns the runs that failed."""
        try:
            while self._in(WAITING, RUNNING):
                for run in self._in(WAITING):
                    if self.executor.room() and not self._must_wait(run):
                        self._start(run)
                for run, status in self.executor.wait(1.0):
                    self._ended(run, status)
                if time.monotonic() - self.shown > SECONDS_BETWEEN_LINES:
                    self.shown = time.monotonic()
                    print(self.status(), flush=True)
        finally:
            self.executor.stop()
        return self._in(FAILED)

    def status(self) -> str:
        """'3 of 24 done, 0 failed, 20 waiting, 1:02:03 to go; running: NAME (epoch 7 of 40)'."""
        count, left = collections.Counter(self.state.values()), self._epochs_left()
        trained, elapsed = self.left_at_start - left, time.monotonic() - self.started
        time_left = timedelta(seconds=round(elapsed / trained * left)) if trained > 0 else "unknown time"
        running = [f"{run.name} (epoch {self._epochs_done(run)} of {self.epochs(run)})" for run in self._in(RUNNING)]
        text = f"{count[DONE]} of {len(self.runs)} done, {count[FAILED]} failed, {count[WAITING]} waiting"
        return f"{text}, {time_left} to go; running: {', '.join(running) or 'none'}"

    def _epochs_left(self):
        """Epochs to train, those that runs share once."""
        left = 0
        for run in self._in(WAITING, RUNNING):
            done = self._epochs_done(run)
            if not done and (self.fork_point(run) or self._must_wait(run)):
                done = self.fork_epoch(run)  # another run trains them, or has trained them
            left += self.epochs(run) - done
        return left

    # ------------------------------------------------------------------------------------ what comes next

    def _is_recorded(self, run):
        """Whether there is a record of this run; a line where what is there is none."""
        path = self.results / f"{run.name}.json"
        # whether a folder still has the same images only the script knows, which says so of a finished run
        if not path.exists() or (run.setup.script == "folder_train.py" and self._is_begun(run)):
            return False
        try:
            record = records.load(path) or {"settings": {}}
            wanted, found = self._settings(run), records.settings_of(record["settings"])
            if "test_fraction" not in wanted.given:  # folder_train.py sets it where there are no test images
                wanted = dataclasses.replace(wanted, test_fraction=found.test_fraction)
            differs = records.differences(wanted, found)
            reason = ", ".join(f"{name} {value}" for name, value in differs)
        except ValueError as error:
            reason = str(error)
        if reason:
            print(f"{path} is not the record of this run ({reason}): the run is looked at again", flush=True)
        return not reason

    def _must_wait(self, run):
        """Whether another run of its family is to train the epochs that they share."""
        if self._is_begun(run) or self.fork_point(run) or not self.forks(run):
            return False
        return self._trunk(run) is not run

    def _trunk(self, run):
        """The run of the family that trains the shared epochs."""
        live = [other for other in self.families[run.family] if self.state[other] in (WAITING, RUNNING)]
        return max(live, key=self.fork_epoch)

    def epochs(self, run: Run) -> int:
        """Epochs of the run, with the flags for every script."""
        return self._settings(run).epochs

    def fork_epoch(self, run: Run) -> int:
        """`Run.fork_epoch` with the flags for every script."""
        return run.fork_epoch(vars(self._settings(run)))

    def forks(self, run: Run) -> bool:
        """Whether it goes its own way after epochs that it shares; false for one that others fork from."""
        return 0 < self.fork_epoch(run) < self.epochs(run)

    def fork_point(self, run: Run) -> pathlib.Path | None:
        """The checkpoint of another run of its family after the epochs that they share, or None."""
        epoch = self.fork_epoch(run)
        for other in [*self.families[run.family], run.trunk] if self.forks(run) else ():
            path = self._model_folder(other) / checkpoint.epoch_name(epoch)
            if other != run and self.fork_epoch(other) >= epoch and path.exists():
                return path
        return None

    def command(self, run: Run) -> list[str]:
        """Script and flags of `run`, as it can be started now."""
        script, *flags = run.argv(self.out, self.extra)
        shared = {self.fork_epoch(other) for other in self.families[run.family]}
        if run == run.trunk:  # for methods that a later command adds: DRW and others, cRT
            shared |= {self._settings(run).drw_epoch, self.epochs(run) - 1}
        keep = sorted(epoch for epoch in shared if 0 < epoch <= self.fork_epoch(run) and epoch < self.epochs(run))
        flags += ["--keep_epochs", *map(str, keep)] if keep else []
        fork = None if self._is_begun(run) else self.fork_point(run)
        resume = str(fork) if fork else "auto"
        return [str(REPOSITORY / script), *flags, "--threads", str(self.executor.threads), "--resume", resume]

    def _start(self, run):
        self.state[run] = RUNNING
        command = self.command(run)
        fork = command[command.index("--resume") + 1]
        origin = f", from {os.path.relpath(fork, self.out)}" if fork != "auto" else ""
        print(f"start  {run.name}{origin}", flush=True)
        self.executor.start(run, command, str(self.output(run)))

    def _ended(self, run, status):
        if status == 0:
            records.collect(self.out / "log" / run.name / "summary.json", self.results / f"{run.name}.json")
            self.state[run] = DONE
            print(f"done   {run.name}", flush=True)
        elif status is executors.LOST and self.losses[run] < MAX_LOSSES:
            self.losses[run] += 1
            self.state[run] = WAITING
            print(f"lost   {run.name}, with its machine; it continues elsewhere", flush=True)
        else:
            # those that wait for its epochs would train them again now; the next time it is continued first
            others = self.families[run.family] if self._is_begun(run) and self._trunk(run) is run else ()
            waiting = [other for other in others if self.state[other] == WAITING and self._must_wait(other)]
            self.state[run] = FAILED
            print(f"failed {run.name}", flush=True)
            for other in waiting:
                self.state[other] = FAILED
                print(f"failed {other.name}: it continues from {run.name}", flush=True)

    # -------------------------------------------------------------------------------------------- places

    def _settings(self, run):
        return records.command_settings(run, tuple(self.extra))

    def _in(self, *states):
        return [run for run in self.runs if self.state[run] in states]

    def _model_folder(self, run):
        return self.out / "checkpoint" / run.name

    def _is_begun(self, run):
        return checkpoint.exists(self._model_folder(run))

    def output(self, run: Run) -> pathlib.Path:
        """The file of what the run prints."""
        return self.out / "output" / f"{run.name}.txt"

    def _epochs_done(self, run):
        """Epochs in the run's log, those before its fork included."""
        path = self.out / "log" / run.name / "log_test.csv"
        return max(path.read_bytes().count(b"\n") - 1, 0) if path.exists() else 0
