"""cRT: a new head on a frozen network, stopped, resumed and forked."""

import itertools
from unittest import mock

import pytest
import torch
from script_runner import DIGITS, TINY, assert_same_run, load_checkpoint, model_folder, refused, run_ok

import cifar_train
from utils import epoch_seed

#: Three epochs of the whole network, two of a new head.
CRT = [*DIGITS, *TINY, "--epochs", "5", "--drw_epoch", "3", "--milestones", "2", "--start_ib_epoch", "2"]
CRT += ["--train_rule", "cRT"]


HEAD = ("linear.weight", "linear.bias")


def heads_at_start(args, cwd):
    """[(weight, its momentum, labels seen)] of each epoch that trains the head alone; weights from before it."""
    train_one_epoch, found = cifar_train.train_one_epoch, []

    def watched(model, batches, criterion, optimizer, *rest, **more):
        labels = []

        def seen():
            for images, target in batches:
                labels.extend(target.tolist())
                yield images, target

        if len(list(model.parameters())) <= len(HEAD):
            (weight, *_) = model.parameters()
            found.append((weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone(), labels))
        return train_one_epoch(model, seen(), criterion, optimizer, *rest, **more)

    with mock.patch.object(cifar_train, "train_one_epoch", watched):
        run_ok(args, cwd)
    return found


@pytest.mark.parametrize("loss", ["LDAM", "IB"])
def test_the_second_stage_of_crt_changes_the_head_and_nothing_else(loss, tmp_path):
    run_ok([*CRT, "--loss_type", loss, "--keep_epochs", "3", "4"], tmp_path)
    folder = model_folder(tmp_path, loss, "cRT")
    states = [load_checkpoint(folder / f"ckpt{name}.pth.tar") for name in (".epoch003", ".epoch004", "")]
    assert [state["epoch"] for state in states] == [3, 4, 5]
    names = list(states[0]["state_dict"])
    assert {"bn1.running_mean", "bn1.num_batches_tracked"} < set(names)
    for before, after in itertools.pairwise(states):
        same = {name for name in names if torch.equal(before["state_dict"][name], after["state_dict"][name])}
        assert set(names) - same == {name for name in names if name in HEAD}
    buffers = [[entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states]
    assert [torch.equal(a, b) for a, b in zip(buffers[0], buffers[2], strict=True)][:3] == [True] * 3, "conv, bn"
    assert [record["stage"]["trains"] for record in states[2]["history"]] == ["all"] * 3 + ["head"] * 2


def test_the_head_of_crt_is_drawn_anew_from_the_seed_and_sees_the_classes_equally_often(tmp_path):
    found = heads_at_start([*CRT, "--keep_epochs", "3"], tmp_path)
    assert len(found) == 2
    weight, momentum, _ = found[0]
    torch.manual_seed(epoch_seed(0, 3))
    assert torch.equal(weight, torch.nn.Linear(64, 10).weight)
    state = load_checkpoint(model_folder(tmp_path, "CE", "cRT") / "ckpt.epoch003.pth.tar")
    assert not torch.equal(weight, state["state_dict"]["linear.weight"])
    assert momentum.abs().sum() == 0
    assert state["optimizer"]["state"][3]["momentum_buffer"].abs().sum() > 0, "there was nothing to forget"
    assert found[1][1].abs().sum() > 0, "forgotten again in the next epoch"
    labels = found[0][2] + found[1][2]
    assert len(labels) == 2 * 309
    shares = [labels.count(k) / len(labels) for k in range(10)]
    assert max(abs(share - 0.1) for share in shares) < 0.04, "over three standard deviations"
    again = heads_at_start([*CRT, "--exp_str", "again"], tmp_path)
    other = heads_at_start([*CRT, "--exp_str", "other", "--seed", "1"], tmp_path)
    assert torch.equal(again[0][0], weight)
    assert not torch.equal(other[0][0], weight)


@pytest.mark.parametrize("flags", [["--schedule", "cosine"], ["--loss_type", "IB"]], ids=" ".join)
def test_crt_forked_from_a_finished_run_is_the_run_from_the_start(flags, tmp_path):
    args = [*CRT, *flags]
    if "cosine" in flags:
        at = args.index("--milestones")
        args[at : at + 2] = []
    first = [*args, "--epochs", "3", "--train_rule", "None"]
    run_ok(first, tmp_path)
    loss = "IB" if "IB" in flags else "CE"
    state = load_checkpoint(model_folder(tmp_path, loss) / "ckpt.pth.tar")
    for record in state["history"]:  # as of older checkpoints
        del record["stage"]["trains"]
    torch.save(state, tmp_path / "older.pth.tar")
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    run_ok([*args, "--resume", "older.pth.tar"], tmp_path)
    one, two = (model_folder(tmp_path, loss, "cRT", exp=e) for e in ("0", "whole"))
    assert_same_run(one, two)


def test_crt_cannot_be_forked_from_a_run_that_has_gone_on_with_the_whole_network(tmp_path):
    run_ok([*CRT, "--train_rule", "None"], tmp_path)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    refused([*CRT, "--epochs", "7", "--resume", path], tmp_path, "in epoch 4, lr is 0.0008 there and 0.1 here")
