"""What a run leaves, read back: CSV, TensorBoard, figures, evaluation, published checkpoints."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from script_runner import (
    DIGITS,
    FOUR,
    TINY,
    TWO_EPOCHS,
    assert_same_weights,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    refused,
    run_main,
    run_ok,
    scalars,
    snapshot,
)

from experiment.records import Records
from experiment.screen import Progress
from training.metrics import MetricAccumulator

FIGURES = ["class_accuracy.png", "confusion.png", "curves.png"]


def same(pairs, rows, column):
    """TensorBoard's (step, value) pairs are the column of the CSV rows, to float32."""
    assert [step for step, _ in pairs] == [int(row["epoch_from_0"]) for row in rows]
    assert [value for _, value in pairs] == pytest.approx([float(row[column]) for row in rows], rel=1e-6)


def test_tensorboard_has_what_the_csv_files_have_and_no_step_twice(tmp_path):
    """Of a run that is resumed in the IB phase."""
    run_ok([*FOUR, "--keep_epochs", "3", "--exp_str", "first"], tmp_path)
    path = model_folder(tmp_path, "IB", exp="first") / "ckpt.epoch003.pth.tar"
    run_ok([*FOUR, "--resume", path], tmp_path)
    folder = log_folder(tmp_path, "IB")
    read = scalars(folder)
    train, test = read_csv(folder / "log_train.csv"), read_csv(folder / "log_test.csv")
    classes = read_csv(folder / "class_accuracy.csv")
    assert len(train) == 4
    for name in ("loss", "acc1", "acc5"):
        same(read[f"train/{name}"], train, name)
        same(read[f"test/{name}"], test, name)
    for name in ("class_mean", "many", "medium", "few"):
        same(read[f"test/{name}"], test, name)
    same(read["lr"], train, "lr")
    history = json.loads((folder / "summary.json").read_text())["history"]
    for k in map(str, range(10)):
        same(read[f"class_accuracy/{k}"], classes, k)
        steps, values = zip(*read[f"ib_factor/{k}"], strict=True)
        assert steps == (2, 3)
        assert values == pytest.approx([history[e]["ib_factor"][int(k)] for e in steps], rel=1e-6)
        assert min(values) > 0
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1


# --------------------------------------------------------------------------------------------------- figures


def assert_drawn(path):
    """An image of a sensible size, with something on it in every third of its width."""
    with Image.open(path) as image:
        assert min(image.size) > 300
        pixels = np.asarray(image.convert("L"), dtype=float)
    assert pixels.std() > 10
    for part in np.array_split(pixels, 3, axis=1):
        assert part.std() > 5, path


@pytest.fixture(scope="module")
def with_figures(tmp_path_factory):
    """The folder of a finished four-epoch IB run with its figures, and what it printed."""
    folder = tmp_path_factory.mktemp("figures")
    return folder, run_ok(FOUR, folder, figures=True)


def test_figures_are_there_and_not_blank(with_figures):
    cwd, out = with_figures
    folder = log_folder(cwd, "IB")
    assert sorted(path.name for path in folder.glob("*.png")) == FIGURES
    for name in FIGURES:
        assert_drawn(folder / name)
        assert str((folder / name).relative_to(cwd)) in out


def test_the_curves_mark_the_switch_to_ib(with_figures, tmp_path):
    # the same history with a loss that starts at once: the only difference is the dashed line and its legend
    from experiment import plots

    cwd, _ = with_figures
    summary = json.loads((log_folder(cwd, "IB") / "summary.json").read_text())
    for record in summary["history"]:
        record["stage"]["loss"] = "IBalanced"
    settings = summary["settings"]
    (path,) = plots.of_history(summary["history"], settings["start_ib_epoch"], str(tmp_path), summary["name"])
    with Image.open(path) as without, Image.open(log_folder(cwd, "IB") / "curves.png") as marked:
        assert without.size == marked.size
        differs = np.asarray(without.convert("L")) != np.asarray(marked.convert("L"))
    columns = differs.sum(0)
    assert columns.max() > 0.2 * differs.shape[0], "no vertical line"
    assert (columns == 0).mean() > 0.5, "the rest of the figure is the same"


