"""--predict, and docs/production.md: its code gives what -e gives, and its ONNX file too."""

import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
from image_runs import RUN, make_folder, run_folder, run_in
from script_runner import REPOSITORY, load_checkpoint, read_csv, refused

from experiment.evaluation import path_name
from results import weights

PAGE = (REPOSITORY / "docs" / "production.md").read_text()
PLAIN, ONNX = re.findall(r"```python\n(.*?)```", PAGE, flags=re.S)
NAMES = ["cat, tabby", "dog \N{DOG FACE}", "emu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of a run that -e --save_logits has evaluated, checkpoint): a comma and an emoji in its class names."""
    folder = tmp_path_factory.mktemp("production")
    data = make_folder(folder / "animals", names=NAMES)
    run_in(folder, "--data_dir", data, *RUN)
    (path,) = folder.glob("checkpoint/*/ckpt.pth.tar")
    run_in(folder, "-e", "--save_logits", "--resume", path, "--data_dir", data, "-j", "0")
    return folder, path


def saved(folder):
    (path,) = folder.glob("log/*/evaluate/logits.npz")
    with np.load(path) as content:
        return dict(content)


def test_logits_have_names_and_the_errors_are_listed(trained):
    folder, _ = trained
    content = saved(folder)
    assert content["files"][0] == os.path.join("val", NAMES[0], "0.jpg")
    assert content["classes"].tolist() == NAMES
    probabilities = torch.from_numpy(content["logits"]).softmax(1).numpy()
    wrong = np.flatnonzero(probabilities.argmax(1) != content["target"])
    rows = read_csv(next(folder.glob("log/*/evaluate/errors.csv")))
    assert {row["file"] for row in rows} == set(content["files"][wrong])
    believed = [float(row["probability"]) for row in rows]
    assert believed == sorted(believed, reverse=True)
    for row in rows:
        at = content["files"].tolist().index(row["file"])
        assert row["class"] == NAMES[content["target"][at]]
        assert row["predicted"] == NAMES[probabilities[at].argmax()]


def test_predictions_of_a_folder_are_those_of_the_evaluation(trained, tmp_path):
    """From a slim checkpoint, without the training images; a damaged image is named and left out."""
    folder, path = trained
    content = saved(folder)
    expected = torch.from_numpy(content["logits"]).softmax(1).numpy()
    new = tmp_path / "new"
    for number, name in enumerate(content["files"]):
        (new / "deep").mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / "animals" / name, new / "deep" / f"{number:02d}.jpg")
    (new / "broken.jpg").write_text("<html>")
    slim = weights.slim(str(path), tmp_path / "weights.pth.tar")
    args = ["-e", "--resume", slim, "--predict", "new", "-j", "0"]
    status, out, err = run_folder([*args, "--top", "2"], tmp_path)
    assert status == 0
    assert "warning: left out: new/broken.jpg cannot be decoded" in err
    assert "9 images, 1 left out" in out
    rows = read_csv(next(tmp_path.glob("log/*/predict/weights/new.csv")))
    assert [row["file"] for row in rows[::2]] == [f"deep/{number:02d}.jpg" for number in range(9)]
    for number in range(9):
        likeliest = expected[number].argsort()[::-1][:2]
        pair = rows[2 * number : 2 * number + 2]
        assert [row["class"] for row in pair] == [NAMES[k] for k in likeliest]
        found = [float(row["probability"]) for row in pair]
        assert found == pytest.approx(expected[number][likeliest].tolist(), abs=2e-5)
    state = load_checkpoint(slim)
    next(tensor for name, tensor in state["state_dict"].items() if name.endswith("bias")).fill_(math.nan)
    torch.save(state, slim)
    refused(args, tmp_path, "gives logits that are not finite", status=1, run=run_folder)


