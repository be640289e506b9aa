"""folder_train.py through main(argv): any folder of images, any of torchvision's classifiers, errors."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from image_runs import IB, RUN, make_folder, run_folder, run_in
from PIL import Image
from script_runner import assert_same_run, assert_same_weights, load_checkpoint, read_csv, refused

import folder_train
import models


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("images") / "digits3")


@pytest.mark.filterwarnings("error:constrained_layout", "error:Glyph")
def test_names_of_classes_reach_neither_the_terminal_nor_the_figures_raw(tmp_path, capsys, monkeypatch):
    names = ["a\x1b[31mred", 'b\nline, "q"', "c$\\frac$", "\N{CJK UNIFIED IDEOGRAPH-732B}" + 80 * "W"]
    folder = make_folder(tmp_path / "hostile", (20, 10, 4, 4), names=names)
    monkeypatch.chdir(tmp_path)
    folder_train.main(["--data_dir", str(folder), *RUN])
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err
    shown = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert [name for name in shown if name[:2] in ("a\\", "b\\", "c$")] == [
        "a\\x1b[31mred", 'b\\nline, "q"', "c$\\frac$",
    ]  # fmt: skip
    logs = next((tmp_path / "log").iterdir())
    assert list(read_csv(logs / "class_accuracy.csv")[0]) == ["epoch_from_0", *names]
    assert {"confusion.png", "class_accuracy.png", "curves.png"} <= {path.name for path in logs.iterdir()}


@pytest.mark.parametrize("arch", ["mobilenet_v3_small", "vit_b_16"])
def test_ib_loss_is_finite_and_falls(folder, tmp_path, arch):
    small = {"image_size": 32, "patch_size": 16, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64}

    def small_vit(name, num_classes, use_norm, feature_norm):
        from torchvision.models import VisionTransformer  # the same model, smaller

        return models.with_feature_norm(VisionTransformer(**small, num_classes=num_classes), norm=feature_norm)

    replaced = {"torchvision_model": small_vit, "check_image_size": lambda *_: None} if arch == "vit_b_16" else {}
    with mock.patch.multiple(models, **replaced) if replaced else contextlib.nullcontext():
        out = run_in(
            tmp_path, "--data_dir", folder, *RUN, *IB, "-a", arch, "--epochs", "6", "--milestones", "5", "--lr", "0.02",
            "--ib_lr_factor", "0.1",
        )  # fmt: skip
    assert "class counts: 20 10 4, total 34" in out
    rows = read_csv(tmp_path / "log" / f"digits3_{arch}_IB_IBReweight_none_0" / "log_train.csv")
    losses = [float(row["loss"]) for row in rows if row["criterion"] == "IB"]
    assert len(losses) == 5
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]


def test_fork_resume_and_evaluation(folder, tmp_path):
    data = ["--data_dir", folder]
    run_in(tmp_path, *data, *RUN, *IB, "--exp_str", "whole")
    run_in(tmp_path, *data, *RUN)
    trunk = tmp_path / "checkpoint" / "digits3_mobilenet_v3_small_CE_None_none_0" / "ckpt.epoch001.pth.tar"
    run_in(tmp_path, *data, *RUN, *IB, "--resume", trunk)
    names = [f"digits3_mobilenet_v3_small_IB_IBReweight_none_{exp}" for exp in ("0", "whole")]
    assert_same_run(*(tmp_path / "checkpoint" / name for name in names))
    out = run_in(tmp_path, *data, *RUN, *IB, "-e", "--resume", "auto")
    last = read_csv(tmp_path / "log" / names[0] / "log_test.csv")[-1]
    assert f"\ntop-1 {float(last['acc1']):.2f}  " in out
    assert "nothing to do" in run_in(tmp_path, *data, *RUN, *IB)


def test_ldam_gets_a_normalised_head_and_is_evaluated_with_it(folder, tmp_path):
    args = ["--data_dir", folder, *RUN, "-a", "mobilenet_v3_small", "--loss_type", "LDAM", "--epochs", "1"]
    args += ["--milestones", "--lr", "0.01"]  # at 0.1 the logits of the evaluation are not finite
    run_in(tmp_path, *args)
    path = tmp_path / "checkpoint" / "digits3_mobilenet_v3_small_LDAM_None_none_0" / "ckpt.pth.tar"
    state = load_checkpoint(path)["state_dict"]
    assert state["classifier.3.weight"].shape == (1024, 3)
    assert "classifier.3.bias" not in state
    last = read_csv(tmp_path / "log" / path.parent.name / "log_test.csv")[-1]
    out = run_in(tmp_path, *args, "-e", "--resume", path, "--save_logits")
    assert f"\ntop-1 {float(last['acc1']):.2f}  " in out
    content = np.load(next(tmp_path.glob("log/*/evaluate/logits.npz")))
    assert abs(content["logits"]).max() <= 1, "cosines"
    run_in(tmp_path, "-e", "--resume", path, "--predict", folder / "val", "-j", "0")
    rows = read_csv(next(tmp_path.glob("log/*/predict/*.csv")))
    of_file = {f"val/{row['file']}": float(row["probability"]) for row in rows}
    expected = torch.from_numpy(30 * content["logits"]).softmax(1).max(1).values.tolist()
    assert [of_file[file] for file in content["files"]] == pytest.approx(expected, abs=1e-4)
    believed = {row["file"]: float(row["probability"]) for row in read_csv(*tmp_path.glob("log/*/evaluate/errors.csv"))}
    assert believed == {file: pytest.approx(of_file[file], abs=1e-3) for file in believed}


def test_a_test_part_alone_and_a_made_imbalance(folder, tmp_path):
    shutil.copytree(folder / "train", tmp_path / "only" / "train")
    args = ["--data_dir", "only", *RUN, "--epochs", "1", "--milestones", "-b", 7]
    out = run_in(tmp_path, *args, "--test_fraction", "0.5", "--imb_type", "step", "--imb_factor", "0.3")
    assert "class counts: 10 5 2, total 17" in out
    summary = json.loads(next((tmp_path / "log").glob("*/summary.json")).read_text())
    assert (summary["last"]["seen"], summary["settings"]["val_fraction"]) == (17, 0)


def test_the_checkpoint_keeps_how_images_are_read(folder, tmp_path):
    """Mean, std and orientation: an evaluation without the flags gives the same figures; other ones are refused."""
    args = ["--data_dir", folder, *RUN, "--epochs", "1", "--milestones", "--exif", "--mean", "0.1", "0.2", "0.3"]
    run_in(tmp_path, *args, "--std", "0.5", "0.5", "1")
    path = next((tmp_path / "checkpoint").glob("*/ckpt.pth.tar"))
    kept = load_checkpoint(path)["preprocessing"]
    assert (kept["mean"], kept["std"], kept["exif"]) == ([0.1, 0.2, 0.3], [0.5, 0.5, 1.0], True)
    evaluation = ["--data_dir", folder, "-e", "--resume", path, "--threads", "1", "-j", "0", "-b", "8"]
    run_in(tmp_path, *evaluation)
    expected = json.loads(next(tmp_path.glob("log/*/summary.json")).read_text())["last"]
    assert evaluated(tmp_path)["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    why = "mean is (0.1, 0.2, 0.3) there and (0.5, 0.5, 0.5) here"
    refused([*evaluation, "--mean", "0.5", "0.5", "0.5"], tmp_path, why, run=run_folder)


def test_exif_turns_the_images_of_training_and_test(folder, tmp_path):
    """A run on images that say how they are to be turned is that on images that were turned, to the bit."""
    noted = Image.Exif()
    noted[0x0112] = 6  # by 90 degrees clockwise
    for source in folder.rglob("*.jpg"):
        path = source.relative_to(folder).with_suffix(".png")
        for place in ("noted", "turned"):
            (tmp_path / place / "images" / path).parent.mkdir(parents=True, exist_ok=True)
        image = Image.open(source)
        image.save(tmp_path / "noted" / "images" / path, exif=noted)
        image.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "turned" / "images" / path)
    for place, flags in (("noted", ["--exif"]), ("turned", [])):
        run_in(tmp_path / place, "--data_dir", "images", *RUN, "--epochs", "1", "--milestones", *flags)
    one, two = (next((tmp_path / place).glob("checkpoint/*/ckpt.pth.tar")) for place in ("noted", "turned"))
    assert_same_weights(one, two)
    assert load_checkpoint(one)["history"][0]["test"]["loss"] == load_checkpoint(two)["history"][0]["test"]["loss"]


def test_damaged_images_are_left_out_of_run_and_evaluation(tmp_path):
    data = make_folder(tmp_path / "data", counts=(30, 20, 10))
    (data / "train" / "class1" / "3.jpg").write_bytes(b"no image")
    (data / "val" / "class0" / "0.jpg").write_bytes(b"no image")
    args = ["--data_dir", data, *RUN, "--epochs", "1", "--milestones"]
    out = run_in(tmp_path, *args, "--skip_damaged")
    assert "class counts: 30 19 10, total 59" in out
    path = next((tmp_path / "checkpoint").glob("*/ckpt.pth.tar"))
    run_in(tmp_path, "--data_dir", data, "-e", "--resume", path, "--threads", "1", "-j", "0")
    assert evaluated(tmp_path)["seen"] == 8


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A folder with train/ only, and a finished run that tests on a tenth of it."""
    home = tmp_path_factory.mktemp("held_out")
    shutil.rmtree(make_folder(home / "images", counts=(40, 20, 10)) / "val")
    run_in(home, "--data_dir", "images", *RUN, "--val_fraction", "0.1")
    return home


