"""reproduce.py run: what is shared is trained once, with the same bits; killed, failed and lost runs."""

import contextlib
import csv
import io
import json
import pathlib
import shutil
import subprocess
import sys
from datetime import timedelta

import numpy as np
import psutil
import pytest
import script_runner
from PIL import Image
from script_runner import REPOSITORY

import experiment.run
import folder_train
import models
import reproduce
from files import run_lock
from paper import driver, executors, records, runs
from paper.runs import Run
from utils import UsageError

#: Flags after a run's own: three epochs.
EXTRA = ["--batch-size", "128", "--epochs", "3", "--milestones", "2", "--checkpoint_seconds", "0"]


@pytest.fixture
def three_epochs(monkeypatch):
    """The digits' runs in three epochs, with the tiny model; the rules that are deferred start with the third."""
    setup = runs.Setup("cifar_train.py", "tiny", 3, 2, (1,), 2, batch_size=64, lr_factors=(0.1,), ib_lr_factor=0.1)
    monkeypatch.setitem(runs.SETUPS, "digits", setup)
    monkeypatch.setitem(models.CIFAR_MODELS, "tiny", script_runner.tiny)


class InProcess:
    """An executor that trains in this process at once; `broken` are parts of names that fail."""

    threads = 1

    def __init__(self, broken=()):
        self.broken, self.ended, self.commands = broken, [], []

    def room(self):
        return not self.ended

    def start(self, run, command, log):
        self.commands.append((run.name, command))
        if any(part in run.name for part in self.broken):
            self.ended.append((run, 1))
            return
        if command[0].endswith("folder_train.py"):
            status, out, err = script_runner.run_script(folder_train, command[1:], ".")
        else:
            status, out, err = script_runner.run_main(command[1:], ".")
        pathlib.Path(log).write_text(out + err)
        self.ended.append((run, status))

    def wait(self, seconds):
        ended, self.ended = self.ended, []
        return ended

    def stop(self):
        pass


