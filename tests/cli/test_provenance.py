"""What a record says of the code and the machine that trained it, and of what --force has passed over."""

import json
from unittest import mock

import torch
from script_runner import FIVE, TINY, break_off, load_checkpoint, log_folder, model_folder, refused, run_main, run_ok

from experiment import provenance
from experiment.resume import Start

ARGS = [*FIVE, *TINY]


def at_commit(letter):
    """Run as a checkout of this commit."""
    return mock.patch.object(provenance, "code_version", return_value={"commit": letter * 40, "clean": True})


def summary_of(folder, exp="0"):
    return json.loads((log_folder(folder, exp=exp) / "summary.json").read_text())


def parts_of(record):
    return [(part["from_epoch"], part["code"]["commit"][0], part["threads"]) for part in record["trained_on"]]


def test_a_run_of_two_commits_names_both_with_their_epochs(tmp_path):
    with at_commit("a"):
        assert break_off(ARGS, tmp_path, after=2)[0] == 130
        assert break_off([*ARGS, "--resume", "auto"], tmp_path, after=1)[0] == 130
    with at_commit("b"):
        run_ok([*ARGS, "--resume", "auto"], tmp_path)
    record = summary_of(tmp_path)
    assert parts_of(record) == [(0, "a", 1), (3, "b", 1)]
    assert record["code"]["commit"] == "b" * 40
    assert load_checkpoint(model_folder(tmp_path) / "ckpt.pth.tar")["trained_on"] == record["trained_on"]


def test_a_process_that_trains_nothing_leaves_no_trace(tmp_path):
    with at_commit("a"):
        run_ok(ARGS, tmp_path)
    before = summary_of(tmp_path)
    (log_folder(tmp_path) / "summary.json").unlink()  # so that the logs are made again
    with at_commit("b"):
        run_ok([*ARGS, "--deterministic"], tmp_path)
    assert summary_of(tmp_path) == before
    assert parts_of(before) == [(0, "a", 1)]


def test_a_fork_brings_the_parts_of_the_run_that_it_starts_from(tmp_path):
    with at_commit("a"):
        break_off([*ARGS, "--keep_epochs", "2"], tmp_path, after=2)
    path = model_folder(tmp_path) / "ckpt.epoch002.pth.tar"
    with at_commit("b"):
        run_ok([*ARGS, "--exp_str", "fork", "--resume", path], tmp_path)
    assert parts_of(summary_of(tmp_path, "fork")) == [(0, "a", 1), (2, "b", 1)]


def test_a_checkpoint_that_does_not_tell_leaves_its_epochs_open(tmp_path):
    break_off([*ARGS, "--keep_epochs", "2"], tmp_path, after=2)
    state = load_checkpoint(model_folder(tmp_path) / "ckpt.epoch002.pth.tar")
    del state["trained_on"], state["forced"]
    torch.save(state, tmp_path / "old.pth.tar")
    with at_commit("b"):
        run_ok([*ARGS, "--exp_str", "fork", "--resume", "old.pth.tar"], tmp_path)
    record = summary_of(tmp_path, "fork")
    assert parts_of(record) == [(2, "b", 1)]
    assert provenance.lengths(record["trained_on"], "device", 5) == [(None, 2), ("cpu", 3)]


def test_another_device_is_a_warning(capsys):
    before = [{"from_epoch": 0, "device": "NVIDIA H200", "versions": {}}]
    start = Start(epoch=3, path="a.pth", checkpoint={"trained_on": before})
    parts = provenance.trained_on(start, {"device": "cpu", "versions": {}}, epochs=5)
    assert parts == [*before, {"from_epoch": 3, "device": "cpu", "versions": {}}]
    said = capsys.readouterr().err
    assert said == "warning: a.pth was made on NVIDIA H200, this run is on cpu: the same run, but not bit for bit\n"
    assert provenance.trained_on(start, {"device": "NVIDIA H200", "versions": {}}, epochs=5) == before
    assert provenance.trained_on(start, {"device": "cpu", "versions": {}}, epochs=3) == before
    assert capsys.readouterr().err == ""


def test_what_force_has_passed_over_stays_in_the_record(tmp_path):
    break_off([*ARGS, "--keep_epochs", "2"], tmp_path, after=2)
    path = model_folder(tmp_path) / "ckpt.epoch002.pth.tar"
    assert load_checkpoint(path)["forced"] == []
    other = [*ARGS, "--exp_str", "other", "-b", "32"]
    with_force = [*other, "--resume", path, "--force"]
    assert break_off(with_force, tmp_path, after=1)[0] == 130
    run_ok([*other, "--resume", "auto"], tmp_path)
    (what,) = summary_of(tmp_path, "other")["forced"]
    assert what.startswith("batch_size is ")
    assert load_checkpoint(model_folder(tmp_path, exp="other") / "ckpt.pth.tar")["forced"] == [what]


def test_force_over_other_images_stays_in_the_record(tmp_path):
    break_off([*ARGS, "--keep_epochs", "2"], tmp_path, after=2)
    state = load_checkpoint(model_folder(tmp_path) / "ckpt.epoch002.pth.tar")
    counts = [*state["class_counts"][:-1], state["class_counts"][-1] + 1]
    torch.save({**state, "class_counts": counts}, tmp_path / "other.pth.tar")
    args = [*ARGS, "--exp_str", "other", "--resume", "other.pth.tar"]
    total = sum(counts)
    message = f"other.pth.tar was trained on another part of the images ({total} there, {total - 1} here)"
    refused(args, tmp_path, message, status=1)
    _, _, err = run_main([*args, "--force"], tmp_path)
    assert f"{message}; continuing because of --force" in err
    assert summary_of(tmp_path, "other")["forced"] == ["another part of the images"]