def test_without_matplotlib_a_run_ends_well_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    status, out, err = run_main([*TWO_EPOCHS, *TINY], tmp_path, figures=True)
    assert status == 0
    assert "warning: matplotlib is not installed: no figures" in err
    assert "figures: none" in out
    assert not list(tmp_path.rglob("*.png"))


# ------------------------------------------------------------------------------------------------ evaluation


def test_evaluating_gives_the_recorded_accuracy_and_leaves_the_run_alone(with_figures, tmp_path):
    cwd = shutil.copytree(with_figures[0], tmp_path / "copy")
    folder = log_folder(cwd, "IB")
    before = snapshot(cwd)
    path = model_folder(cwd, "IB") / "ckpt.best.pth.tar"
    out = run_ok([*FOUR, "-e", "--resume", path], cwd, figures=True)
    after, figures = snapshot(cwd), ("confusion.png", "class_accuracy.png", "calibration.png")
    assert {name: after[name] for name in before} == before
    new = {Path(name).name for name in after.keys() - before.keys()}
    assert new == {"evaluate", "ckpt.best", "evaluation.json", "errors.csv", *figures}
    for name in figures:
        assert_drawn(folder / "evaluate" / "ckpt.best" / name)

    best = json.loads((folder / "summary.json").read_text())["best"]
    result = json.loads((folder / "evaluate" / "ckpt.best" / "evaluation.json").read_text())
    for name in ("acc1", "acc5", "class_mean", "many", "medium", "few", "per_class", "loss"):
        assert result[name] == best[name], name
    assert result["epoch"] == best["epoch"] + 1
    confusion = np.array(result["confusion"])
    assert confusion.sum() == 540
    assert 100 * np.trace(confusion) / 540 == pytest.approx(result["acc1"])
    assert 100 * confusion.diagonal() / confusion.sum(1) == pytest.approx(result["per_class"])
    assert f"\ntop-1 {best['acc1']:.2f}  top-5 {best['acc5']:.2f}" in out
    assert "epoch 1/" not in out


# ------------------------------------------------------------------------------------ published checkpoints


@pytest.fixture
def published(tmp_path):
    """A checkpoint as the official code writes it: no settings, no history; tensors with the prefix 'module.'."""
    run_ok([*TWO_EPOCHS, *TINY, "--root_log", "ours/log", "--root_model", "ours/checkpoint"], tmp_path)
    state = load_checkpoint(tmp_path / "ours" / "checkpoint" / model_folder(tmp_path).name / "ckpt.epoch001.pth.tar")
    for group in state["optimizer"]["param_groups"]:
        for name in ("fused", "differentiable", "foreach", "maximize"):  # not in the torch of that time
            group.pop(name, None)
    official = {
        "epoch": state["epoch"],
        "arch": state["arch"],
        "state_dict": {f"module.{name}": tensor for name, tensor in state["state_dict"].items()},
        "best_acc1": torch.tensor(state["best_acc1"]),
        "optimizer": state["optimizer"],
    }
    torch.save(official, tmp_path / "published.pth.tar")
    return tmp_path / "published.pth.tar"


def test_a_published_checkpoint_is_resumed(published, tmp_path):
    status, out, err = run_main([*TWO_EPOCHS, *TINY, "--resume", published], tmp_path)
    assert status == 0, err
    assert "records no settings" in err
    assert "epoch 1/2" not in out
    own = model_folder(tmp_path)
    assert_same_weights(own / "ckpt.pth.tar", tmp_path / "ours" / "checkpoint" / own.name / "ckpt.pth.tar")
    assert [row["epoch_from_0"] for row in read_csv(log_folder(tmp_path) / "log_train.csv")] == ["1"]


def test_a_published_checkpoint_is_resumed_where_the_official_code_left_it(published, tmp_path):
    own = model_folder(tmp_path) / "ckpt.pth.tar"
    own.parent.mkdir(parents=True)
    published.rename(own)
    assert "epoch 2/2 done" in run_ok([*TWO_EPOCHS, *TINY, "--resume", own], tmp_path)


