"""inat_train.py on small real images in iNaturalist 2018's official layout: recipe, runs, what the check finds."""

import json
import shutil
from pathlib import Path

import pytest
from image_runs import IB, IDS, TAIL, fails, make_inat, run, run_ok
from script_runner import assert_same_weights, messages, read_csv, read_logs
from tinyimagenet_maker import image_of

import imbalance_inat
import inat_train
from experiment.parser import parse
from utils import DataError

RUN = [
    "-a", "shufflenet_v2_x0_5", "--image_size", "32", "--batch-size", "9", "--epochs", "3", "--start_ib_epoch", "1",
    "--milestones", "2", "--seed", "0", "--threads", "1", "-j", "0",
]  # fmt: skip


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
    rows = run_ok(tmp_path, "--dry_run", *IB, script=inat_train).split()
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


def test_run_resume_and_evaluation(data, tmp_path):
    args = ["--data_dir", data, *RUN, *IB]
    out = run_ok(tmp_path, *args, "--exp_str", "whole", script=inat_train)
    assert "class counts: 24 11 5 2, total 42" in out
    run_ok(tmp_path, "--data_dir", data, *RUN, script=inat_train)
    trunk = tmp_path / "checkpoint" / "inaturalist_shufflenet_v2_x0_5_CE_None_none_0" / "ckpt.epoch001.pth.tar"
    run_ok(tmp_path, *args, "--resume", trunk, script=inat_train)
    names = [f"inaturalist_shufflenet_v2_x0_5_IB_IBReweight_none_{exp}" for exp in ("0", "whole")]
    assert_same_weights(*(tmp_path / "checkpoint" / name / "ckpt.pth.tar" for name in names))
    assert read_logs(tmp_path / "log" / names[0]) == read_logs(tmp_path / "log" / names[1])
    last = read_csv(tmp_path / "log" / names[0] / "log_test.csv")[-1]
    assert (last["many"], float(last["medium"]) >= 0, float(last["few"]) >= 0) == ("n/a", True, True)
    out = run_ok(tmp_path, *args, "-e", "--resume", "auto", script=inat_train)
    assert f"\ntop-1 {float(last['acc1']):.2f}  " in out


def test_missing_images_are_named(copy, tmp_path):
    for name in ("train0.jpg", "val1.jpg"):
        (copy / "train_val2018" / "Plantae" / "4000" / name).unlink()
    line = fails(tmp_path, "--data_dir", copy, *RUN, script=inat_train)
    folder = "train_val2018/Plantae/4000"
    assert f"2 of 50 images are missing: {folder}/train0.jpg, {folder}/val1" in line


def test_image_in_no_class_is_named(copy, tmp_path):
    change(copy / "train2018.json", lambda content: content["annotations"].pop(5))
    line = fails(tmp_path, "--data_dir", copy, *RUN, script=inat_train)
    assert "1 images in no class: train_val2018/Plantae/3/train5.jpg" in line


def test_image_that_no_annotation_names_is_left_out(copy, tmp_path):
    image_of(0, 9).save(copy / "train_val2018" / "Plantae" / "3" / "stray.jpg")
    status, out, err = run(tmp_path, "--data_dir", copy, *RUN, "--epochs", "1", "--milestones", script=inat_train)
    assert status == 0
    assert "1 images that no annotation names are left out: train_val2018/Plantae/3/stray.jpg" in err
    assert "total 42" in out


@pytest.mark.parametrize(
    "name", ["/etc/hosts.jpg", "train_val2018/../../secret.jpg", "elsewhere/a.jpg", "train_val2018\\..\\a.jpg", 7]
)
def test_paths_outside_the_data_are_refused(copy, tmp_path, name):
    change(copy / "val2018.json", lambda content: content["images"][0].update(file_name=name))
    line = fails(tmp_path, "--data_dir", copy, *RUN, script=inat_train)
    assert "names images outside train_val2018" in line


def test_class_without_training_images_is_named(copy, tmp_path):
    def remove(content):
        gone = {row["image_id"] for row in content["annotations"] if row["category_id"] == 10}
        content["annotations"] = [row for row in content["annotations"] if row["image_id"] not in gone]
        content["images"] = [image for image in content["images"] if image["id"] not in gone]

    change(copy / "train2018.json", remove)
    assert "classes without training images: species 10" in fails(tmp_path, "--data_dir", copy, *RUN, script=inat_train)


def annotate(row, **fields):
    return lambda content: content["annotations"].append({**content["annotations"][row], **fields})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda content: (
                content["images"].append({"id": 99999, "file_name": content["images"][5]["file_name"]}),
                annotate(5, image_id=99999)(content),
            ),
            r"duplicated files: train_val2018/Plantae/3/train5\.jpg",
        ),
        (
            lambda content: (content["images"][6].update(id=5), content["annotations"][6].update(image_id=5)),
            r"images whose id another image has: train_val2018/Plantae/3/train5\.jpg",
        ),
        (annotate(5, category_id=10), r"images in two classes: train_val2018/Plantae/3/train5\.jpg"),
        (annotate(5, category_id=True), "classes that are no numbers or that its categories do not list: true"),
        (annotate(5, category_id=4), "classes that are no numbers or that its categories do not list: 4"),
    ],
    ids=["file twice", "id twice", "two classes", "true", "unknown"],
)
def test_annotations_that_contradict_themselves(copy, edit, message):
    for name in ("train2018.json", "val2018.json"):
        content = json.loads((copy / name).read_text())
        content["categories"].append({"id": 1, "name": "one"})  # which `true` equals
        (copy / name).write_text(json.dumps(content))
    change(copy / "train2018.json", edit)
    with pytest.raises(DataError, match=r"train2018\.json has " + message):
        imbalance_inat.load(str(copy))


def test_an_annotation_that_only_stands_twice_is_a_warning(copy, capsys):
    change(copy / "train2018.json", annotate(5))
    train, _ = imbalance_inat.load(str(copy))
    assert len(train.paths) == 42
    line = "has 1 images with the same annotation twice: train_val2018/Plantae/3/train5.jpg\n"
    assert line in capsys.readouterr().err


def test_validation_rows_that_name_training_images_are_counted(copy, capsys):
    name = "train_val2018/Plantae/3/train0.jpg"
    change(copy / "val2018.json", lambda content: content["images"][0].update(file_name=name))
    imbalance_inat.load(str(copy))
    assert f"warning: 1 of the 8 images of {copy}/val2018.json are training images too\n" in capsys.readouterr().err


def test_class_without_validation_images_is_named(copy):
    def remove(content):
        content["images"], content["annotations"] = content["images"][2:], content["annotations"][2:]

    change(copy / "val2018.json", remove)
    with pytest.raises(DataError, match=r"classes without validation images: species 3$"):
        imbalance_inat.load(str(copy))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no annotation file"),
        ("[]", "is no annotation file"),
        ('{"images": [], "annotations": [{"id": 1}]}', "is no annotation file"),
        (
            '{"images": [], "annotations": [{"image_id": 4, "category_id": 1}]}',
            "annotations of images that it does not",
        ),
    ],
)
def test_malformed_annotations(copy, content, message):
    (copy / "train2018.json").write_text(content)
    with pytest.raises(DataError, match=message):
        imbalance_inat.load(str(copy))


def test_no_data(tmp_path):
    line = fails(tmp_path, "--data_dir", "nowhere", *RUN, script=inat_train)
    assert "no nowhere/train2018.json" in line
    assert len(messages(line)) == 1
