"""README tells the truth: its commands parse, its flags exist, its snippet runs."""

import pathlib
import re
import shlex

import pytest
import torch

import cifar_train
import folder_train
import inat_train
import tinyimage_train

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()
SCRIPTS = {
    "cifar_train.py": cifar_train,
    "tinyimage_train.py": tinyimage_train,
    "folder_train.py": folder_train,
    "inat_train.py": inat_train,
}


def commands():
    lines = re.findall(r"^python (\w+\.py) (.*)$", README, flags=re.M)
    return [(name, text) for name, text in lines if name in SCRIPTS and "<" not in text and "..." not in text]


def test_there_are_the_four_published_commands():
    assert sum("--num_classes 100 " in text for _, text in commands()) == 4


@pytest.mark.parametrize(("script", "text"), commands())
def test_every_command_passes_its_dry_run(script, text, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    SCRIPTS[script].main([*shlex.split(text), "--dry_run"])
    rows = capsys.readouterr().out.split()
    epochs = int(re.search(r"--epochs (\d+)", text).group(1))
    assert rows[0] == "epoch,lr,loss,class_weights,sampler"
    assert len(rows) == epochs + 1
    assert list(tmp_path.iterdir()) == []


def test_the_flag_table_is_complete_and_names_nothing_else():
    known = {name for action in cifar_train.build_parser()._actions for name in action.option_strings}
    table = README[README.index("| group | flags |") : README.index("Three of them")]
    named = set(re.findall(r"(?<!-)(--?[a-zA-Z][\w-]*)", table))
    assert named <= known
    for action in cifar_train.build_parser()._actions:
        assert named & set(action.option_strings) or "--help" in action.option_strings, action.option_strings


def test_the_snippet_of_your_own_loop_runs():
    snippet = re.search(r"```python\n(.*?)```", README, flags=re.S).group(1)
    names = {
        "class_counts": [50, 20, 10, 9, 8, 7, 6, 5, 4, 3],
        "images": torch.randn(4, 3, 32, 32),
        "target": torch.tensor([0, 1, 2, 9]),
    }
    exec(snippet, names)
    names["loss"].backward()
    assert torch.isfinite(names["loss"])
    assert names["features"].shape == (4, 1)
    assert all(torch.isfinite(p.grad).all() for p in names["net"].parameters())
