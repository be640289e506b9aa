"""Trains the chosen runs once each: what they share is trained once, finished ones are skipped, broken ones continue.

Everything that it knows is in files below `out`, so it can be killed at any moment and started again:
`log/` and `checkpoint/` are the scripts' own, `output/<run>.txt` is what a run printed, and `<results>/<run>.json`
is written when a run has ended well.
"""

import collections
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from experiment import checkpoint
from paper import executors, records
from paper.runs import Run
from utils import UsageError, duration

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
WAITING, RUNNING, DONE, FAILED = "waiting", "running", "done", "failed"
#: A run whose worker goes away this often is given up.
MAX_LOSSES = 5
SECONDS_BETWEEN_LINES = 60
#: Settings that decide which run it is and where it goes: flags after `--` may not change them.
OWN = (
    "dataset", "imb_type", "imb_factor", "rand_number", "arch", "loss_type", "train_rule", "seed", "exp_str",
    "root_log", "root_model", "resume", "keep_epochs", "threads", "start_epoch", "dry_run", "evaluate", "export_split",
    "overwrite",
)  # fmt: skip


def check_extra(runs: Iterable[Run], extra: Sequence[str]) -> None:
    """Refuse flags for the scripts that reproduce.py sets itself, and those that a script does not know.

    Raises:
        UsageError: the first such flag. SystemExit: a flag that a script does not know.
    """
    for run in runs if extra else ():
        own, asked = records.command_settings(run), records.command_settings(run, tuple(extra))
        for name in OWN:
            if getattr(own, name) != getattr(asked, name):
                raise UsageError(f"reproduce.py sets --{name} itself: it cannot be among the flags after --")


class Driver:
    """Trains runs, and records those that have ended.

    Args:
        runs: each once.
        out: folder below which everything is written; all machines share it.
        results: folder of the small record of each finished run.
        executor: see executors.py.
        extra: flags for every script, after a run's own.
        threads: CPU threads of a run.
        stream: where lines go (None: standard output).
    """

    def __init__(
        self, runs: Sequence[Run], out: str | pathlib.Path, results: str | pathlib.Path, executor: executors.Executor,
        extra: Sequence[str] = (), threads: int = 1, stream: TextIO | None = None,
    ) -> None:  # fmt: skip
        self.runs, self.executor = runs, executor
        self.out, self.results = pathlib.Path(out).resolve(), pathlib.Path(results).resolve()
        self.extra, self.threads = list(extra), threads
        self.view = View(self, stream or sys.stdout)
        self.families: dict[tuple, list[Run]] = collections.defaultdict(list)
        for run in runs:
            self.families[run.family].append(run)
        self.losses: collections.Counter[Run] = collections.Counter()
        for folder in (self.out / "output", self.results):
            folder.mkdir(parents=True, exist_ok=True)
        self.state = {run: DONE if self._is_recorded(run) else WAITING for run in runs}

    def run(self) -> list[Run]:
        """Train all that is not done. Returns the runs that failed."""
        try:
            while True:
                for run in self._ready():
                    self._start(run)
                if not self._in(WAITING, RUNNING):
                    break
                for run, status in self.executor.wait(1.0):
                    self._ended(run, status)
                self.view.update()
        finally:
            self.executor.stop()
        return self._in(FAILED)

    # ------------------------------------------------------------------------------------ what comes next

    def _is_recorded(self, run):
        """Whether there is a record of this run; a line where what is there is none."""
        path = self._record(run)
        if not path.exists():
            return False
        try:
            record = records.load(path)
            settings = records.settings_of(record["settings"] if record else {})
        except ValueError as error:
            reason = str(error)
        else:
            differs = records.differences(self._settings(run), settings)
            reason = ", ".join(f"{name} {value}" for name, value in differs)
            reason = reason or f"seed {settings.seed}" * (settings.seed != run.seed)
        if reason:
            self.view.line(f"{path} is not the record of this run ({reason}): the run is looked at again")
        return not reason

    def _ready(self) -> Iterator[Run]:
        """Runs to start now, one by one while there is room."""
        for run in self.runs:
            if not self.executor.room():
                return
            if self.state[run] == WAITING and not self._must_wait(run):
                yield run

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
        return run.fork_epoch_with(vars(self._settings(run)))

    def forks(self, run: Run) -> bool:
        """Whether it goes its own way after epochs that it shares; false for one that others fork from."""
        return 0 < self.fork_epoch(run) < self.epochs(run)

    def fork_point(self, run: Run) -> pathlib.Path | None:
        """The checkpoint of another run of its family after the epochs that they share, or None."""
        if not self.forks(run):
            return None
        epoch = self.fork_epoch(run)
        for other in [*self.families[run.family], run.trunk]:
            folder = self._model_folder(other)
            path = folder / checkpoint.epoch_name(epoch)
            # one of the two is written last
            if other != run and path.exists() and (folder / checkpoint.best_name(epoch)).exists():
                return path
        return None

    def command(self, run: Run) -> list[str]:
        """Script and flags of `run`, as it can be started now."""
        script, *flags = run.argv(self.out)
        shared = {self.fork_epoch(other) for other in self.families[run.family]}
        keep = sorted(epoch for epoch in shared if 0 < epoch <= self.fork_epoch(run) and epoch < self.epochs(run))
        flags += ["--keep_epochs", *map(str, keep)] if keep else []
        fork = None if self._is_begun(run) else self.fork_point(run)
        resume = str(fork) if fork else "auto"
        return [str(REPOSITORY / script), *flags, "--threads", str(self.threads), "--resume", resume, *self.extra]

    def _start(self, run):
        self.state[run] = RUNNING
        command = self.command(run)
        fork = command[command.index("--resume") + 1]
        self.view.line(f"start  {run.name}" + (f", from {os.path.relpath(fork, self.out)}" if fork != "auto" else ""))
        self.executor.start(run, command, str(self.output(run)))

    def _ended(self, run, status):
        if status == 0:
            records.collect(self.out / "log" / run.name / "summary.json", self._record(run))
            self.state[run] = DONE
            self.view.line(f"done   {run.name}")
        elif status is executors.LOST and self.losses[run] < MAX_LOSSES:
            self.losses[run] += 1
            self.state[run] = WAITING
            self.view.line(f"lost   {run.name}, with its machine; it continues elsewhere")
        else:
            # those that wait for its epochs would train them anew now; the next time it is continued first
            others = self.families[run.family] if self._is_begun(run) and self._trunk(run) is run else ()
            waiting = [other for other in others if self.state[other] == WAITING and self._must_wait(other)]
            self.state[run] = FAILED
            self.view.line(f"failed {run.name}")
            for other in waiting:
                self.state[other] = FAILED
                self.view.line(f"failed {other.name}: it continues from {run.name}")

    # -------------------------------------------------------------------------------------------- places

    def _settings(self, run):
        return records.command_settings(run, tuple(self.extra))

    def _in(self, *states):
        return [run for run in self.runs if self.state[run] in states]

    def _record(self, run):
        return self.results / f"{run.name}.json"

    def _model_folder(self, run):
        return self.out / "checkpoint" / run.name

    def _is_begun(self, run):
        return checkpoint.exists(self._model_folder(run))

    def output(self, run: Run) -> pathlib.Path:
        """The file of what the run prints."""
        return self.out / "output" / f"{run.name}.txt"

    def epochs_done(self, run: Run) -> int:
        """Epochs in the run's log, those before its fork included."""
        try:
            with open(self.out / "log" / run.name / "log_test.csv", "rb") as file:
                return max(sum(1 for _ in file) - 1, 0)
        except OSError:
            return 0