@pytest.mark.parametrize(("training", "flags"), [(["--ema", "0.9"], []), ([], ["--posthoc_la", "1"])])
def test_predictions_are_of_the_averaged_weights_and_the_corrected_logits(training, flags, trained, tmp_path):
    """By hand: the page's code with the average, or minus the logarithm of the prior."""
    folder, path = trained
    if training:
        run_in(tmp_path, "--data_dir", folder / "animals", *RUN, *training)
        (path,) = tmp_path.glob("checkpoint/*/ckpt.pth.tar")
    images = folder / "animals" / "val"
    run_in(tmp_path, "-e", "--resume", path, "--predict", images, "--top", "3", "-j", "0", *flags)
    rows = read_csv(next(tmp_path.glob("log/*/predict/**/*.csv")))

    names: dict = {}
    exec(PLAIN.split("image = ")[0].replace("checkpoint/NAME/ckpt.best.pth.tar", str(path)), names)
    state, model, transform = (names[name] for name in ("state", "model", "transform"))
    if training:
        averaged = {name.removeprefix("module."): tensor for name, tensor in state["ema"].items()}
        del averaged["n_averaged"]
        model.load_state_dict(averaged)
    counts = torch.tensor(state["class_counts"])
    files = sorted({row["file"] for row in rows})
    batch = torch.stack([transform(names["PIL"].Image.open(images / file).convert("RGB")) for file in files])
    with torch.inference_mode():
        probabilities = (model(batch) - len(flags[1:]) * (counts / counts.sum()).log()).softmax(1).tolist()
    found = {(row["file"], row["class"]): float(row["probability"]) for row in rows}
    expected = [p for of_image in probabilities for p in of_image]
    assert [found[file, name] for file in files for name in NAMES] == pytest.approx(expected, abs=2e-5)
    assert len(found) == 27


def test_folders_of_one_name_have_predictions_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [path_name(path) for path in ("new", "./new/", str(tmp_path / "new"), "a/new", "b/new", "/data/new")]
    assert names == ["new", "new", "new", "a__new", "b__new", "data__new"]
    assert path_name(".").endswith(f"__{tmp_path.name}")
    assert path_name("a_b/c") != path_name("a/b_c")
    (tmp_path / f"{path_name('/data/' + chr(0x1F44C) * 90)}.csv").touch()  # a name has at most 255 bytes


def test_the_pages_code_and_its_onnx_file_give_the_evaluations_logits(trained, tmp_path, monkeypatch, capsys):
    folder, path = trained
    monkeypatch.chdir(tmp_path)
    content = saved(folder)
    images = [folder / "animals" / name for name in content["files"]]
    shutil.copy(images[0], "image.jpg")
    names: dict = {}
    exec(PLAIN.replace("checkpoint/NAME/ckpt.best.pth.tar", str(path)), names)
    assert capsys.readouterr().out.startswith(NAMES[content["logits"][0].argmax()])
    transform, opened = names["transform"], [names["PIL"].Image.open(image) for image in images]
    batch = torch.stack([transform(image.convert("RGB")) for image in opened])
    with torch.inference_mode():
        logits = names["model"](batch).numpy()
    largest = max(1, np.abs(content["logits"]).max())
    np.testing.assert_allclose(logits, content["logits"], rtol=1e-4, atol=1e-4 * largest)

    onnxruntime = pytest.importorskip("onnxruntime")
    exec(ONNX, names)
    session = onnxruntime.InferenceSession("model.onnx")
    for size in (1, len(images)):
        (found,) = session.run(["logits"], {"images": batch[:size].numpy()})
        np.testing.assert_allclose(found, logits[:size], rtol=1e-3, atol=1e-3)


def test_an_evaluation_follows_folders_that_were_renamed(trained, tmp_path):
    folder, path = trained
    work = shutil.copytree(folder, tmp_path / "work")
    for kind in ("log", "checkpoint"):
        (work / kind / path.parent.name).rename(work / kind / "best_so_far")
    out = run_in(work, "-e", "--resume", "checkpoint/best_so_far/ckpt.pth.tar", "--data_dir", "animals", "-j", "0")
    assert "written: log/best_so_far/evaluate/" in out
    assert [entry.name for entry in (work / "log").iterdir()] == ["best_so_far"]


@pytest.mark.parametrize(
    ("flags", "status", "words"),
    [
        (["--predict", "empty"], 1, "no images in empty"),
        (["--predict", "nowhere"], 1, "nowhere cannot be read"),
        (["--top", "2"], 2, "--top is for --predict"),
        (["--predict", ".", "--tau_norm", "1", "2"], 2, "--tau_norm takes one value with --predict"),
        (["--predict", ".", "--save_logits"], 2, "--save_logits is for the test images"),
        (["--predict", "."], 1, "none of the 1 images in . can be decoded"),
    ],
)
def test_what_cannot_be_predicted_is_said_in_a_line(flags, status, words, trained, tmp_path):
    _, path = trained
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.jpg").touch()
    refused(["-e", "--resume", path, *flags], tmp_path, words, status=status, run=run_folder)
