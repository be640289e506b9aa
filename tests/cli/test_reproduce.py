"""reproduce.py run: what is shared is trained once, with the same bits; killed, failed and lost runs."""

import contextlib
import csv
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import script_runner
from PIL import Image

import experiment.run
import models
import reproduce
from files import run_lock
from paper import driver, executors, records, runs
from paper.runs import Run
from utils import Terminated, duration

REPOSITORY = pathlib.Path(__file__).parent.parent.parent
#: Flags after a run's own: three epochs, the IB phase in the last one.
EXTRA = ["-a", "resnet20", "--batch-size", "128", "--epochs", "3", "--start_ib_epoch", "2"]
EXTRA += ["--milestones", "2", "--lr_factors", "0.1"]


@pytest.fixture
def three_epochs(monkeypatch):
    """The digits' runs in three epochs, with the tiny model; the rules that are deferred start with the third."""
    setup = runs.Setup("cifar_train.py", "tiny", 3, 2, (1,), 2, batch_size=64, lr_factors=(0.1,), ib_lr_factor=0.1)
    monkeypatch.setitem(runs.SETUPS, "digits", setup)
    monkeypatch.setitem(models.CIFAR_MODELS, "tiny", script_runner.tiny)


class InProcess:
    """An executor that trains in this process at once; `broken` are parts of names that fail."""

    def __init__(self, capsys, broken=()):
        self.capsys, self.broken, self.ended, self.commands = capsys, broken, [], []

    def room(self):
        return not self.ended

    def start(self, run, command, log):
        self.commands.append((run.name, command))
        if any(part in run.name for part in self.broken):
            self.ended.append((run, 1))
            return
        status, out, err = script_runner.run_main(command[1:], ".", self.capsys)
        pathlib.Path(log).write_text(out + err)
        self.ended.append((run, status))

    def wait(self, seconds):
        ended, self.ended = self.ended, []
        return ended

    def stop(self):
        pass


def drive(chosen, out, executor, extra=()):
    """(driver, failed runs, what it printed)."""
    text = io.StringIO()
    work = driver.Driver(chosen, out, out / "results", executor, extra, threads=1, stream=text)
    return work, work.run(), text.getvalue()


def cell(methods, variants=("",)):
    return [Run("digits", "exp", 100, method, variant) for method in methods for variant in variants]


FOUR = ("CE", "IB", "IB+CB", "IB+Focal")
DEFERRED = ("CE+DRW-IB", "CE+DRS", "LDAM", "LDAM-DRW")


def newest(out, run):
    return out / "checkpoint" / run.name / "ckpt.pth.tar"


@pytest.fixture
def separate(three_epochs, tmp_path, capsys):
    """Every run of the cell and its controls trained alone, from its own listed command."""
    out = tmp_path / "separate"
    for run in [*cell(FOUR), *cell(["CE"], ["ib-lr"]), *cell(DEFERRED)]:
        script_runner.run_ok([*run.argv(out)[1:], "--threads", "1"], tmp_path, capsys)
    return out


@pytest.mark.parametrize("with_ce", [True, False], ids=["from CE", "from an IB run"])
def test_shared_epochs_are_trained_once_with_the_same_bits(with_ce, separate, tmp_path, capsys, three_epochs):
    chosen = cell(FOUR if with_ce else FOUR[1:])
    chosen += [*cell(["CE"], ["ib-lr"]), *cell(DEFERRED)] if with_ce else []
    executor = InProcess(capsys)
    work, failed, text = drive(chosen, tmp_path / "shared", executor)
    assert failed == []
    forks = [name for name, command in executor.commands if command[command.index("--resume") + 1] != "auto"]
    assert len(forks) == (7 if with_ce else 2)
    for run in chosen:
        script_runner.assert_same_weights(newest(tmp_path / "shared", run), newest(separate, run))
        logs = [script_runner.read_logs(out / "log" / run.name) for out in (tmp_path / "shared", separate)]
        assert logs[0] == logs[1]
    epochs = sum("done in" in line for run in chosen for line in work.output(run).read_text().splitlines())
    assert epochs == (3 + 3 * 1 + 1 + 2 * 1 + 3 + 1 if with_ce else 3 + 1 + 1)
    assert text.count("done ") == len(chosen)