class View:
    """What runs, what is left, and for how long: a line that is rewritten on a terminal, a line a minute elsewhere."""

    def __init__(self, driver, stream):
        self.driver, self.stream, self.is_terminal = driver, stream, stream.isatty()
        self.started = self.shown = time.monotonic()
        self.at_start = None

    def line(self, text: str) -> None:
        clear = "\r\033[K" if self.is_terminal else ""
        print(f"{clear}{text}", file=self.stream, flush=True)

    def update(self) -> None:
        now = time.monotonic()
        if self.at_start is None:
            self.at_start = self._left()
        if not self.is_terminal and now - self.shown < SECONDS_BETWEEN_LINES:
            return
        self.shown = now
        if self.is_terminal:
            width = os.get_terminal_size(self.stream.fileno()).columns
            print(f"\r\033[K{self.status()[: width - 1]}", end="", file=self.stream, flush=True)
        else:
            self.line(self.status())

    def status(self) -> str:
        """'3 of 24 done, 0 failed, 20 left, 1:02:03 to go; running: NAME (epoch 7 of 40)'."""
        driver = self.driver
        count = collections.Counter(driver.state.values())
        text = f"{count[DONE]} of {len(driver.runs)} done, {count[FAILED]} failed, {count[WAITING]} waiting"
        text += f", {self._time_left()} to go"
        running = [
            f"{run.name} (epoch {driver.epochs_done(run)} of {driver.epochs(run)})"
            for run, state in driver.state.items()
            if state == RUNNING
        ]
        return f"{text}; running: {', '.join(running) or 'none'}"

    def _time_left(self):
        """From the epochs that this driver has seen trained, whatever ran beside each other."""
        left = self._left()
        trained = (self.at_start or left) - left
        return duration((time.monotonic() - self.started) / trained * left) if trained > 0 else "unknown time"

    def _left(self):
        return sum(self._epochs_left(run) for run in self.driver.runs)

    def _epochs_left(self, run):
        driver = self.driver
        if driver.state[run] in (DONE, FAILED):
            return 0
        done = driver.epochs_done(run)
        trunk = max(driver.families[run.family], key=driver.fork_epoch)
        if not done and driver.forks(run) and (trunk is not run or driver.fork_point(run)):
            done = driver.fork_epoch(run)  # another run trains them, or has trained them
        return driver.epochs(run) - done
