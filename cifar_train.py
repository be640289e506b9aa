"""Train on long-tailed CIFAR-10, CIFAR-100 or handwritten digits, with the influence-balanced loss or without.

    python cifar_train.py --dataset digits --epochs 30 --start_ib_epoch 20 --loss_type IB --train_rule IBReweight
    python cifar_train.py --dataset cifar100 --loss_type IB --train_rule IBReweight --start_ib_epoch 100
    python cifar_train.py --dataset cifar10 --loss_type CE -e --resume checkpoint/NAME/ckpt.best.pth.tar

The first needs no download and takes seconds; the second is the paper's main setting (200 epochs: an hour on a
GPU's slow day, half a day on two CPU cores); the third evaluates. Logs and figures go to log/<name>,
checkpoints to checkpoint/<name>. `--dry_run` prints the recipe, `--help` every flag.
"""

import os

import imbalance_cifar
import models
from training import options as flags
from training.batches import TensorBatches
from training.setup import check_num_classes, train_or_evaluate
from utils import DataError, UsageError, command


def build_parser():
    """The flags: every published one, with its published default, and every constant of the method."""
    parser = flags.Parser(description=__doc__, formatter_class=flags.HelpFormatter, prog="cifar_train.py")
    flags.add_data_flags(parser, list(imbalance_cifar.DATASETS))
    flags.add_model_flags(parser, list(models.CIFAR_NETS), "resnet32")
    flags.add_method_flags(parser)
    flags.add_training_flags(parser)
    flags.add_run_flags(parser, workers_help="no effect here: the data are in memory")
    return parser


def load_data(options):
    """(training set, test set). Raises UsageError for an imbalance that cannot be, DataError for missing data."""
    dataset = imbalance_cifar.DATASETS[options.dataset]
    was_there = os.path.exists(options.data_dir)
    try:
        train = dataset(options.data_dir, options.imb_type, options.imb_factor, options.rand_number, download=True)
        return train, dataset(options.data_dir, train=False)
    except ValueError as error:
        raise UsageError(str(error)) from None
    except (RuntimeError, OSError, EOFError) as error:
        if not was_there and os.path.isdir(options.data_dir) and not os.listdir(options.data_dir):
            os.rmdir(options.data_dir)  # torchvision made it
        raise DataError(
            f"no {options.dataset} in {options.data_dir}, and it cannot be downloaded ({error}): put "
            f"{dataset.filename} there, name another --data_dir, or try --dataset digits, which needs no download"
        ) from None


def build_model(options):
    net = models.CIFAR_NETS[options.arch]
    return net(options.num_classes, use_norm=options.use_norm, feature_norm=options.ib_norm)


def make_batches(options, dataset, positions, device):
    """The whole data set, or its `positions`, as uint8 tensors on the device."""
    data, targets = dataset.data, dataset.targets
    if positions is not None:
        data, targets = data[positions], [targets[i] for i in positions]
    mean, std = imbalance_cifar.CIFAR_MEAN, imbalance_cifar.CIFAR_STD
    return TensorBatches(data, targets, options.batch_size, mean, std, device, seed=options.seed or 0)


@command
def main(argv=None):
    options = flags.complete(build_parser().parse_args(argv))
    check_num_classes(options, imbalance_cifar.DATASETS[options.dataset].cls_num)
    train_or_evaluate(options, load_data, build_model, make_batches)


if __name__ == "__main__":
    main()
