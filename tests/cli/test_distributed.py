"""Several processes, on the CPU: the single process's samples, gradients, counts and records."""

import json
import re

import pytest
import torch
from image_runs import make_inat
from script_runner import (
    DIGITS,
    REPOSITORY,
    TINY,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    read_logs,
    run_process,
)

DRIVER = REPOSITORY / "tests" / "helpers" / "distributed_run.py"
#: 309 images in batches of 44: seven of them and a last one of a single image, of which the second rank has none.
#: Three epochs are 24 steps, the last sixteen with the IB loss.
BASE = [*DIGITS, "--batch-size", 44, "--epochs", 3, "--start_ib_epoch", 1, "--milestones", 2, "-p", 3]
IB = ["--loss_type", "IB", "--train_rule", "IBReweight"]
#: What a model without batch norm is trained with, by one process and by two: (flags, loss, rule).
CASES = {
    "CE+CB with EMA": (["--beta", 0.99, "--ema", 0.9], "CE", "CBReweight"),
    "IB auto": (["--alpha", "auto"], "IB", "IBReweight"),
    "cRT": (["--drw_epoch", 1, "--keep_epochs", 1], "CE", "cRT"),  # data parallel of the whole model, then of the head
}
INAT = [
    "--data_dir", "data", "-a", "mobilenet_v3_small", "--image_size", 32, "--batch-size", 9, "--seed", 0, "-j", 0,
    "--threads", 1, "--epochs", 4, "--milestones", 3, "--lr", 0.02,
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All cases with one and with two ranks, below <case>/1 and <case>/2; the iNaturalist ones in inat."""
    root, commands = tmp_path_factory.mktemp("ranks"), []
    for name, (flags, loss, rule) in CASES.items():
        for ranks in (1, 2):
            folder = root / name / str(ranks)
            folder.mkdir(parents=True)
            flags = [*BASE, *flags, "-a", "plain", "--loss_type", loss, "--train_rule", rule]
            commands.append((str(folder), "cifar", ranks, [str(flag) for flag in flags]))
    (root / "inat").mkdir()
    make_inat(root / "inat" / "data")
    evaluation = [*INAT, "-e", "--resume", "auto", "-b", 3]
    for ranks, flags in ((1, INAT), (1, evaluation), (2, [*evaluation, "--root_log", "log2"])):
        commands.append((str(root / "inat"), "inat", ranks, [str(flag) for flag in flags]))
    (root / "commands.json").write_text(json.dumps(commands))
    done = run_process(["--forked", root / "commands.json"], root, DRIVER, REPORT="1")
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", CASES)
def test_model_without_batch_norm_is_the_single_processes(name, runs):
    _, loss, rule = CASES[name]
    cwd = [runs / name / ranks for ranks in "12"]
    states = [load_checkpoint(model_folder(folder, loss, rule, arch="plain") / "ckpt.pth.tar") for folder in cwd]
    for key, tensor in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][key], tensor, rtol=1e-5, atol=1e-5)
    factors = [state["history"][-1]["ib_factor"] or [] for state in states]
    assert factors[1] == pytest.approx(factors[0], rel=1e-4)
    ranks = [(cwd[1] / f"rank{rank}of2").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1], "the same bits, the same count of test images"
    assert ranks[0].endswith(" 540")
    logs = [read_logs(log_folder(folder, loss, rule, arch="plain")) for folder in cwd]
    assert logs[0]["class_accuracy.csv"] == logs[1]["class_accuracy.csv"]
    for mine, theirs in zip(logs[0]["log_train.csv"], logs[1]["log_train.csv"], strict=True):
        assert float(mine["loss"]) == pytest.approx(float(theirs["loss"]), rel=1e-4)
        assert mine["acc1"] == theirs["acc1"]


def test_two_ranks_train_the_head_alone_in_the_second_stage_of_crt(runs):
    folder = model_folder(runs / "cRT" / "2", "CE", "cRT", arch="plain")
    first, last = (load_checkpoint(folder / f"ckpt{name}.pth.tar")["state_dict"] for name in (".epoch001", ""))
    assert torch.equal(first["conv1.weight"], last["conv1.weight"])
    assert not torch.equal(first["linear.weight"], last["linear.weight"])


def test_an_evaluation_counts_the_same_with_one_and_two_ranks(runs):
    tables = []
    for ranks in "12":  # batches of other sizes round otherwise
        text = re.sub(r"  loss \S+  calibration error \S+", "", (runs / "inat" / f"out{ranks}").read_text())
        tables.append(text.splitlines()[-6:-1])
        assert tables[-1][-1].startswith("top-1")
    assert tables[0] == tables[1]


def test_the_errors_that_two_ranks_find_are_those_of_one(runs):
    found = []
    for logs in ("log", "log2"):
        (path,) = (runs / "inat" / logs).glob("*/evaluate/errors.csv")
        found.append(sorted((row["file"], row["class"], row["predicted"]) for row in read_csv(path)))
    assert len(found[0]) > 2
    assert found[0] == found[1]


def test_rank_that_is_killed_is_restarted_by_torchrun_and_continues(tmp_path):
    """With batch norm: both ranks end with the same bits, and every epoch is in the log once."""
    torchrun = ["torch.distributed.run", "--nproc_per_node", 2, "--max-restarts", 1]
    torchrun += ["--standalone", "--local-addr", "127.0.0.1"]
    done = run_process([*torchrun, DRIVER, *BASE, *IB, *TINY], tmp_path, "-m", REPORT="1", DIE_AT="1")
    assert done.returncode == 0, done.stderr
    assert "restarted by torchrun: --resume auto" in done.stdout
    assert done.stdout.count("epoch 3/3 done") == 1  # one rank speaks
    log = log_folder(tmp_path, "IB", "IBReweight") / "log_test.csv"
    assert [row["epoch_from_0"] for row in read_csv(log)] == ["0", "1", "2"]
    ranks = [(tmp_path / f"rank{rank}of2").read_text() for rank in (0, 1)]
    assert ranks[0] == ranks[1]