def test_a_published_checkpoint_of_another_arch_is_refused(published, tmp_path):
    for mode in ([], ["-e"]):
        args = [*TWO_EPOCHS, "--arch", "resnet20", *mode, "--resume", published]
        refused(args, tmp_path, "arch is 'tiny' there and 'resnet20' here")


def test_pretrained_weights_are_what_training_starts_from(published, tmp_path):
    args = [*DIGITS, *TINY, "--epochs", "1", "--milestones", "--lr", "0", "--pretrained", published]
    run_ok(args, tmp_path)
    one, two = load_checkpoint(model_folder(tmp_path) / "ckpt.pth.tar"), load_checkpoint(published)
    for name in ("conv1.weight", "linear.weight"):
        assert one["state_dict"][name].equal(two["state_dict"][f"module.{name}"])


# ------------------------------------------------------------------------------------- groups, the best epoch


def test_empty_groups_read_na_everywhere(tmp_path):
    args = [*TWO_EPOCHS, *TINY, "--imb_type", "none", "--imb_factor", "1"]
    out = run_ok(args, tmp_path)
    folder = log_folder(tmp_path, imb="none")
    assert "classes by group: many 10, medium n/a, few n/a" in out
    for row in read_csv(folder / "log_test.csv"):
        assert (row["medium"], row["few"]) == ("n/a", "n/a")
        assert float(row["many"]) == pytest.approx(float(row["class_mean"]))
    assert "medium n/a  few n/a" in out
    assert json.loads((folder / "summary.json").read_text())["last"]["few"] is None
    assert "test/few" not in scalars(folder)


def test_val_fraction_picks_the_best_epoch_by_class_mean_without_the_test_set(tmp_path):
    epochs = 6
    args = [*DIGITS, *TINY, "--epochs", epochs, "--milestones", "--val_fraction", "0.3", "--imb_factor", "0.1"]
    out = run_ok(args, tmp_path)
    folder = log_folder(tmp_path, imb="exp_0.1")
    rows = read_csv(folder / "log_test.csv")
    scores = [float(row["val_class_mean"]) for row in rows]
    assert [value for _, value in scalars(folder)["val/class_mean"]] == pytest.approx(scores)
    best = scores.index(max(scores))
    assert out.count(f"val class mean {scores[best]:.2f}") >= 2, "in the line of the epoch and in the last lines"
    summary = json.loads((folder / "summary.json").read_text())
    assert [record["score"] for record in summary["history"]] == scores
    assert summary["best"]["epoch"] == best
    assert summary["best"]["acc1"] == float(rows[best]["acc1"])
    assert load_checkpoint(model_folder(tmp_path, imb="exp_0.1") / "ckpt.best.pth.tar")["epoch"] == best + 1
    for epoch, row in enumerate(rows):
        so_far = scores[: epoch + 1]
        assert float(row["best_acc1"]) == float(rows[so_far.index(max(so_far))]["acc1"])
    # the held-out images are not trained on, and every class keeps some
    whole = run_ok([*args[:-4], "--imb_factor", "0.1", "--exp_str", "whole"], tmp_path)
    total = int(whole.split(", total ")[1].split()[0])
    seen = [record["train"]["seen"] for record in summary["history"]]
    held = [record["val"]["seen"] for record in summary["history"]]
    assert {s + h for s, h in zip(seen, held, strict=True)} == {total}
    assert 0.25 * total < held[0] < 0.35 * total
    assert sum(summary["class_counts"]) == seen[0]
    assert min(summary["class_counts"]) >= 1


