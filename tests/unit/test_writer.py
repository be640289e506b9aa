"""Checkpoints and logs are written by a thread while the next epoch is trained: the same files, no error lost."""

import concurrent.futures
import contextlib
import copy
import errno
import io
import json
import os
import signal
import threading
from unittest import mock

import pytest
import torch
from script_runner import (
    DIGITS,
    TINY,
    assert_same_weights,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_logs,
    run_main,
    run_ok,
)

import losses
import models
from experiment import checkpoint, fit, run
from experiment.records import Records, to_json
from experiment.run import Writer, on_cpu
from training.loop import train_one_epoch
from training.optimizer import sgd

THREE = [*DIGITS, *TINY, "--epochs", "3", "--milestones", "2", "--loss_type", "IB", "--start_ib_epoch", "1", "-p", "1"]
#: Seconds after which a test of threads fails instead of waiting for ever.
PATIENCE = 60


class SameThread(Writer):
    """Writes at once."""

    def start(self, write, *args):
        write(*args)


@pytest.fixture(scope="module")
def unthreaded(tmp_path_factory):
    """The folder of a run whose files are written by the main thread; made once, by whoever asks first."""
    folder = tmp_path_factory.mktemp("unthreaded")

    def get(capsys):
        if not (folder / "log").exists():
            with mock.patch.object(run, "Writer", SameThread):
                run_ok(THREE, folder, capsys)
        return folder

    return get


# ------------------------------------------------------------------------------------------------------- the copy


def trained_state():
    """What a checkpoint holds of a model, channels-last, after two steps."""
    torch.manual_seed(0)
    model = models.resnet20(10).to(memory_format=torch.channels_last)
    optimizer, criterion = sgd(model, 0.1, 0.9, 2e-4), losses.IBLoss(torch.ones(10), "auto")
    batches = [(torch.randn(4, 3, 32, 32), torch.arange(4))] * 2
    train_one_epoch(model, batches, criterion, optimizer, 10)
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "criterion": criterion.state_dict()}


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def test_the_copy_of_a_state_is_saved_as_the_same_bytes():
    state = trained_state()
    assert saved(on_cpu(state)) == saved(state)


def test_training_does_not_reach_the_copy():
    state = trained_state()
    copied, before = on_cpu(state), copy.deepcopy(state)
    with torch.no_grad():
        for tensor in [*state["model"].values(), *(s["momentum_buffer"] for s in state["optimizer"]["state"].values())]:
            tensor.add_(1)
    state["optimizer"]["param_groups"][0]["lr"] = 7
    assert saved(copied) == saved(before)


# ----------------------------------------------------------------------------------------------------- the thread


def test_an_error_is_raised_once_and_the_next_job_runs():
    writer, done = Writer(), []
    writer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.wait()
    writer.wait()
    writer.start(done.append, 1)
    writer.close()
    assert done == [1]


def test_close_raises_the_error_of_the_last_job_and_ends_the_thread():
    writer, threads = Writer(), threading.active_count()
    writer.start(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        writer.close()
    assert threading.active_count() == threads


def test_interrupts_are_raised_when_the_job_is_done():
    """Two come while the main thread waits; the job ends after them."""
    writer, interrupted, wait, done, calls = Writer(), threading.Event(), concurrent.futures.wait, [], []

    def wait_interrupted(jobs):
        calls.append(1)
        if len(calls) < 3:
            raise KeyboardInterrupt(len(calls))
        interrupted.set()
        return wait(jobs)

    writer.start(lambda: done.append(interrupted.wait(PATIENCE)))
    with mock.patch("concurrent.futures.wait", wait_interrupted), pytest.raises(KeyboardInterrupt, match="2"):
        writer.wait()
    assert done == [True]
    writer.close()


# ------------------------------------------------------------------------------------------------------ whole runs


def test_the_next_epoch_is_trained_while_a_checkpoint_is_written_and_the_files_are_the_same(
    unthreaded, tmp_path, capsys
):
    """Every write waits until the next epoch's training has begun, and that of the last epoch does not."""
    save, train, training, order = checkpoint.save, fit.train_one_epoch, threading.Semaphore(0), []

    def save_late(folder, names, state):
        if state["epoch"] < 3:
            assert training.acquire(timeout=PATIENCE)
        order.append(f"write {state['epoch']}")
        save(folder, names, state)

    def train_seen(model, *rest):
        if model.bn1.num_batches_tracked > 0:
            training.release()
        figures = train(model, *rest)
        order.append("train")
        return figures

    with mock.patch.object(checkpoint, "save", save_late), mock.patch.object(fit, "train_one_epoch", train_seen):
        run_ok(THREE, tmp_path, capsys)
    assert sorted(order[1:3]) == ["train", "write 1"]
    assert sorted(order[3:5]) == ["train", "write 2"]
    assert order[5] == "write 3"
    whole = unthreaded(capsys)
    for name in ("ckpt.pth.tar", "ckpt.previous.pth.tar", "ckpt.best.pth.tar", "ckpt.epoch001.pth.tar"):
        assert_same_weights(model_folder(tmp_path, "IB") / name, model_folder(whole, "IB") / name)
    names = [sorted(os.listdir(model_folder(folder, "IB"))) for folder in (tmp_path, whole)]
    assert names[0] == names[1]
    assert read_logs(log_folder(tmp_path, "IB")) == read_logs(log_folder(whole, "IB"))


def full_disk(epoch):
    """checkpoint.save, which fails in that epoch."""
    save = checkpoint.save

    def fail(folder, names, state):
        if state["epoch"] == epoch:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}/ckpt.pth.tar")
        save(folder, names, state)

    return mock.patch.object(checkpoint, "save", fail)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_failed_write_ends_the_run_with_one_line(epoch, tmp_path, capsys):
    with full_disk(epoch):
        status, out, err = run_main(THREE, tmp_path, capsys)
    assert status == 1
    (line,) = messages(err)
    assert line.endswith("ckpt.pth.tar: No space left on device")
    assert "logs:" not in out
    newest = model_folder(tmp_path, "IB") / "ckpt.pth.tar"
    assert newest.exists() == (epoch > 1)
    assert epoch == 1 or load_checkpoint(newest)["epoch"] == epoch - 1
    assert len(read_logs(log_folder(tmp_path, "IB"))["log_train.csv"]) == epoch - 1