def evaluated(home, of=""):
    """The only evaluation, or that of the test images of a folder."""
    (path,) = home.glob(f"log/*/evaluate/{of}**/evaluation.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize(("name", "flags"), [("ckpt.pth.tar", []), ("ckpt.best.pth.tar", ["--val_fraction", "0.1"])])
def test_evaluation_tests_on_the_images_that_the_run_held_out(name, flags, held_out, tmp_path):
    home = Path(shutil.copytree(held_out, tmp_path / "home"))
    (path,) = home.glob(f"checkpoint/*/{name}")
    out = run_in(home, "--data_dir", "images", "-e", "--resume", path, "--threads", "1", "-j", "0", *flags)
    summary = json.loads(next(home.glob("log/*/summary.json")).read_text())
    expected = summary["best" if "best" in name else "last"]
    found = evaluated(home)
    assert found["seen"] == expected["seen"] == 7
    assert {key: found[key] for key in ("acc1", "class_mean", "per_class")} == {
        key: expected[key] for key in ("acc1", "class_mean", "per_class")
    }
    assert f"\ntop-1 {expected['acc1']:.2f}  " in out


def test_evaluation_of_a_held_out_part_refuses_images_that_have_changed(held_out, tmp_path):
    """With one more image the part that is held out would be another one, with training images in it."""
    home = Path(shutil.copytree(held_out, tmp_path / "home"))
    images = home / "images" / "train" / "class0"
    shutil.copy(images / "0.jpg", images / "more.jpg")
    (path,) = home.glob("checkpoint/*/ckpt.pth.tar")
    args = ["--data_dir", "images", "-e", "--resume", path, "--threads", "1", "-j", "0"]
    words = f"{path} was trained on other images than in images", "to test on new images put their class folders into"
    refused(args, home, *words, status=1, run=run_folder)
    run_in(home, *args, "--force")


def test_evaluation_on_a_test_folder_of_its_own(folder, tmp_path):
    """Other images, no train/, and one class less."""
    # the last batch of two images throws the weights far off at the usual lr
    run_in(tmp_path, "--data_dir", folder, *RUN, "--epochs", "1", "--milestones", "--lr", "1e-3")
    (path,) = tmp_path.glob("checkpoint/*/ckpt.pth.tar")
    last = json.loads(next(tmp_path.glob("log/*/summary.json")).read_text())["last"]
    evaluation = ["-e", "--resume", path, "--threads", "1", "-j", "0"]
    for place in ("new/test", "plain"):
        new = shutil.copytree(folder / "val", tmp_path / place)
        shutil.rmtree(new / "class1")
        run_in(tmp_path, "--data_dir", place.split("/")[0], *evaluation)
        found = evaluated(tmp_path, of=f"{place.split('/')[0]}/")
        assert (found["seen"], found["per_class"][1]) == (6, None)
        assert [found["per_class"][k] for k in (0, 2)] == [last["per_class"][k] for k in (0, 2)]


def test_evaluation_on_a_list_of_its_own(folder, tmp_path):
    """Of a model that was trained on lists, where its training images are not."""
    for part in ("train", "val"):
        rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in sorted((folder / part).rglob("*.jpg"))]
        (tmp_path / f"{part}.csv").write_text("\n".join(["image,label", *rows]) + "\n")
    lists = ["--train_list", "train.csv", "--val_list", "val.csv"]
    run_in(tmp_path, "--data_dir", folder, *lists, *RUN, "--epochs", "1", "--milestones", "--lr", "1e-3")
    (path,) = tmp_path.glob("checkpoint/*/ckpt.pth.tar")
    shutil.copytree(folder, tmp_path / "new")  # its train/ is not looked at
    (tmp_path / "new.csv").write_text("image,label\nval/class0/0.jpg,class0\nval/class2/1.jpg,class2\n")
    evaluation = ["-e", "--resume", path, "--threads", "1", "-j", "0", "--skip_damaged"]
    run_in(tmp_path, "--data_dir", "new", *evaluation, "--val_list", "new.csv")
    found = evaluated(tmp_path)
    assert (found["seen"], found["per_class"][1], found["val_list"]) == (2, None, "new.csv")
    (tmp_path / "train.csv").unlink()
    run_in(tmp_path, "--data_dir", folder, *evaluation, "--val_list", "val.csv")


