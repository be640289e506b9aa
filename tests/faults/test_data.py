"""Data that change between the runs of one training: noticed and refused at resume, nothing is lost."""

import shutil
from pathlib import Path

import pytest
import torch
from image_runs import RUN, make_folder, run_folder, run_in
from script_runner import TINY, TWO_EPOCHS, load_checkpoint, model_folder, refused, run_ok

TRAIN = ["--data_dir", "images", *RUN, "--epochs", "2", "--milestones", "1"]


def rename(train):
    (train / "class1" / "3.jpg").rename(train / "class1" / "33.jpg")


def grow(train):
    with open(train / "class0" / "5.jpg", "ab") as file:
        file.write(b"\0")


def change_the_test_set(train):
    (train.parent / "val" / "class0" / "0.jpg").rename(train.parent / "val" / "class0" / "00.jpg")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with images and a run on them, which keeps its first epoch."""
    home = tmp_path_factory.mktemp("trained")
    make_folder(home / "images")
    run_in(home, *TRAIN)
    return home


def second_epoch(home):
    """Flags of the second epoch again, from the first."""
    return [*TRAIN, "--exp_str", "again", "--resume", next(home.glob("checkpoint/*_0/ckpt.epoch001.pth.tar"))]


@pytest.mark.parametrize("change", [rename, grow, change_the_test_set])
def test_changed_image_files_are_refused_at_resume(change, trained, tmp_path):
    home = Path(shutil.copytree(trained, tmp_path / "home"))
    change(home / "images" / "train")
    again, why = second_epoch(home), "was trained on other image files than those in images"
    refused(again, home, why, status=1, run=run_folder)
    assert "resumes from" in run_in(home, *again, "--force")


def test_another_choice_of_images_is_refused_at_resume(tmp_path):
    """The indices that a checkpoint was trained on, not only the settings that led to them."""
    run_ok([*TWO_EPOCHS, *TINY], tmp_path)
    path = model_folder(tmp_path) / "ckpt.epoch001.pth.tar"
    torch.save({**load_checkpoint(path), "split_sha256": "0" * 64}, path)
    more = [*TWO_EPOCHS, *TINY, "--exp_str", "again", "--resume", path]
    refused(more, tmp_path, "was trained on other images than in", status=1)
    run_ok([*more, "--force"], tmp_path)