# ----------------------------------------------------------------------------- progress, averages, whole files


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_progress_is_one_bar_on_a_terminal_and_lines_elsewhere(stream, monkeypatch):
    stream, history = stream(), []
    monkeypatch.setattr("sys.stdout", stream)
    progress = Progress(first=0, epochs=3, print_freq=2)
    metrics = MetricAccumulator(2, "cpu")
    metrics.add(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]), torch.tensor(2.5))
    metrics.seen += 2
    for epoch in range(2):
        progress.epoch(epoch, batches=5, lr=0.02)
        for batch in range(5):
            progress.on_batch(batch, metrics)
        test = {"acc1": 50.0, "acc5": 100.0, "many": None, "medium": 1.0, "few": 2.0}
        record = {"epoch": epoch, "seconds": 60.0, "score": 50.0, "stage": {"loss": "CE"}, "train": {"loss": 1.0}}
        history.append({**record, "test": test})
        progress.done(history[-1], history)
    progress.close()
    text = stream.getvalue()
    assert text.count("done in 60.0 s") == 2
    if stream.isatty():
        assert "2/3" in text
        assert "batch 1/5" not in text
    else:
        assert "\r" not in text
        lines = [line for line in text.splitlines() if "batch" in line]
        # every second batch, and the very first one
        assert [line.split("  ")[:2] for line in lines] == [
            *(["epoch 1/3", f"batch {b}/5"] for b in (1, 2, 4)),
            *(["epoch 2/3", f"batch {b}/5"] for b in (2, 4)),
        ]
        assert "lr 0.02  loss 1.2500  acc1 50.00  left 0:0" in lines[0]
        assert re.search("left 0:0(2:00|1:5)", lines[-1])  # this epoch's minute and that of the last epoch


def test_an_average_of_the_weights_is_tested_kept_as_the_best_and_evaluated(tmp_path):
    args = [*DIGITS, *TINY, "--epochs", "3", "--milestones", "--ema", "0.9"]
    run_ok(args, tmp_path)
    summary = json.loads((log_folder(tmp_path) / "summary.json").read_text())
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        # sums of another batch size round otherwise
        run_ok(["-e", "--resume", model_folder(tmp_path) / name, "--threads", "1", "--batch-size", "64"], tmp_path)
    for below, which in ((".", "last"), ("ckpt.best", "best")):  # one does not replace the other
        found = json.loads((log_folder(tmp_path) / "evaluate" / below / "evaluation.json").read_text())
        assert (found["acc1"], found["loss"]) == (summary[which]["acc1"], summary[which]["loss"])
    raw = load_checkpoint(model_folder(tmp_path) / "ckpt.pth.tar")
    assert not torch.equal(raw["state_dict"]["conv1.weight"], raw["ema"]["module.conv1.weight"])
    del raw["ema"]
    torch.save(raw, tmp_path / "without.pth.tar")
    args = ["-e", "--resume", "without.pth.tar", "--threads", "1"]
    refused(args, tmp_path, "without.pth.tar holds no state of 'ema'", status=1)


def test_files_that_grew_are_those_made_of_the_whole_history(tmp_path):
    history, files = [record_of(epoch) for epoch in range(4)], []
    for folder, known in (("grown", []), ("resumed", history[:2]), ("made", history)):
        with contextlib.closing(Records(str(tmp_path / folder), ["a", "b"], INFO, known)) as records:
            for record in history[len(known) :]:
                records.add(record)
            records.write_summary(history)
        names = [n for n in sorted(os.listdir(tmp_path / folder)) if not n.startswith("events")]
        files.append({name: (tmp_path / folder / name).read_bytes() for name in names})
    assert len(files[0]) == 5
    assert files[0] == files[1] == files[2]
    summary = json.loads(files[0]["summary.json"])
    assert [record["epoch"] for record in summary["history"]] == [0, 1, 2, 3]
    assert summary["history"][0]["test"]["loss"] is None, "NaN, which JSON lacks"
    assert (summary["last"]["epoch"], summary["best"]["epoch"], summary["epochs_done"]) == (3, 3, 4)


def record_of(epoch):
    figures = {"loss": float("nan"), "acc1": 40.0 + epoch, "acc5": 90.0, "seen": 9, "seconds": 0.5}
    groups = {"class_mean": 1 / 3, "many": None, "medium": 2.0, "few": 3.0, "per_class": [0.1, None]}
    return {
        "epoch": epoch, "time": 1e9 + epoch, "seconds": 1.5, "score": figures["acc1"], "ib_factor": None, "alpha": None,
        "stage": {"lr": 0.1, "loss": "CE", "class_weights": "none", "sampler": "none"},
        "train": figures, "test": {**figures, **groups}, "val": None,
    }  # fmt: skip


INFO = {"name": "a ünïcode \udce9 name", "settings": {"seed": 1}, "split": {"sha256": "0"}, "classes": ["a", "b"]}
