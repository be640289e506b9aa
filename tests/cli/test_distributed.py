"""Several processes with torchrun, on the CPU: the single process's samples, gradients, counts and records."""

import subprocess
import sys

import pytest
import torch
from image_runs import make_inat
from script_runner import DIGITS, REPOSITORY, environment, load_checkpoint, messages, read_csv, read_logs

DRIVER = REPOSITORY / "tests" / "helpers" / "distributed_run.py"
#: 309 images in batches of 44: seven of them and a last one of a single image, of which the second rank has none.
#: Three epochs are 24 steps, the last sixteen with the IB loss.
BASE = [*DIGITS, "--batch-size", 44, "--epochs", 3, "--start_ib_epoch", 1, "--milestones", 2, "-p", 3]
IB = ["--loss_type", "IB", "--train_rule", "IBReweight"]


def run(cwd, *args, ranks=2, restarts=0, script=DRIVER, **variables):
    """A script (the driver) under torchrun, or alone for ranks=1: (status, out, err)."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", ranks, "--max-restarts", restarts, "--standalone"]
    command = [sys.executable, *(launcher if ranks > 1 else []), script, *args]
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**environment(), **variables}, capture_output=True, text=True, timeout=240
    )
    return done.returncode, done.stdout, done.stderr


def weights(cwd, name):
    return load_checkpoint(cwd / "checkpoint" / f"digits_{name}_exp_0.01_0" / "ckpt.pth.tar")["state_dict"]


# ------------------------------------------------------------------------------------ the parts of a batch


# ----------------------------------------------------------------------------------------- real processes


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        (IB, "plain_IB_IBReweight"),
        (["--loss_type", "CE", "--train_rule", "CBReweight", "--beta", 0.99, "--ema", 0.9], "plain_CE_CBReweight"),
        ([*IB[:2], "--alpha", "auto", "--train_rule", "Resample"], "plain_IB_Resample"),
    ],
    ids=["IB", "CE+CB with EMA", "IB auto Resample"],
)
def test_model_without_batch_norm_is_the_single_processes(tmp_path, extra, name):
    cwd = [tmp_path / "one", tmp_path / "two"]
    for ranks, folder in enumerate(cwd, 1):
        folder.mkdir()
        status, _, err = run(folder, *BASE, *extra, "-a", "plain", ranks=ranks, REPORT=str(tmp_path))
        assert status == 0, err
    one, two = (weights(folder, name) for folder in cwd)
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-6, atol=1e-6)
    ranks = {path.name: path.read_text() for path in tmp_path.glob("rank*")}
    assert ranks["rank0of2"] == ranks["rank1of2"]  # the same bits, the same count of test images
    assert ranks["rank0of2"].endswith(" 540")
    logs = [read_logs(folder / "log" / f"digits_{name}_exp_0.01_0") for folder in cwd]
    assert logs[0]["class_accuracy.csv"] == logs[1]["class_accuracy.csv"]
    for mine, theirs in zip(logs[0]["log_train.csv"], logs[1]["log_train.csv"], strict=True):
        assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-5)
        assert mine["acc1"] == theirs["acc1"]


def test_rank_that_is_killed_ends_the_job_or_with_restarts_continues(tmp_path):
    """With batch norm: both ranks end with the same bits, and every epoch is in the log once."""
    status, _, _ = run(tmp_path, *BASE, *IB, "-a", "tiny", DIE_AT="1")
    assert status != 0
    folder = tmp_path / "log" / "digits_tiny_IB_IBReweight_exp_0.01_0"
    assert [row["epoch_from_0"] for row in read_csv(folder / "log_test.csv")] == ["0"]
    status, out, err = run(
        tmp_path, *BASE, *IB, "-a", "tiny", "--exp_str", "again", restarts=1, DIE_AT="1", REPORT=str(tmp_path)
    )
    assert status == 0, err
    assert "restarted by torchrun: --resume auto" in out
    assert out.count("epoch 3/3 done") == 1  # one rank speaks
    log = tmp_path / "log" / "digits_tiny_IB_IBReweight_exp_0.01_again"
    assert [row["epoch_from_0"] for row in read_csv(log / "log_test.csv")] == ["0", "1", "2"]
    ranks = [(tmp_path / f"rank{rank}of2").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]


def test_inat_train_counts_the_same_with_one_and_two_ranks(tmp_path):
    make_inat(tmp_path / "data")
    flags = ["--data_dir", "data", "-a", "mobilenet_v3_small", "--image_size", 48, "--batch-size", 9]
    flags += ["--seed", 0, "-j", 1]
    flags += ["--epochs", 2, "--start_ib_epoch", 1, "--milestones", *IB]
    status, _, err = run(tmp_path, *flags, script=REPOSITORY / "inat_train.py")
    assert status == 0, err
    lines = []
    for ranks in (1, 2):
        _, out, _ = run(tmp_path, *flags, "-e", "--resume", "auto", ranks=ranks, script=REPOSITORY / "inat_train.py")
        lines.append(next(line for line in out.splitlines() if line.startswith("top-1")))
    assert lines[0] == lines[1]


def test_sync_bn_needs_cuda(tmp_path):
    status, _, err = run(tmp_path, *BASE, "-a", "tiny", "--sync_bn", ranks=1)
    assert status == 2
    assert "--sync_bn needs CUDA devices" in messages(err)[0]
    assert list(tmp_path.iterdir()) == []