def test_forks_follow_the_flags_for_every_script(tmp_path, capsys, three_epochs):
    extra = ["--start_ib_epoch", "1"]  # 2 without them
    chosen = [*cell(["CE", "IB"]), *cell(["CE"], ["ib-lr"])]
    executor = InProcess(capsys)
    work, failed, _ = drive(chosen, tmp_path, executor, extra)
    assert failed == []
    forked = [command[command.index("--resume") + 1] for _, command in executor.commands]
    assert [pathlib.Path(path).name for path in forked] == ["auto", *["ckpt.epoch001.pth.tar"] * 2]
    assert [sum("done in" in line for line in work.output(run).read_text().splitlines()) for run in chosen] == [3, 2, 2]


def test_epochs_left_of_a_fork_are_its_own(tmp_path, capsys, three_epochs):
    (ce, ib), executor = cell(["CE", "IB"]), InProcess(capsys)
    drive([ce, ib], tmp_path, executor)
    for folder in ("log", "checkpoint", "results"):
        for path in (tmp_path / folder).glob(f"{ib.name}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    work = driver.Driver([ib], tmp_path, tmp_path / "results", executor, stream=io.StringIO())
    assert work.view.status().startswith("0 of 1 done")
    assert work.view._left() == 1


def test_runs_that_end_before_they_could_fork_do_not_wait(tmp_path, capsys, three_epochs):
    extra = ["--epochs", "2", "--milestones", "1"]  # the IB loss would start with the third
    chosen, executor = cell(["CE", "IB"]), InProcess(capsys)
    work = driver.Driver(chosen, tmp_path, tmp_path / "results", executor, extra, stream=io.StringIO())
    assert list(map(work.fork_epoch, chosen)) == [2, 2]
    assert [work._must_wait(run) for run in chosen] == [False, False]
    assert work.view._left() == 4
    assert work.run() == []
    assert all(command[command.index("--resume") + 1] == "auto" for _, command in executor.commands)
    assert work.view._left() == 0


def test_finished_runs_are_skipped_and_their_records_are_small_and_complete(three_epochs, tmp_path, capsys):
    chosen = cell(["CE", "IB"])
    drive(chosen, tmp_path, InProcess(capsys))
    executor = InProcess(capsys)
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
    "emptied": (lambda text: "{}", "(arch None, batch_size 128, dataset None"),
    "of other settings": (lambda text: text.replace('"momentum": 0.9', '"momentum": 0.5'), "(momentum 0.5)"),
    "of another seed": (lambda text: text.replace('"seed": 0', '"seed": 7'), "(seed 7)"),
    "of half a run": (lambda text: text.replace('"epochs_done": 3', '"epochs_done": 2'), "unfinished, 2 of 3 epochs"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_record_that_is_not_the_runs_is_noticed_and_made_again(damage, three_epochs, tmp_path, capsys):
    (run,) = chosen = cell(["CE"])
    drive(chosen, tmp_path, InProcess(capsys))
    path = tmp_path / "results" / f"{run.name}.json"
    before = path.read_text()
    change, reason = DAMAGED[damage]
    path.write_text(change(before))
    assert path.read_text() != before
    executor = InProcess(capsys)
    work, failed, text = drive(chosen, tmp_path, executor)
    assert failed == []
    assert reason in text
    assert len(executor.commands) == 1
    assert "nothing to do" in work.output(run).read_text(), "the run is there: only its record was not"
    assert path.read_text() == before


def test_a_run_with_other_flags_than_its_record_is_not_taken_for_done(three_epochs, tmp_path, capsys):
    chosen = cell(["CE"])
    drive(chosen, tmp_path, InProcess(capsys))
    work, failed, text = drive(chosen, tmp_path, InProcess(capsys), ["--momentum", "0.5"])
    assert failed == chosen
    assert "(momentum 0.9)" in text
    assert "holds a run with other settings (momentum" in work.output(chosen[0]).read_text()


REFUSED = {
    "exp_str": "--exp_str foo", "root_model": "--root_m X", "resume": "-e --resume X", "seed": "--seed 1",
    "arch": "-a resnet44", "imb_factor": "--imb_factor 0.5", "no_such_flag": "--no_such_flag",
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_flags_that_cannot_stand_after_the_dashes_are_refused_before_anything_runs(name, tmp_path, capsys):
    select = ["--dataset", "digits", "--ratio", "20", "--method", "CE", "IB"]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["run", *select, "--out", str(tmp_path / "out"), "--", *REFUSED[name].split()])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (f"reproduce.py sets --{name} itself" if name != "no_such_flag" else "--no_such_flag") in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("select", "said"),
    [
        # CE whole, IB and IB+CB their second halves
        ("--ratio 20 --method CE IB IB+CB", "3 runs, 80 epochs in all, shared ones once, 1 at a time; the time shows"),
        ("--method IB --jobs 2", "4 runs (ratios 100 50 20 10: --ratio restricts them), 160 epochs in all"),
        ("--ratio 20 --method CE CE+cRT", "2 runs, 43 epochs in all"),  # 40 and 2, one of them twice
    ],
)
def test_run_says_how_much_it_is_about_to_train(select, said, tmp_path, capsys):
    argv = ["run", "--dataset", "digits", "--protocol", "short", *select.split(), "--out", str(tmp_path)]
    options = reproduce.build_parser().parse_args(argv)
    assert said in reproduce._what_is_about_to_start(reproduce.select(options), options)


def test_the_estimate_is_made_from_the_records_that_are_there(tmp_path):
    source = REPOSITORY / "results" / "cifar10_lt100" / "cifar10_resnet32_CE_None_exp_0.01_full_s0.json"
    (tmp_path / "results").mkdir()
    shutil.copy(source, tmp_path / "results")
    seconds = [epoch["seconds"] for epoch in records.load(source)["history"]]
    options = reproduce.build_parser().parse_args(["run", "--ratio", "100", "--method", "CE", "--out", str(tmp_path)])
    expected = duration(200 * sum(seconds) / len(seconds))
    assert f"about {expected} at the pace" in reproduce._what_is_about_to_start(reproduce.select(options), options)


def test_methods_are_compared_on_a_folder(tmp_path, capsys, monkeypatch):
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
    executor = InProcess(capsys)
    work, failed, _ = drive(chosen, tmp_path, executor, options.extra)
    assert failed == [], [work.output(run).read_text() for run in failed]
    forks = [pathlib.Path(command[command.index("--resume") + 1]).name for _, command in executor.commands]
    assert forks == ["auto", "ckpt.epoch002.pth.tar", "ckpt.epoch003.pth.tar"]
    reproduce.main(["report", str(tmp_path / "results"), "--csv"])
    text = (tmp_path / "results" / "report.md").read_text()
    assert "## leaves, as the data are" in text
    with open(tmp_path / "results" / "report.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["CE", "IB", "CE+cRT"]
    for run in chosen:
        summary = json.loads((tmp_path / "log" / run.name / "summary.json").read_text())
        assert float(rows[run.method]["last_class_mean"]) == pytest.approx(summary["last"]["class_mean"], abs=1e-3)
    assert "| IB minus CE | 1 |" in text
    assert (tmp_path / "results" / "methods_leaves_none_1_own.png").exists()


def test_a_failed_run_is_named_the_rest_continues_and_the_next_time_it_runs(three_epochs, tmp_path, capsys):
    chosen = cell(FOUR)
    work, failed, text = drive(chosen, tmp_path, InProcess(capsys, broken=["_CE_", "IBFocal"]))
    assert failed == [chosen[0], chosen[3]]
    assert text.count("failed ") == 2
    assert [work.state[run] for run in chosen] == ["failed", "done", "done", "failed"]
    executor = InProcess(capsys)
    assert drive(chosen, tmp_path, executor)[1] == []
    assert [name for name, _ in executor.commands] == [chosen[0].name, chosen[3].name]


def test_runs_that_wait_for_one_that_was_stopped_do_not_train_its_epochs_anew(
    three_epochs, tmp_path, capsys, monkeypatch
):
    save, stopping, executor = experiment.run.Run.save, InProcess(capsys), InProcess(capsys)

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


def test_a_run_whose_machine_goes_away_continues_and_is_given_up_in_the_end(three_epochs, tmp_path, capsys):
    class Losing(InProcess):
        def wait(self, seconds):
            return [(run, executors.LOST) for run, _ in super().wait(seconds)]

    (run,) = chosen = cell(["CE"])
    executor = Losing(capsys)
    _, failed, text = drive(chosen, tmp_path, executor)
    assert failed == [run]
    assert text.count("it continues elsewhere") == driver.MAX_LOSSES
    assert len(executor.commands) == driver.MAX_LOSSES + 1


def test_ray_leaves_sigterm_to_us(monkeypatch):
    """With a stand-in for Ray, which takes the signal's handler and turns what comes while it waits into Ctrl-C."""

    def init(**options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def wait(references, num_returns, timeout):
        if timeout:
            raise KeyboardInterrupt
        return [], references

    def remote(**resources):
        return lambda function: types.SimpleNamespace(remote=lambda *arguments: "reference")

    def stop(*frame):
        raise Terminated

    fake = types.SimpleNamespace(
        cloudpickle=types.SimpleNamespace(register_pickle_by_value=lambda module: None),
        init=init,
        wait=wait,
        remote=remote,
    )
    monkeypatch.setitem(sys.modules, "ray", fake)
    monkeypatch.setattr(executors.time, "sleep", lambda seconds: signal.raise_signal(signal.SIGTERM))
    before = signal.signal(signal.SIGTERM, stop)
    try:
        executor = executors.Ray(None, 1, 0, None)
        executor.start("run", ["script"], "log")
        with pytest.raises(Terminated):
            executor.wait(60)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_starts_of_figure_3_fork_from_one_run(three_epochs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(runs.VARIANTS, "start001", {"start_ib_epoch": 1})
    chosen = cell(["IB"], ["", "start001"])
    work, failed, _ = drive(chosen, tmp_path, InProcess(capsys))
    assert failed == []
    command = work.command(chosen[1])
    assert "--keep_warmup" in command
    assert (tmp_path / "checkpoint" / chosen[1].name / "ckpt.epoch001.pth.tar").exists()
    assert "resumes from" in work.output(chosen[1]).read_text()


def test_only_one_driver_works_in_a_folder(tmp_path, capsys):
    with run_lock(tmp_path), pytest.raises(SystemExit) as stop:
        reproduce.main(["run", "--table", "2", "--out", str(tmp_path)])
    assert stop.value.code == 1
    assert "is in use by process" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------ as processes


def arguments(out, methods, *flags):
    """reproduce.py run of short digits runs, shortened to three epochs by flags of the scripts."""
    select = ["--dataset", "digits", "--ratio", "20", "--protocol", "short", "--method", *methods]
    return [sys.executable, str(REPOSITORY / "reproduce.py"), "run", *select, "--out", str(out), *flags, "--", *EXTRA]


def state_of(pid):
    """(state, parent) of a process, None where there is none."""
    with contextlib.suppress(OSError):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return fields[0], int(fields[1])
    return None


def is_alive(pid):
    return state_of(pid) is not None and state_of(pid)[0] not in "ZX"


def children(parent):
    pids = [int(path.name) for path in pathlib.Path("/proc").glob("[0-9]*")]
    return [pid for pid in pids if (state := state_of(pid)) and state[1] == parent]


def wait_for(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.skipif(not pathlib.Path("/proc").exists(), reason="needs Linux's /proc")
def test_a_killed_driver_takes_its_children_along_and_continues_afterwards(tmp_path):
    command = arguments(tmp_path, ["CE"])
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=script_runner.environment())
    run = Run("digits", "exp", 20, "CE", protocol="short")
    log = tmp_path / "log" / run.name / "log_test.csv"
    wait_for(lambda: log.exists() and log.read_text().count("\n") >= 2)
    (child,) = children(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_for(lambda: not is_alive(child))
    assert 2 <= log.read_text().count("\n") < 4, "stopped in the middle"
    subprocess.run(command, check=True, env=script_runner.environment(), capture_output=True)
    assert "resumes from" in (tmp_path / "output" / f"{run.name}.txt").read_text()
    whole = run.argv(tmp_path / "whole")[1:]
    assert script_runner.run_process([*whole, "--threads", "1", *EXTRA], tmp_path).returncode == 0
    script_runner.assert_same_weights(newest(tmp_path, run), newest(tmp_path / "whole", run))


def test_a_run_that_fails_gives_status_1_and_names_its_log(tmp_path):
    command = [*arguments(tmp_path, ["CE"]), "--pretrained", "nowhere.pth"]
    done = subprocess.run(command, capture_output=True, text=True, env=script_runner.environment())
    assert done.returncode == 1
    assert "no checkpoint at nowhere.pth" in done.stdout
    assert "output/digits_resnet20_CE_None_exp_0.05_short_s0.txt" in done.stdout
    assert done.stderr.splitlines()[-1] == (
        "reproduce.py: error: 1 of 1 runs failed; the same command tries them again"
    )
