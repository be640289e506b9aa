"""The losses with the class prior, and the control without influence, through the script."""

import pytest
from script_runner import TINY, TWO_EPOCHS, log_folder, read_csv, run_ok


def test_the_script_trains_them_and_la_at_tau_1_is_bs(tmp_path, capsys):
    weights = {}
    for exp, flags in {
        "bs": ["--loss_type", "BS"],
        "la": ["--loss_type", "LA"],
        "la0": ["--loss_type", "LA", "--la_tau", "0"],
        "ce": ["--loss_type", "CE"],
    }.items():
        run_ok([*TINY, *TWO_EPOCHS, *flags, "--exp_str", exp], tmp_path, capsys)
        rows = read_csv(log_folder(tmp_path, flags[1], exp=exp) / "log_train.csv")
        weights[exp] = [row["loss"] for row in rows]
        assert {row["criterion"] for row in rows} == {flags[1]}
    assert weights["bs"] == weights["la"] != weights["ce"] == weights["la0"]


def test_vs_without_its_multiplier_trains_as_la(tmp_path, capsys):
    losses = {}
    for exp, flags in {
        "vs": ["--loss_type", "VS", "--vs_gamma", "0", "--vs_tau", "0.7"],
        "la": ["--loss_type", "LA", "--la_tau", "0.7"],
        "scaled": ["--loss_type", "VS", "--vs_gamma", "0.2", "--vs_tau", "0.7"],
    }.items():
        run_ok([*TINY, *TWO_EPOCHS, *flags, "--exp_str", exp], tmp_path, capsys)
        losses[exp] = [row["loss"] for row in read_csv(log_folder(tmp_path, flags[1], exp=exp) / "log_train.csv")]
    assert losses["vs"] == losses["la"] != losses["scaled"]


def test_norm_none_with_alpha_auto_trains_at_the_size_of_ce(tmp_path, capsys):
    flags = ["--loss_type", "IB", "--train_rule", "IBReweight", "--ib_norm", "none", "--alpha", "auto"]
    run_ok([*TINY, *TWO_EPOCHS, *flags], tmp_path, capsys)
    losses = [float(row["loss"]) for row in read_csv(log_folder(tmp_path, "IB", "IBReweight") / "log_train.csv")]
    assert losses[1] == pytest.approx(losses[0], rel=0.5)