def drive(chosen, out, executor, extra=()):
    """(driver, failed runs, what it printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as text:
        work = driver.Driver(chosen, out, out / "results", executor, extra)
        failed = work.run()
    return work, failed, text.getvalue()


def cell(methods, variants=("",)):
    return [Run("digits", "exp", 100, method, variant) for method in methods for variant in variants]


FOUR = ("CE", "IB", "IB+CB", "IB+Focal")
DEFERRED = ("CE+DRW-IB", "CE+DRS", "LDAM", "LDAM-DRW")


def newest(out, run):
    return out / "checkpoint" / run.name / "ckpt.pth.tar"


def test_shared_epochs_are_trained_once_with_the_same_bits(three_epochs, tmp_path):
    """By forks of CE, and of an IB run without CE: each is the run of its own listed command, trained alone."""
    everything, separate = [*cell(FOUR), *cell(["CE"], ["ib-lr"]), *cell(DEFERRED)], tmp_path / "separate"
    for run in everything:
        script_runner.run_ok([*run.argv(separate)[1:], "--threads", "1"], tmp_path)
    for chosen, forked, trained in ((everything, 7, 3 + 3 * 1 + 1 + 2 * 1 + 3 + 1), (cell(FOUR[1:]), 2, 3 + 1 + 1)):
        executor, shared = InProcess(), tmp_path / f"shared{len(chosen)}"
        work, failed, text = drive(chosen, shared, executor)
        assert failed == []
        forks = [name for name, command in executor.commands if command[command.index("--resume") + 1] != "auto"]
        assert len(forks) == forked
        for run in chosen:
            script_runner.assert_same_run(newest(shared, run).parent, newest(separate, run).parent)
        epochs = sum("done in" in line for run in chosen for line in work.output(run).read_text().splitlines())
        assert epochs == trained
        assert text.count("done ") == len(chosen)


def test_forks_follow_the_flags_for_every_script(tmp_path, three_epochs):
    extra = ["--start_ib_epoch", "1"]  # 2 without them
    chosen = cell(["CE", "IB"])
    executor = InProcess()
    work, failed, _ = drive(chosen, tmp_path, executor, extra)
    assert failed == []
    forked = [command[command.index("--resume") + 1] for _, command in executor.commands]
    assert [pathlib.Path(path).name for path in forked] == ["auto", "ckpt.epoch001.pth.tar"]
    assert [sum("done in" in line for line in work.output(run).read_text().splitlines()) for run in chosen] == [3, 2]
    with pytest.raises(UsageError, match=r"CE \(ib-lr\) sets --start_ib_epoch itself"):
        driver.check_extra(cell(["CE"], ["ib-lr"]), extra)


def test_finished_runs_are_skipped_and_their_records_are_small_and_complete(three_epochs, tmp_path):
    chosen = cell(["CE", "IB"])
    drive(chosen, tmp_path, InProcess())
    executor = InProcess()
    assert drive(chosen, tmp_path, executor)[1] == []
    assert executor.commands == []
    (_, summary), (_, record) = (records.read(tmp_path / folder)[0][0] for folder in ("log", "results"))
    assert [r["test"]["acc1"] for r in record["history"]] == pytest.approx(
        [r["test"]["acc1"] for r in summary["history"]], abs=1e-4
    )
    assert record["split"] == summary["split"]
    assert record["last"]["per_class"] == pytest.approx(summary["last"]["per_class"], abs=1e-4)
    assert record["code"] == summary["code"]
    assert str(tmp_path) not in (tmp_path / "results" / f"{chosen[0].name}.json").read_text()


DAMAGED = {
    "cut short": (lambda text: text[:2000], "(damaged or cut short)"),
    "of other settings": (lambda text: text.replace('"momentum": 0.9', '"momentum": 0.5'), "(momentum 0.5)"),
    "of half a run": (lambda text: text.replace('"epochs_done": 3', '"epochs_done": 2'), "unfinished, 2 of 3 epochs"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_record_that_is_not_the_runs_is_noticed_and_made_again(damage, three_epochs, tmp_path):
    (run,) = chosen = cell(["CE"])
    drive(chosen, tmp_path, InProcess())
    path = tmp_path / "results" / f"{run.name}.json"
    before = path.read_text()
    change, reason = DAMAGED[damage]
    path.write_text(change(before))
    assert path.read_text() != before
    executor = InProcess()
    work, failed, text = drive(chosen, tmp_path, executor)
    assert failed == []
    assert reason in text
    assert len(executor.commands) == 1
    assert "nothing to do" in work.output(run).read_text(), "the run is there: only its record was not"
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("methods", "said"),
    [
        (["CE", "IB", "IB+CB"], "3 runs, 5 epochs to train, shared ones once, 2 at a time; the time shows"),
        (["CE", "CE+cRT"], "2 runs, 14 epochs to train"),  # 3 and 11, one of them twice
    ],
)
def test_run_says_how_much_it_is_about_to_train(methods, said, three_epochs, tmp_path):
    work = driver.Driver(cell(methods), tmp_path, tmp_path / "results", executors.Local(2, 1))
    assert said in work.announcement()


def test_the_estimate_is_made_from_the_records_that_are_there(tmp_path):
    source = REPOSITORY / "results" / "cifar10_lt100" / "cifar10_resnet32_CE_None_exp_0.01_full_s0.json"
    (tmp_path / "results").mkdir()
    shutil.copy(source, tmp_path / "results")
    seconds = [epoch["seconds"] for epoch in records.load(source)["history"]]
    chosen = [Run("cifar10", "exp", 100, "CE", seed=seed) for seed in (0, 1)]
    said = driver.Driver(chosen, tmp_path, tmp_path / "results", executors.Local(1, 1)).announcement()
    expected = timedelta(seconds=round(200 * sum(seconds) / len(seconds)))
    assert said.startswith("2 runs, 1 of them done, 200 epochs to train")
    assert f"about {expected} at the pace" in said


def test_methods_are_compared_on_a_folder(tmp_path, monkeypatch):
    """The one command of the page, then report, on images that tell their class by their colour."""
    monkeypatch.setattr(runs, "OWN_SETUPS", {})
    rng = np.random.default_rng(0)
    for part, counts in {"train": (12, 6, 3), "val": (4, 4, 4)}.items():
        for label, count in enumerate(counts):
            folder = tmp_path / "leaves" / part / "abc"[label]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 60, (32, 32, 3)) + np.eye(3, dtype=int)[label] * 150
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    argv = ["--dataset", "folder", "--method", "CE", "IB", "cRT", "--seeds", "0", "--out", str(tmp_path)]
    argv += ["--", "--data_dir", str(tmp_path / "leaves"), "-a", "shufflenet_v2_x0_5", "--epochs", "4"]
    argv += ["--image_size", "32", "-b", "8", "-j", "0", "--lr", "0.01", "--warmup_epochs", "0"]
    options = reproduce.build_parser().parse_args(["run", *argv])
    chosen = reproduce.select(options)
    executor = InProcess()
    work, failed, _ = drive(chosen, tmp_path, executor, options.extra)
    assert failed == [], [work.output(run).read_text() for run in failed]
    forks = [pathlib.Path(command[command.index("--resume") + 1]).name for _, command in executor.commands]
    assert forks == ["auto", "ckpt.epoch002.pth.tar", "ckpt.epoch003.pth.tar"]
    logs = {run.method: tmp_path / "log" / run.name for run in chosen}
    runs.OWN_SETUPS.clear()  # report is another process
    reproduce.main(["report", str(tmp_path / "results"), "--csv"])
    text = (tmp_path / "results" / "report.md").read_text()
    assert "## leaves, as the data are" in text
    with open(tmp_path / "results" / "report.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["CE", "IB", "CE+cRT"]
    for method, folder in logs.items():
        summary = json.loads((folder / "summary.json").read_text())
        assert float(rows[method]["last_class_mean"]) == pytest.approx(summary["last"]["class_mean"], abs=1e-3)
    assert "| IB minus CE | 1 |" in text
    assert (tmp_path / "results" / "methods_leaves_none_1_own.png").exists()
    # a run is done whose record is all that is left, also of a folder without val/, where the script sets test_fraction
    shutil.rmtree(tmp_path / "checkpoint")
    for path in (tmp_path / "results").glob("leaves*.json"):
        path.write_text(path.read_text().replace('"test_fraction": 0.0', '"test_fraction": 0.25'))
    options, executor = reproduce.build_parser().parse_args(["run", *argv]), InProcess()
    drive(reproduce.select(options), tmp_path, executor, options.extra)
    assert executor.commands == []


def test_a_failed_run_is_named_the_rest_continues_and_the_next_time_it_runs(three_epochs, tmp_path):
    chosen = cell(FOUR)
    work, failed, text = drive(chosen, tmp_path, InProcess(broken=["_CE_", "IBFocal"]))
    assert failed == [chosen[0], chosen[3]]
    assert text.count("failed ") == 2
    assert [work.state[run] for run in chosen] == ["failed", "done", "done", "failed"]
    executor = InProcess()
    assert drive(chosen, tmp_path, executor)[1] == []
    assert [name for name, _ in executor.commands] == [chosen[0].name, chosen[3].name]


def test_runs_that_wait_for_one_that_was_stopped_do_not_train_its_epochs_anew(three_epochs, tmp_path, monkeypatch):
    save, stopping, executor = experiment.run.Run.save, InProcess(), InProcess()

    def save_and_stop(run, record, *args):
        save(run, record, *args)
        raise KeyboardInterrupt

    chosen = cell(FOUR)
    with monkeypatch.context() as patch:
        patch.setattr(experiment.run.Run, "save", save_and_stop)
        _, failed, text = drive(chosen, tmp_path, stopping)
    assert failed == chosen
    assert [name for name, _ in stopping.commands] == [chosen[0].name]
    assert text.count(f"it continues from {chosen[0].name}") == 3
    assert newest(tmp_path, chosen[0]).exists()
    assert drive(chosen, tmp_path, executor)[1] == []
    forks = [command[command.index("--resume") + 1] for _, command in executor.commands]
    assert forks[0] == "auto"
    assert {pathlib.Path(path).parent.name for path in forks[1:]} == {chosen[0].name}


def test_a_run_whose_machine_goes_away_continues_and_is_given_up_in_the_end(three_epochs, tmp_path):
    class Losing(InProcess):
        def wait(self, seconds):
            return [(run, executors.LOST) for run, _ in super().wait(seconds)]

    (run,) = chosen = cell(["CE"])
    executor = Losing()
    _, failed, text = drive(chosen, tmp_path, executor)
    assert failed == [run]
    assert text.count("it continues elsewhere") == driver.MAX_LOSSES
    assert len(executor.commands) == driver.MAX_LOSSES + 1


def test_only_one_driver_works_in_a_folder(tmp_path):
    argv, words = ["run", "--table", "2", "--out", tmp_path], "is in use by process"
    with run_lock(tmp_path):
        script_runner.refused(argv, tmp_path, words, status=1, run=script_runner.run_reproduce)


# ------------------------------------------------------------------------------------------ as processes


def arguments(out, *flags):
    """Of reproduce.py: a short digits run, made three epochs by flags of the script."""
    select = ["--dataset", "digits", "--ratio", "100", "--protocol", "short", "--method", "CE"]
    return ["run", *select, "--out", str(out), "--", *EXTRA, *flags]


def test_a_killed_driver_takes_its_children_along_and_continues_afterwards(tmp_path):
    args = arguments(tmp_path, "--epochs", "6")  # enough for the kill to come in the middle
    command = [sys.executable, str(REPOSITORY / "reproduce.py"), *args]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=script_runner.environment())
    run = Run("digits", "exp", 100, "CE", protocol="short")
    log = tmp_path / "log" / run.name / "log_test.csv"
    script_runner.wait_for(newest(tmp_path, run).exists)
    (child,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    script_runner.wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert 2 <= log.read_text().count("\n") < 7, "stopped in the middle"
    reproduce.main(args)
    assert "resumes from" in (tmp_path / "output" / f"{run.name}.txt").read_text()
    assert records.read(tmp_path / "results")[0][0][1]["epochs_done"] == 6


def test_a_run_that_fails_gives_status_1_and_names_its_log(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(arguments(tmp_path, "--pretrained", "nowhere.pth"))
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert "no checkpoint at nowhere.pth" in out
    assert "output/digits_resnet20_CE_None_exp_0.01_short_s0.txt" in out
    assert err == "reproduce.py: error: 1 of 1 runs failed; the same command tries them again\n"
