"""-e: what a checkpoint records holds, post-hoc corrections against a slow formula, logits, calibration, the split."""

import json
import shutil

import numpy as np
import pytest
import torch
from script_runner import DIGITS, TINY, load_checkpoint, log_folder, model_folder, refused, run_main, run_ok

from experiment.evaluation import expected_calibration_error, reliability

RUN = [*DIGITS, *TINY, "--epochs", "3", "--milestones", "2", "--val_fraction", "0.3"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a finished run that has a held-out part."""
    folder = tmp_path_factory.mktemp("trained")
    run_ok(RUN, folder)
    return folder


def evaluate(folder, *flags):
    """(what was printed, evaluation.json) of an evaluation that must succeed; without a single flag of the run."""
    out = run_ok(["-e", "--resume", model_folder(folder) / "ckpt.pth.tar", "--threads", "1", *flags], folder)
    (line,) = [line for line in out.splitlines() if line.startswith("written: ")]
    return out, json.loads((folder / line.split()[1]).read_text())


def logits_of(folder, correction="."):
    with np.load(log_folder(folder) / "evaluate" / correction / "logits.npz") as saved:
        return torch.from_numpy(saved["logits"]), torch.from_numpy(saved["target"])


def accuracy(logits, target):
    return 100 * (logits.argmax(1) == target).double().mean().item()


def test_posthoc_logit_adjustment_subtracts_the_log_prior(trained):
    evaluate(trained, "--save_logits")
    plain, target = logits_of(trained)
    counts = torch.tensor(json.loads((log_folder(trained) / "summary.json").read_text())["class_counts"]).double()
    expected = plain - 1.5 * (counts / counts.sum()).log().float()
    out, found = evaluate(trained, "--posthoc_la", "1.5", "--save_logits")
    torch.testing.assert_close(logits_of(trained, "posthoc_la_1.5")[0], expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits_of(trained)[0], plain), "the figures without the correction stay"
    assert found["acc1"] == pytest.approx(accuracy(expected, target))
    assert found["posthoc_la"] == 1.5
    assert "--posthoc_la 1.5 applied" in out


@pytest.mark.parametrize(("flag", "keeps"), [("tau_norm", 0), ("tau_norm_bias", 1)])
def test_tau_norm_divides_by_the_length_of_the_class_vectors(flag, keeps, trained):
    evaluate(trained, "--save_logits")
    plain, _ = logits_of(trained)
    state = load_checkpoint(model_folder(trained) / "ckpt.pth.tar")["state_dict"]
    weight, bias = state["linear.weight"], state["linear.bias"]
    expected = (plain - bias) / weight.norm(dim=1) ** 0.7 + keeps * bias
    _, found = evaluate(trained, f"--{flag}", "0.7", "--save_logits")
    torch.testing.assert_close(logits_of(trained, f"{flag}_0.7")[0], expected, rtol=1e-4, atol=1e-4)
    assert found[flag] == 0.7


def test_of_several_values_the_held_out_part_picks_one(trained):
    out, found = evaluate(trained, "--posthoc_la", "0", "1", "2")
    scores = {
        line.split()[1].rstrip(":"): float(line.split()[4])
        for line in out.splitlines()
        if "on the held-out part" in line
    }
    assert list(scores) == ["0", "1", "2"]
    history = json.loads((log_folder(trained) / "summary.json").read_text())["history"]
    assert scores["0"] == pytest.approx(history[-1]["val"]["class_mean"], abs=0.006)
    assert found["posthoc_la"] == float(max(scores, key=scores.get))


@pytest.mark.parametrize("flags", [[], ["--val_left_out", "5"]], ids=["none", "without the largest class"])
def test_several_values_without_a_held_out_part_are_refused(flags, tmp_path):
    run_ok([*DIGITS, *TINY, "--epochs", "1", "--milestones", *flags], tmp_path)
    args = ["-e", "--resume", model_folder(tmp_path) / "ckpt.pth.tar", "--tau_norm", "0.5", "1"]
    refused(args, tmp_path, "--val_fraction")


@pytest.mark.parametrize("flag", [["--val_fraction", "0.1"], ["--imb_factor", "0.1"], ["--ema", "0.9"]])
def test_a_flag_that_contradicts_the_checkpoint_is_refused(flag, trained):
    args = ["-e", "--resume", model_folder(trained) / "ckpt.pth.tar", *flag]
    refused(args, trained, f"{flag[0].removeprefix('--')} is ", "--force")


def test_an_ib_checkpoint_is_evaluated_under_its_own_name(tmp_path):
    two = [*DIGITS, *TINY, "--epochs", "2", "--milestones", "--start_ib_epoch", "1"]
    run_ok([*two, "--loss_type", "IB"], tmp_path)
    run_ok(["-e", "--resume", model_folder(tmp_path, "IB") / "ckpt.pth.tar"], tmp_path)
    assert (log_folder(tmp_path, "IB") / "evaluate" / "evaluation.json").exists()
    assert [path.name for path in (tmp_path / "log").iterdir()] == [log_folder(tmp_path, "IB").name]


def test_a_correction_of_a_model_that_is_corrected_already_is_named(tmp_path):
    run_ok([*DIGITS, *TINY, "--epochs", "1", "--milestones", "--train_rule", "CBReweight"], tmp_path)
    path = model_folder(tmp_path, rule="CBReweight") / "ckpt.pth.tar"
    _, _, err = run_main(["-e", "--resume", path, "--threads", "1", "--posthoc_la", "1"], tmp_path)
    assert "--train_rule CBReweight has corrected for rare classes already" in err


def test_export_split_writes_the_indices_and_trains_nothing(tmp_path):
    out = run_ok([*DIGITS, *TINY, "--export_split", "split.txt"], tmp_path)
    indices = [int(line) for line in (tmp_path / "split.txt").read_text().splitlines()]
    assert len(indices) == len(set(indices)) == 309
    assert "309" in out
    run_ok([*DIGITS, *TINY, "--val_fraction", "0.2", "--export_split", "split.txt"], tmp_path)
    kept = [int(line) for line in (tmp_path / "split.txt").read_text().splitlines()]
    assert set(kept) < set(indices)
    assert len(kept) == len(set(kept)) == 247, "without the held-out part"
    assert [path.name for path in tmp_path.iterdir()] == ["split.txt"]


def test_calibration_against_a_slow_count():
    generator = torch.Generator().manual_seed(0)
    logits, target = 3 * torch.randn(200, 4, generator=generator), torch.randint(4, (200,), generator=generator)
    rows = reliability(logits, target, bins=5)
    confidence, predicted = logits.double().softmax(1).max(1)
    error = 0.0
    for k, row in enumerate(rows):
        inside = [i for i in range(200) if k / 5 < confidence[i] <= (k + 1) / 5]
        assert row["images"] == len(inside)
        if inside:
            hits = 100 * sum(int(predicted[i] == target[i]) for i in inside) / len(inside)
            mean = 100 * sum(confidence[i].item() for i in inside) / len(inside)
            assert (row["accuracy"], row["confidence"]) == (pytest.approx(hits), pytest.approx(mean))
            error += len(inside) / 200 * abs(hits - mean)
    assert expected_calibration_error(rows) == pytest.approx(error)


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of the finished run, to change."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    return tmp_path


def change(folder, **parts):
    """The run's newest checkpoint with other parts, as a file of its own."""
    state = {**load_checkpoint(model_folder(folder) / "ckpt.pth.tar"), **parts}
    torch.save({name: part for name, part in state.items() if part is not None}, folder / "changed.pth")
    return folder / "changed.pth"


def test_other_classes_than_the_models_are_refused(copied):
    path = change(copied, classes=[*map(str, range(9)), "ten"])
    args = ["-e", "--resume", path, "--threads", "1"]
    refused(args, copied, "has other classes than those in ./data: 9, ten", status=1)
    run_ok([*args, "--force"], copied)


def test_a_checkpoint_that_tells_no_images_chooses_no_correction(copied):
    state = load_checkpoint(model_folder(copied) / "ckpt.pth.tar")
    torch.save({name: state[name] for name in ("epoch", "arch", "state_dict")}, copied / "published.pth")
    args = ["--dataset", "digits", "-a", "tiny", "-e", "--resume", "published.pth", "--val_fraction", "0.3"]
    refused([*args, "--posthoc_la", "0", "1"], copied, "published.pth does not record its training images")
    run_ok([*args, "--posthoc_la", "1"], copied)
    run_ok([*args, "--posthoc_la", "0", "1", "--force"], copied)


def test_a_state_that_the_script_does_not_restore_is_refused(copied):
    """A second average, say, whose weights would be left out."""
    args = ["-e", "--resume", change(copied, swa={"n_averaged": torch.tensor(3)}), "--threads", "1"]
    refused(args, copied, "holds a state of 'swa', which nothing restores (use --force")
    run_ok([*args, "--force"], copied)


def test_prior_and_groups_are_those_of_the_checkpoint(copied):
    evaluate(copied, "--save_logits")
    plain, _ = logits_of(copied)
    counts = [5, 150, 7, 30, 200, 9, 11, 13, 60, 1]
    path = change(copied, class_counts=counts)
    run_ok(["-e", "--resume", path, "--threads", "1", "--posthoc_la", "1", "--save_logits"], copied)
    prior = torch.tensor(counts).double() / sum(counts)
    corrected, _ = logits_of(copied, "changed.pth/posthoc_la_1")
    torch.testing.assert_close(corrected, plain - prior.log().float(), rtol=1e-4, atol=1e-4)
    folder = log_folder(copied) / "evaluate" / "changed.pth" / "posthoc_la_1"
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["many"] == pytest.approx((found["per_class"][1] + found["per_class"][4]) / 2)


def test_logits_that_are_not_finite_are_no_accuracy(copied):
    weights = load_checkpoint(model_folder(copied) / "ckpt.pth.tar")["state_dict"]
    path = change(copied, state_dict={**weights, "linear.bias": torch.full((10,), float("nan"))})
    args = ["-e", "--resume", path, "--threads", "1"]
    refused(args, copied, "changed.pth gives logits that are not finite", status=1)


@pytest.mark.parametrize("flag", ["--tau_norm", "--posthoc_la"])
def test_a_normalised_head_takes_no_correction(flag, tmp_path):
    run_ok([*DIGITS, *TINY, "--epochs", "1", "--milestones", "--loss_type", "LDAM"], tmp_path)
    path = model_folder(tmp_path, "LDAM") / "ckpt.pth.tar"
    args = ["-e", "--resume", path, "--threads", "1", flag, "1"]
    refused(args, tmp_path, f"{flag} needs a linear layer with a bias")


def test_an_evaluation_without_a_checkpoint_is_one_line(tmp_path):
    words = f"no checkpoint at {model_folder(tmp_path).relative_to(tmp_path)}/ckpt.pth.tar"
    refused([*RUN, "-e", "--resume", "auto"], tmp_path, words, status=1)
