"""Train on long-tailed Tiny ImageNet, with the influence-balanced loss or without.

    python tinyimage_train.py --loss_type IB --train_rule IBReweight --start_ib_epoch 50
    python tinyimage_train.py --imb_factor 0.1 --image_size 32 --pretrained none --epochs 3 --loss_type CE
    python tinyimage_train.py --recipe ldam --loss_type LDAM --train_rule DRW --dry_run

The first is the paper's main setting (ImageNet's weights, 224 x 224, 100 epochs: hours on a GPU); the second is a
small one for a CPU; the third prints the LDAM paper's recipe. The data are data/tiny-imagenet-200.zip or the folder
in it, put in order by the first run; they are downloaded (248 MB) where there are none. Logs and figures go to
log/<name>, checkpoints to checkpoint/<name>. `--help` lists every flag.
"""

import os

import numpy as np

import imbalance_tinyimagenet as tiny
import models
from imbalance import hold_out
from training import image_batches
from training import options as flags
from training.batches import TensorBatches
from training.setup import check_num_classes, train_or_evaluate
from utils import DataError, UsageError, command

#: What `--recipe` changes in the defaults of the flags. official: what the official code does. paper: what the paper
#: prints. ldam: what the LDAM paper, whose numbers stand in the paper's table, prints.
RECIPES = {
    "official": {},
    "paper": {
        "start_ib_epoch": 50,
        "ib_lr_factor": 1.0,
        "_published_milestones": (50, 90),
        "_published_lr_factors": (0.1, 0.1),
    },
    "ldam": {"epochs": 120, "pretrained": "none", "image_size": 64, "crop": "padded"},
}

#: Up to this size ResNets shrink a picture to one pixel, and batch norm cannot take a batch of one picture.
ONE_PIXEL_SIZE = 32


def build_parser():
    """The flags: every published one, with its published default, and every constant of the method."""
    parser = flags.Parser(description=__doc__, formatter_class=flags.HelpFormatter, prog="tinyimage_train.py")
    parser.add_argument(
        "--recipe", default="official", choices=list(RECIPES),
        help="defaults of the flags: the official code's, what the paper prints (lr x 0.1 at 50 and 90), or the LDAM "
        "paper's (64 x 64 crops padded by 8, from scratch, 120 epochs); flags given beside it hold",
    )  # fmt: skip
    flags.add_data_flags(parser, ["tinyimagenet"])
    flags.add_model_flags(parser, list(models.IMAGENET_NETS), "resnet18", pretrained="imagenet")
    flags.add_picture_flags(parser, image_size=224)
    # the official code's 160 for DRW never comes in 100 epochs: it starts where the lr falls, as on CIFAR
    flags.add_method_flags(parser, drw_epoch=90)
    flags.add_training_flags(parser, epochs=100, milestones=(90,), lr_factors=(0.1,))
    flags.add_run_flags(parser, workers_help="threads that decode the pictures, once (default: %(default)s)")
    return parser


def parse(argv=None):
    """The completed options: flags given, then the recipe's defaults, then the official ones."""
    parser = build_parser()
    parser.set_defaults(**RECIPES[parser.parse_args(argv).recipe])
    return flags.complete(parser.parse_args(argv))


def load_data(options):
    """(training set, test set), as file names. Raises UsageError for an imbalance that cannot be, DataError for
    missing or damaged data."""
    folder, _ = tiny.arrange(options.data_dir)
    try:
        train = tiny.IMBALANETINYIMGNET(
            os.path.join(folder, "train"), options.imb_type, options.imb_factor, options.rand_number
        )
    except ValueError as error:
        raise UsageError(str(error)) from None
    test = tiny.TINYIMAGENET(os.path.join(folder, "val"))
    if len(train.classes) != tiny.CLASSES:
        raise DataError(f"{folder} has {len(train.classes)} classes, Tiny ImageNet has {tiny.CLASSES}")
    if not options.evaluate:
        _check_last_batch(options, train.targets)
    return train, test


def _check_last_batch(options, targets):
    """Refuse what batch norm would stop at the end of the first epoch."""
    pictures = len(hold_out(targets, options.val_fraction)[0])
    if options.image_size <= ONE_PIXEL_SIZE and pictures % options.batch_size == 1 % options.batch_size:
        raise UsageError(
            f"--batch-size {options.batch_size} leaves a last batch of one picture of {pictures}, which batch norm "
            f"cannot take at --image_size {options.image_size}: choose another --batch-size"
        )


def build_model(options):
    net = models.IMAGENET_NETS[options.arch]
    return net(options.num_classes, use_norm=options.use_norm, feature_norm=options.ib_norm)


def make_batches(options, dataset, positions, device):
    """The whole data set, or its `positions`, from pictures that are decoded once and kept beside the data."""
    paths = [path for path, _ in dataset.available]
    part, folder = os.path.basename(dataset.root), os.path.join(os.path.dirname(dataset.root), "decoded")
    images = image_batches.decode_once(paths, tiny.read_picture, folder, part, options.workers)
    rows, targets = dataset.chosen, np.asarray(dataset.targets)
    if positions is not None:
        rows, targets = rows[positions], targets[positions]
    common = (options.batch_size, tiny.MEAN, tiny.STD, device)
    seed, size = options.seed or 0, options.image_size
    if options.crop == "resized":
        return image_batches.ResizedCropBatches(images, rows, targets, *common, seed=seed, image_size=size)
    images = image_batches.resize_all(images[rows], size)
    return TensorBatches(images, targets, *common, padding=size // 8, seed=seed)


@command
def main(argv=None):
    options = parse(argv)
    check_num_classes(options, tiny.CLASSES)
    train_or_evaluate(options, load_data, build_model, make_batches)


if __name__ == "__main__":
    main()
