"""inat_train.py on small real images in iNaturalist 2018's official layout: recipe, classes, images, refused data."""

import functools
import json
import shutil
from pathlib import Path

import pytest
from image_runs import IB, IDS, TAIL, make_inat, run_in
from script_runner import refused, run_script

import imbalance_inat
import inat_train
from experiment.parser import parse
from utils import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_inat(tmp_path_factory.mktemp("inat"))


@pytest.fixture
def copy(data, tmp_path):
    return shutil.copytree(data, tmp_path / "copy")


def change(path, edit):
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_papers_recipe_is_the_default(tmp_path):
    rows = run_in(tmp_path, "--dry_run", *IB, script=inat_train).split()
    recipe = [row.split(",") for row in rows[1:]]
    assert len(recipe) == 200
    assert [(int(e), float(lr), loss, weights) for e, lr, loss, weights, _ in recipe if e in ("0", "29", "30")] == [
        (0, 0.01, "CE", "none"), (29, 0.01, "CE", "none"), (30, 0.001, "CE", "none"),
    ]  # fmt: skip
    assert [row[2] for row in recipe].index("IB") == 50
    assert [float(recipe[e][1]) for e in (50, 179, 180, 199)] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert parse("inat_train.py", []).arch == "resnet50"


def test_load_orders_classes_by_id_and_keeps_the_natural_tail(data, capsys):
    train, val = imbalance_inat.load(str(data))
    assert [train.targets.count(k) for k in range(4)] == list(TAIL)
    assert val.targets == [0, 0, 1, 1, 2, 2, 3, 3]
    assert train.classes == val.classes == [f"species {k}" for k in IDS]
    for path, target in zip(train.paths, train.targets, strict=True):
        assert Path(path).parent.name == str(IDS[target])
        assert Path(path).exists()
    assert "4 classes, iNaturalist 2018 has 8142" in capsys.readouterr().err


def test_class_ids_may_be_text_in_one_place_and_numbers_in_another(data, copy):
    def in_words(content):
        for row in content["annotations"]:
            row["category_id"] = str(row["category_id"])

    change(copy / "train2018.json", in_words)
    assert imbalance_inat.load(str(copy))[0].targets == imbalance_inat.load(str(data))[0].targets


def remove_class(number):
    def change(content):
        gone = {row["image_id"] for row in content["annotations"] if row["category_id"] == number}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in gone]
        content["images"] = [image for image in content["images"] if image["id"] not in gone]

    return change


def add_image(row, **fields):
    return lambda content: content["images"].append({**content["images"][row], **fields})


def annotate(row, **fields):
    return lambda content: content["annotations"].append({**content["annotations"][row], **fields})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda content: content["annotations"].pop(5), "images in no class: train_val2018/Plantae/3/train5.jpg"),
        (add_image(5, id=99999), "images in no class: train_val2018/Plantae/3/train5.jpg"),
        (lambda content: content["images"][5].update(file_name="no.jpg"), "1 of 42 files are missing .*/copy/no.jpg"),
        (add_image(5), "duplicated files: .*train_val2018/Plantae/3/train5.jpg"),
        (annotate(5, category_id=10), "images in two classes: 5"),
        (remove_class(10), "no training images of the classes species 10"),
        (lambda content: content.update(images=[]), "lists no images"),
        (
            lambda content: content["annotations"].append({"id": 1}),
            "is not an annotation file of iNaturalist .KeyError",
        ),
    ],
)
def test_annotations_that_cannot_be_used(copy, edit, message):
    change(copy / "train2018.json", edit)
    with pytest.raises(DataError, match=message):
        imbalance_inat.load(str(copy))


def test_what_is_only_a_warning(copy, capsys):
    """A validation image that is a training image, a class without such images, an annotation that is repeated."""
    change(copy / "train2018.json", annotate(5))
    name = "train_val2018/Plantae/3/train0.jpg"
    change(copy / "val2018.json", lambda content: content["images"][0].update(file_name=name))
    change(copy / "val2018.json", remove_class(10))
    train, val = imbalance_inat.load(str(copy))
    assert (train.get_cls_num_list(), val.get_cls_num_list()) == ([24, 11, 5, 2], [2, 0, 2, 2])
    err = capsys.readouterr().err
    assert f"warning: 1 of the 6 images of {copy}/val2018.json are training images too\n" in err
    assert "warning: no test image of 1 classes, whose accuracy is n/a: species 10\n" in err


def test_no_data(copy, tmp_path):
    run = functools.partial(run_script, inat_train)
    refused(["--data_dir", "nowhere"], tmp_path, "no nowhere/train2018.json", status=1, run=run)
    (copy / "train2018.json").write_text("{")
    with pytest.raises(DataError, match="is not an annotation file"):
        imbalance_inat.load(str(copy))


def test_damaged_images(copy, tmp_path):
    (copy / "train_val2018" / "Plantae" / "3" / "train0.jpg").write_bytes(b"no image")
    imbalance_inat.load(str(copy))
    with pytest.raises(DataError, match="1 of 50 images are damaged"):
        imbalance_inat.load(str(copy), check_images=True)
    assert imbalance_inat.load(str(copy), skip_damaged=True)[0].get_cls_num_list() == [23, 11, 5, 2]
