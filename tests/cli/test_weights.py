"""results/weights.py: `slim` keeps the weights and no machine, `verify` evaluates them and misses no disagreement."""

import hashlib
import json
from unittest import mock

import pytest
import torch
from script_runner import (
    DIGITS,
    REPOSITORY,
    TINY,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    refused,
    run_ok,
    run_script,
    tiny,
)

import models
from experiment import checkpoint
from paper import records
from results import weights

RUN = [*DIGITS, *TINY, "--epochs", "1", "--milestones", "--loss_type", "LDAM", "--exp_str", "kept"]
NAME = "results.weights.py"  # as `utils.command` calls a module that is imported
WHICH = {"loss": "LDAM", "exp": "kept"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished run of the model 'tiny'."""
    folder = tmp_path_factory.mktemp("run")
    with mock.patch.dict(models.CIFAR_MODELS, tiny=tiny):
        run_ok(RUN, folder)
        yield folder


@pytest.fixture
def added(run, tmp_path):
    """(folder of results with the run's record and slim weights, checkpoint of the run)."""
    name, path = log_folder(run, **WHICH).name, model_folder(run, **WHICH) / "ckpt.pth.tar"
    records.collect(log_folder(run, **WHICH) / "summary.json", tmp_path / f"{name}.json")
    file = tmp_path / "weights" / f"{name}.pth.tar"
    file.parent.mkdir()
    status, out, err = run_script(weights, ["slim", path, file], run)
    assert (status, out) == (0, f"written: {file}\n"), err
    accuracy = json.loads((tmp_path / f"{name}.json").read_text())["last"]["acc1"]
    row = [file.name, hashlib.sha256(file.read_bytes()).hexdigest(), f"{name}.json", f"{accuracy:.2f}"]
    (file.parent / "weights.csv").write_text(f"file,sha256,record,acc1_last\n{','.join(row)}\n")
    return tmp_path, path


def rows(folder):
    return read_csv(folder / "weights" / "weights.csv")


def test_a_slim_file_has_the_runs_weights_and_nothing_of_the_machine(added):
    folder, path = added
    file = folder / "weights" / rows(folder)[0]["file"]
    state, trained = load_checkpoint(file), load_checkpoint(path)
    assert all(torch.equal(state["state_dict"][name], tensor) for name, tensor in trained["state_dict"].items())
    assert state["state_dict"].keys() == trained["state_dict"].keys()
    assert state["classes"] == trained["classes"]
    assert state["class_counts"] == trained["class_counts"]
    assert not {"data_dir", "root_log", "root_model", "workers"} & state["settings"].keys()
    content = file.read_bytes()
    assert str(path.parents[2]).encode() not in content
    assert len(content) < 0.6 * path.stat().st_size, "no momentum, no history"
    fork = [*RUN, "--epochs", "2", "--exp_str", "fork", "--resume", file]
    refused(fork, folder, "holds weights without the optimizer's state")


def test_slim_overwrites_nothing(added):
    folder, path = added
    file = folder / "weights" / rows(folder)[0]["file"]
    status, _, err = run_script(weights, ["slim", path, file], folder)
    assert (status, err) == (1, f"{NAME}: error: {file} exists already: choose another name\n")


@pytest.mark.parametrize("what", ["file", "folder"])
def test_verify_evaluates_the_file_and_agrees(added, what):
    folder, _ = added
    (row,) = rows(folder)
    path = folder / "weights" / row["file"] if what == "file" else folder
    status, out, err = run_script(weights, ["verify", path], folder)
    assert (status, err) == (0, "")
    assert out == f"{folder.name}/{row['file']}: ok, {row['acc1_last']}\n1 of 1 weight files agree with their records\n"


@pytest.mark.parametrize(("device", "off", "agrees"), [("cpu", 0.02, False), ("GPU", 0.04, True), ("GPU", 0.07, False)])
def test_a_few_images_may_differ_on_a_gpu(device, off, agrees, added):
    folder, _ = added
    (row,) = rows(folder)
    path, table = folder / row["record"], folder / "weights" / "weights.csv"
    record, found = json.loads(path.read_text()), float(row["acc1_last"])
    record["device"] = device
    for test in (record["best"], record["last"], record["history"][-1]["test"]):
        test["acc1"] = round(test["acc1"] + off, 4)
    path.write_text(json.dumps(record))
    moved = f"{found + off:.2f}"
    table.write_text(table.read_text().replace(row["acc1_last"], moved))
    status, out, _ = run_script(weights, ["verify", folder], folder)
    assert status == (not agrees)
    assert (f"ok, {found:.2f} (the record, on GPU: {moved})" in out) == agrees
    assert (f"top-1 {found:.2f}, the record has {moved}" in out) != agrees


@pytest.mark.parametrize("wrong", ["file", "weights", "table", "record"])
def test_verify_finds_what_does_not_agree(added, wrong):
    folder, _ = added
    (row,) = rows(folder)
    file, table, record = (folder / "weights" / row["file"], folder / "weights" / "weights.csv", folder / row["record"])
    if wrong == "file":
        file.write_bytes(file.read_bytes()[:-1] + b"0")
        line = "the file is missing or its sha256 differs"
    elif wrong == "weights":  # other weights, whose checksum the table has
        state = load_checkpoint(file)
        state["state_dict"]["linear.weight"].neg_()
        torch.save(state, file)
        table.write_text(table.read_text().replace(row["sha256"], hashlib.sha256(file.read_bytes()).hexdigest()))
        line = "the record has"
    elif wrong == "table":
        table.write_text(table.read_text().replace(row["acc1_last"], "99.00"))
        line = "has another top-1 than the table"
    else:
        record.unlink()
        line = f"{record}: damaged or cut short"
    status, out, err = run_script(weights, ["verify", folder], folder)
    assert status == 1
    assert line in out
    assert err == f"{NAME}: error: 1 of 1 weight files do not agree with their records, or were not checked\n"


@pytest.mark.parametrize("named", [[".", "typo.pth.tar"], ["empty"]])
def test_a_place_without_weights_is_an_error_beside_others_too(named, added):
    folder, _ = added
    (folder / "empty").mkdir()
    status, out, err = run_script(weights, ["verify", *named], folder)
    assert (status, out, err) == (1, "", f"{NAME}: error: no weights in {named[-1]}: weights.csv names them\n")


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "results").glob("*/weights/phase_one.pth.tar")), ids=lambda p: p.parts[-3]
)
def test_a_committed_phase_one_is_the_beginning_of_a_recorded_run(path):
    state = checkpoint.load(path)
    begun = [records.rounded(epoch["test"]["acc1"]) for epoch in state["history"]]
    found = [record for _, record in records.read(path.parent.parent)[0]]
    run, *_ = [r for r in found if [epoch["test"]["acc1"] for epoch in r["history"]][: len(begun)] == begun]
    assert state["epoch"] == len(begun) == run["settings"]["start_ib_epoch"]
    assert (state["split_sha256"], state["classes"]) == (run["split"]["sha256"], run["classes"])
    assert state["optimizer"]["state"], "its momentum"
    assert not {"data_dir", "root_log", "root_model"} & state["settings"].keys()