def test_a_failed_write_stops_the_next_epoch_at_its_first_line(tmp_path, capsys):
    """Not at its end, which may be hours away."""
    failed, train, real = threading.Event(), fit.train_one_epoch, Writer.is_done

    def train_after_the_failure(*args):
        if args[0].bn1.num_batches_tracked > 0:
            assert failed.wait(PATIENCE)
        return train(*args)

    def write(self, state):
        with contextlib.ExitStack() as stack:
            stack.callback(failed.set)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "FILE")

    def is_done(self):  # the job ends a moment after the event is set
        while failed.is_set() and not real(self):
            pass
        return real(self)

    with (
        mock.patch.object(run.Run, "_write", write),
        mock.patch.object(Writer, "is_done", is_done),
        mock.patch.object(fit, "train_one_epoch", train_after_the_failure),
    ):
        status, out, err = run_main(THREE, tmp_path, capsys)
    assert status == 1
    assert len(messages(err)) == 1
    assert "epoch 1/3 done" in out
    assert "epoch 2/3  batch" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_checkpoint_is_written_waits_for_it(number, unthreaded, tmp_path, capsys):
    save = checkpoint.save

    def interrupted(folder, names, state):
        if state["epoch"] == 2:
            os.kill(os.getpid(), number)
        save(folder, names, state)

    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with mock.patch.object(checkpoint, "save", interrupted):
            status, _, err = run_main(THREE, tmp_path, capsys)
    finally:
        signal.signal(signal.SIGINT, ignored)
    assert status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "--resume auto to continue" in messages(err)[0]
    model = model_folder(tmp_path, "IB")
    assert load_checkpoint(model / "ckpt.pth.tar")["epoch"] == 2
    assert not [name for name in os.listdir(model) if name.endswith((".tmp", ".lock"))]
    assert len(read_logs(log_folder(tmp_path, "IB"))["log_train.csv"]) == 2
    run_ok([*THREE, "--resume", "auto"], tmp_path, capsys)
    assert_same_weights(model / "ckpt.pth.tar", model_folder(unthreaded(capsys), "IB") / "ckpt.pth.tar")


# ------------------------------------------------------------------------------------------------------------ logs


def record_of(epoch):
    figures = {"loss": float("nan"), "acc1": 40.0 + epoch, "acc5": 90.0, "seen": 9, "seconds": 0.5}
    groups = {"class_mean": 1 / 3, "many": None, "medium": 2.0, "few": 3.0, "per_class": [0.1, None]}
    return {
        "epoch": epoch, "time": 1e9 + epoch, "seconds": 1.5, "score": figures["acc1"], "ib_factor": None, "alpha": None,
        "stage": {"lr": 0.1, "loss": "CE", "class_weights": "none", "sampler": "none"},
        "train": figures, "test": {**figures, **groups}, "val": None,
    }  # fmt: skip


INFO = {"name": "a ünïcode \udce9 name", "settings": {"seed": 1}, "split": {"sha256": "0"}, "classes": ["a", "b"]}


def test_files_that_grew_are_those_made_of_the_whole_history(tmp_path):
    history, files = [record_of(epoch) for epoch in range(4)], []
    for folder, known in (("grown", []), ("resumed", history[:2]), ("made", history)):
        with contextlib.closing(Records(str(tmp_path / folder), ["a", "b"], INFO, known)) as records:
            for record in history[len(known) :]:
                records.add(record)
        names = [n for n in sorted(os.listdir(tmp_path / folder)) if not n.startswith("events")]
        files.append({name: (tmp_path / folder / name).read_bytes() for name in names})
    assert len(files[0]) == 5
    assert files[0] == files[1] == files[2]


def test_the_summary_is_the_json_of_everything(tmp_path):
    history = [record_of(epoch) for epoch in range(3)]
    Records(str(tmp_path), ["a", "b"], INFO, history).close()
    figures = {"epoch": 2, **history[2]["test"]}
    content = {**INFO, "epochs_count_from": 0, "epochs_done": 3, "history": history, "best": figures, "last": figures}
    assert (tmp_path / "summary.json").read_text() == to_json(content)
    assert json.loads(to_json(content))["history"][2]["epoch"] == 2
