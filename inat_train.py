"""Train on iNaturalist 2018, whose long tail is natural, with the influence-balanced loss or without.

    python inat_train.py --data_dir data --loss_type IB --train_rule IBReweight
    torchrun --nproc_per_node 4 inat_train.py --data_dir data --loss_type IB --train_rule IBReweight
    python inat_train.py --data_dir data --loss_type IB --train_rule IBReweight -e --resume auto

The data in their official layout (see imbalance_inat.py). The paper's recipe is the default: ResNet-50, 50 epochs of CE
and 150 of IB, lr 0.01, x 0.1 at 30 and 180, crops of 224. Days on four GPUs. What the paper leaves unsaid is our
choice, see README. Logs and figures go to log/<name>, checkpoints to checkpoint/<name>. `--dry_run` prints the
recipe, `--help` every flag.
"""

import imbalance_inat
import models
from folder_train import run
from training import options as flags
from utils import command


def build_parser():
    """The flags: those of folder_train.py, with the paper's recipe as defaults."""
    parser = flags.Parser(description=__doc__, formatter_class=flags.HelpFormatter, prog="inat_train.py")
    flags.add_data_flags(parser, ["inaturalist"])
    flags.add_model_flags(parser, models.torchvision_archs(), "resnet50", pretrained="none")
    flags.add_picture_flags(parser, image_size=224, crops=None)
    flags.add_method_flags(parser, drw_epoch=180)
    flags.add_training_flags(parser, milestones=(30, 180), lr_factors=(0.1, 0.1))
    flags.add_run_flags(parser)
    parser.set_defaults(imb_type="none", start_ib_epoch=50, lr=0.01, ib_lr_factor=1.0, warmup_epochs=0, max_m=0.3)
    return parser


def load_data(options):
    """(training set, test set). Raises UsageError for an imbalance that cannot be, DataError for bad data."""
    train, test = imbalance_inat.load(options.data_dir)
    return train.long_tailed(options.imb_type, options.imb_factor, options.rand_number), test


@command
def main(argv=None):
    run(flags.complete(build_parser().parse_args(argv)), load_data)


if __name__ == "__main__":
    main()