def test_other_images_in_a_folder_of_the_same_name_are_not_the_finished_run(folder, tmp_path):
    for place in ("one", "two"):
        shutil.copytree(folder, tmp_path / place / "images")
    (tmp_path / "two" / "images" / "train" / "class1" / "3.jpg").write_bytes(
        (folder / "train" / "class1" / "4.jpg").read_bytes()
    )
    run_in(tmp_path, "--data_dir", "one/images", *RUN)
    words = "was trained on other image files than those in two/images", "(--overwrite trains it again)"
    for more in ([], ["--resume", "auto"], ["--resume", "auto", "--force"]):
        refused(["--data_dir", "two/images", *RUN, *more], tmp_path, *words, status=1, run=run_folder)
    (tmp_path / "one").rename(tmp_path / "moved")
    os.utime(tmp_path / "moved" / "images" / "train" / "class0" / "0.jpg", (0, 0))
    assert "finished: nothing to do" in run_in(tmp_path, "--data_dir", "moved/images", *RUN)


def test_weights_of_another_number_of_classes_keep_the_new_head(folder, tmp_path):
    model = models.torchvision_model("resnet18", 7)
    torch.save(model.state_dict(), tmp_path / "seven.pth")
    args = ["--data_dir", folder, *RUN, "--epochs", "1", "--milestones", "--lr", "0", "--pretrained", "seven.pth"]
    args += ["-a", "resnet18"]
    line = "--pretrained seven.pth: 122 tensors loaded into resnet18; its last layer, fc, is new"
    assert line in run_in(tmp_path, *args)
    state = load_checkpoint(next((tmp_path / "checkpoint").glob("*/ckpt.pth.tar")))["state_dict"]
    assert torch.equal(state["layer4.1.conv2.weight"], model.state_dict()["layer4.1.conv2.weight"])
    assert state["fc.weight"].shape == (3, 512)


# ------------------------------------------------------------------------------------------------ wrong folders


def test_a_folder_whose_name_cannot_be_part_of_the_runs(folder, tmp_path):
    odd = shutil.copytree(folder, tmp_path / "a\nb")
    refused(["--data_dir", odd, *RUN], tmp_path, "a\\nb: its name cannot be part of the run's", run=run_folder)
    run_in(tmp_path, "--data_dir", odd, *RUN, "--epochs", "1", "--milestones", "--dataset", "images")
    assert [path.name.split("_")[0] for path in (tmp_path / "log").iterdir()] == ["images"]


def test_last_batch_of_one_image(folder, tmp_path):
    args = ["--data_dir", folder, *RUN, "--batch-size", "11"]  # 34 = 3 * 11 + 1
    refused(args, tmp_path, "--batch-size 11 leaves a last batch of one image", run=run_folder)


def test_a_factor_without_a_shape_of_the_tail_is_refused(folder, tmp_path):
    args = ["--data_dir", folder, *RUN, "--imb_factor", "0.1"]
    refused(args, tmp_path, "--imb_factor needs an --imb_type", run=run_folder)
