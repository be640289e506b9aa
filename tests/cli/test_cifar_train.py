"""cifar_train.py on CIFAR-10 and CIFAR-100 in their official form, and with a checkpoint in the official code's.

The images are made; what the script reports is worked out a second time from the pixels and the weights.
"""

import json

import numpy as np
import pytest
import torch
from cifar_maker import CLASS_NAMES, TRAIN, images_of, labels_of_test, official_archive
from conftest import golden
from script_runner import TINY, load_checkpoint, log_folder, model_folder, read_csv, run_ok, tiny
from torch.nn import functional as F

RUN = ["--threads", "1", "--seed", "0", "--imb_factor", "0.1"]


@pytest.fixture(params=CLASS_NAMES)
def name(request, tmp_path):
    with official_archive(tmp_path / "data", request.param):
        yield request.param


def images_of_test(name):
    """The test images as the model is to see them, (N, 3, 32, 32) float64, and their labels (N,)."""
    labels = labels_of_test(name)
    images = images_of(labels, TRAIN[name]) / 255
    normalised = (images - [0.4914, 0.4822, 0.4465]) / [0.2023, 0.1994, 0.2010]
    return torch.from_numpy(normalised.transpose(0, 3, 1, 2)), torch.tensor(labels)


def accuracy_of_classes(predicted, labels):
    return [100 * (predicted[labels == k] == k).double().mean().item() for k in labels.unique()]


def test_from_the_archive_to_the_records(name, tmp_path):
    classes = len(CLASS_NAMES[name])
    counts = [int(TRAIN[name] * 0.1 ** (k / (classes - 1))) for k in range(classes)]
    training = ["-b", "8", "--epochs", "1", "--warmup_epochs", "0", "--milestones"]
    out = run_ok(["--dataset", name, *TINY, *RUN, *training], tmp_path)
    assert f"class counts: {' '.join(map(str, counts))}, total {sum(counts)}" in out
    folder = log_folder(tmp_path, dataset=name, imb="exp_0.1")
    summary = json.loads((folder / "summary.json").read_text())
    (record,) = summary["history"]
    assert (summary["class_counts"], summary["classes"]) == (counts, CLASS_NAMES[name])
    assert record["train"]["seen"] == sum(counts)

    images, labels = images_of_test(name)
    model = tiny(classes)
    model.load_state_dict(
        load_checkpoint(model_folder(tmp_path, dataset=name, imb="exp_0.1") / "ckpt.pth.tar")["state_dict"]
    )
    with torch.no_grad():
        predicted = model.double().eval()(images)[0].argmax(1)
    expected = accuracy_of_classes(predicted, labels)
    assert sum(map(bool, expected)) > 5
    assert record["test"]["seen"] == len(labels)
    assert record["test"]["acc1"] == pytest.approx(100 * (predicted == labels).double().mean().item())
    (row,) = read_csv(folder / "class_accuracy.csv")
    assert list(row) == ["epoch_from_0", *CLASS_NAMES[name]]
    assert [float(row[of_class]) for of_class in CLASS_NAMES[name]] == pytest.approx(expected)


def weights_by_hand():
    """A resnet32's state dict: the official names and shapes, numbers from numpy."""
    generator, state = np.random.RandomState(0), {}
    for key, shape in golden("state_dict_keys.json")["resnet32"].items():
        values = generator.randn(*shape)
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(3)
            continue
        if key.endswith("running_var"):
            values = 1 + np.abs(values)
        elif len(shape) == 4:
            values *= np.sqrt(2 / np.prod(shape[1:]))
        state[key] = torch.tensor(values, dtype=torch.float32)
    return state


def features_by_hand(state, x):
    """The last layer's input, (N, 64), as He et al. describe it (option-A shortcuts), in float64."""
    state = {key: tensor.double() for key, tensor in state.items()}

    def convolve(x, conv, norm, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        mean, var, scale, shift = (
            state[f"{norm}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    x = convolve(x, "conv1", "bn1").relu()
    for layer in (1, 2, 3):
        for block in range(5):
            of, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            out = convolve(x, f"{of}.conv1", f"{of}.bn1", stride).relu()
            if stride == 2:  # every second pixel, and as many channels again, of zeros, half of them on each side
                zeros = torch.zeros(len(x), x.shape[1] // 2, *out.shape[2:])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            x = (convolve(out, f"{of}.conv2", f"{of}.bn2") + x).relu()
    return x.mean((2, 3))


def test_a_checkpoint_of_the_official_code_reaches_what_its_weights_reach(tmp_path):
    state, (images, labels) = weights_by_hand(), images_of_test("cifar10")
    features = features_by_hand(state, images)
    # the head finds the nearest of the first ten images, one a class, and confuses three classes
    assert labels[:10].tolist() == list(range(10))
    known = features[[0, 1, 2, 3, 4, 5, 6, 8, 9, 7]].float()
    state["linear.weight"], state["linear.bias"] = known, -known.square().sum(1) / 2
    expected = features @ state["linear.weight"].double().T + state["linear.bias"].double()
    official = {
        "epoch": 200,
        "arch": "resnet32",
        "state_dict": {f"module.{key}": tensor for key, tensor in state.items()},
        "best_acc1": torch.tensor(12.5),
        "optimizer": {
            "state": {},
            "param_groups": [{"lr": 1e-5, "momentum": 0.9, "weight_decay": 2e-4, "params": [*range(95)]}],
        },
    }
    torch.save(official, tmp_path / "ckpt.best.pth.tar")
    with official_archive(tmp_path / "data", "cifar10"):
        run_ok([*RUN, "-e", "--resume", "ckpt.best.pth.tar", "--save_logits"], tmp_path)
    folder = log_folder(tmp_path, arch="resnet32", dataset="cifar10", imb="exp_0.1") / "evaluate" / "ckpt.best"
    with np.load(folder / "logits.npz") as saved:
        logits, target = torch.from_numpy(saved["logits"]).double(), torch.from_numpy(saved["target"])
    found = json.loads((folder / "evaluation.json").read_text())
    assert torch.equal(target, labels)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    assert found["acc1"] == pytest.approx(100 * (expected.argmax(1) == labels).double().mean().item()) == 68
    assert found["per_class"] == pytest.approx(accuracy_of_classes(expected.argmax(1), labels))
    assert (found["seen"], found["epoch"]) == (len(labels), 200)
