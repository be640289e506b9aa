"""Train on your own pictures, a folder for each class, with the influence-balanced loss or without.

    python folder_train.py --data_dir DIR -a resnet50 --loss_type IB --train_rule IBReweight --start_ib_epoch 100
    python folder_train.py --data_dir DIR --val_fraction 0.1 -a mobilenet_v3_small --pretrained imagenet
    python folder_train.py --data_dir DIR --loss_type CE -e --resume checkpoint/NAME/ckpt.best.pth.tar

DIR holds train/<class>/* and val/<class>/*, as torchvision's ImageFolder reads them; without val/, --val_fraction takes
a part of every class of train/ for testing. The imbalance is the one that the data have, unless --imb_type makes
another. Any of torchvision's classifiers (-a). Logs and figures go to log/<name>, checkpoints to checkpoint/<name>.
`--dry_run` prints the recipe, `--help` every flag.
"""

import os

import models
from imbalance import hold_out
from imbalance_folder import named, read_folder
from training import options as flags
from training.picture_files import make_batches
from training.setup import check_num_classes, train_or_evaluate
from utils import DataError, UsageError, command


def build_parser():
    """The flags: those of cifar_train.py, for any folder and any of torchvision's classifiers."""
    parser = flags.Parser(description=__doc__, formatter_class=flags.HelpFormatter, prog="folder_train.py")
    flags.add_data_flags(parser, None)
    flags.add_model_flags(parser, models.torchvision_archs(), "resnet50", pretrained="none")
    flags.add_picture_flags(parser, image_size=224, crops=None)
    flags.add_method_flags(parser)
    flags.add_training_flags(parser)
    flags.add_run_flags(parser)
    parser.set_defaults(imb_type="none")
    return parser


def parse(argv=None):
    """The completed options. Without val/, `val_fraction` becomes `test_fraction`: what is held out is the test set."""
    options = flags.complete(build_parser().parse_args(argv))
    options.dataset = options.dataset or os.path.basename(os.path.abspath(options.data_dir))
    options.test_fraction = 0.0
    if not options.dry_run and not os.path.isdir(os.path.join(options.data_dir, "val")):
        if not options.val_fraction:
            raise UsageError(f"no val folder in {options.data_dir}: --val_fraction F tests on a part of train/")
        options.test_fraction, options.val_fraction = options.val_fraction, 0.0
    return options


def load_data(options):
    """(training set, test set). Raises UsageError for an imbalance that cannot be, DataError for missing data."""
    train = read_folder(os.path.join(options.data_dir, "train"))
    if options.test_fraction:
        kept, held = hold_out(train.targets, options.test_fraction)
        train, test = train.subset(kept), train.subset(held)
        if not test.targets:
            raise UsageError(f"--val_fraction {options.test_fraction} leaves no picture to test on")
    else:
        test = read_folder(os.path.join(options.data_dir, "val"))
    _check_same_classes(options.data_dir, train.classes, test.classes)
    return train.long_tailed(options.imb_type, options.imb_factor, options.rand_number), test


def _check_same_classes(folder, train, test):
    for part, names in (("train", set(train) - set(test)), ("val", set(test) - set(train))):
        if names:
            raise DataError(f"{folder}: classes in {part}/ only: {named(sorted(names))}")


def build_model(options):
    return models.torchvision_net(options.arch, options.num_classes, options.use_norm, options.ib_norm)


def run(options, load_data):
    """What the script does with completed options: the data say how many classes there are."""
    data = None
    if not options.dry_run:
        data = load_data(options)
        check_num_classes(options, len(data[0].classes))
    train_or_evaluate(options, lambda options: data, build_model, make_batches)


@command
def main(argv=None):
    run(parse(argv), load_data)


if __name__ == "__main__":
    main()
